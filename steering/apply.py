"""Applies steering vectors while a model writes or reads, and counts what it touched."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.decoding import DecodingStep
from reasonscope.probes.sites import Site
from reasonscope.steering.scope import Scope
from reasonscope.steering.vector import SteeringVector


class Steering:
    """One use of a vector: `h + multiplier · direction` at each of its sites, on the tokens of `scope`.

    `edits` goes to `write=` of a forward pass over whole sequences, or together with `on_step` to `generate` and `rollouts`; one
    use at a time. A multiplier of 0 leaves every bit as it is. `touched` counts the tokens edited so far (at one of the sites).
    """

    def __init__(self, vector: SteeringVector, multiplier: float, scope: Scope) -> None:
        if not np.isfinite(multiplier):
            raise InputError(f"the multiplier is {multiplier}; a finite number is needed")
        self._vector, self._multiplier, self._scope = vector, multiplier, scope
        self._written: Tensor | None = None  # ids of all sequences so far, -1 on padding; None outside a generation
        self._rows: Tensor | None = None
        self._counted: Positions | None = None
        self.touched = 0

    @property
    def edits(self) -> Mapping[Site, Edit]:
        return {site: self._edit(direction) for site, direction in self._vector.directions.items()}

    def on_step(self, step: DecodingStep) -> None:
        """Follow a generation: the scope needs what each sequence has said so far."""
        if step.index == 0:
            self._written = torch.full_like(step.ids, -1)
        assert self._written is not None
        column = torch.full((len(self._written), 1), -1, device=step.ids.device)
        if step.index > 0:
            column[step.rows] = step.ids
            self._written = torch.cat([self._written, column], dim=1)
        self._rows = step.rows

    def _edit(self, direction: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Edit:
        def edit(activation: Tensor, where: Positions) -> Tensor:
            chosen = self._chosen(where)
            if self._multiplier == 0 or not chosen.any():
                return activation
            if activation.shape[-1] != len(direction):
                raise InputError(
                    f"a direction of width {len(direction)} for activations of width {activation.shape[-1]}"
                )
            shift = torch.from_numpy(direction).to(activation) * self._multiplier
            return torch.where(chosen[..., None].to(activation.device), activation + shift, activation)

        return edit

    def _chosen(self, where: Positions) -> Tensor:
        """The mask over the columns of this pass (batch, token); counts each pass once, however many sites there are."""
        ids = where.ids.masked_fill(where.index < 0, -1)
        if self._written is not None and self._rows is not None:
            if ids.shape[1] == self._written.shape[1]:
                self._written = ids
            ids = self._written[self._rows]
        chosen = self._scope.mask(ids)[:, -where.ids.shape[1] :]
        if self._counted is not where:
            self._counted = where
            self.touched += int(chosen.sum())
        return chosen
