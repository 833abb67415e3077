"""Interventions: edits of hidden states while a model writes or reads, which count the tokens that they edit."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.determinism import at_least_float32
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.operators import Operator, add
from reasonscope.steering.vectors.scope import Scope

if TYPE_CHECKING:
    from reasonscope.steering.vectors.vector import SteeringVector


class Intervention(Protocol):
    """Edits of hidden states for one run.

    Pass `edits` as `write=` to a forward pass; to `generate` and `rollouts` also `on_step`.

    Example:
        steering = Steering(vector, 0.5, Scope.thinking(model))
        traces = rollouts(model, problems, sampling, write=steering.edits, on_step=steering.on_step)
        print(steering.n_edited)
    """

    @property
    def edits(self) -> Mapping[Site, Edit]:
        """The edit at each site."""
        ...

    @property
    def n_edited(self) -> int:
        """Tokens edited so far."""
        ...

    def on_step(self, step: DecodingStep) -> None:
        """Follow a generation: an edit may depend on what each sequence has said so far."""
        ...

    def begin(self, n_prompt: Sequence[int]) -> None:
        """Say how many tokens of each row are prompt, before passes over whole sequences."""
        ...


class MeasuredMoves:
    """The half of an intervention that notes how far it moves each token, for arms and for the controls that have to move as far."""

    multiplier = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._distances: dict[Site, list[Tensor]] = {}
        self._along: dict[Site, float] = {}

    @property
    def distances(self) -> dict[Site, Values]:
        """How far each edited token was moved so far (edit,), by site, in units of the residual stream; empty if not measured."""
        return {site: torch.cat(parts).double().cpu().numpy() for site, parts in self._distances.items()}

    @property
    def moves(self) -> dict[Site, float]:
        """The mean distance by site at multiplier 1; negative if the edits together moved tokens against the direction."""
        along = self._along
        return {
            site: float(np.copysign(values.mean(), along[site])) / self.multiplier
            for site, values in self.distances.items()
            if len(values)
        }

    def note(self, site: Site, moves: Tensor, direction: Tensor) -> None:
        """Remember how far the tokens of `moves` (token, d_model) were moved at `site`, and whether along `direction` or against it."""
        self._distances.setdefault(site, []).append(moves.norm(dim=-1))
        self._along[site] = self._along.get(site, 0.0) + float((moves @ direction.to(moves)).sum())


class MaskedEdit:
    """Edits the tokens that a scope chooses: the half of an intervention that decides where, not what.

    It counts absolute positions, whatever the cache and the padding: the first pass of a generation says where each row begins, `on_step`
    which token came next and which rows are still there. A token counts once per pass, however many sites are edited.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self.n_edited = 0
        self._step: DecodingStep | None = None
        self._given: Sequence[int] | None = None
        self._written = self._n_prompt = torch.empty(0)
        self._generated = 0
        self._whole_prompt = True  # the tokens that were fed first are all of the prompt, and no more
        self._pass: tuple[Positions, Tensor | None, int] | None = None

    def on_step(self, step: DecodingStep) -> None:
        self._step = step
        self._generated = self._generated + step.ids.shape[1] if step.index > 0 else 0
        if step.index == 0:
            self._given, self._whole_prompt = None, True
        if step.index > 0 and not self.scope.is_local:
            columns = torch.full((len(self._written), step.ids.shape[1]), -1, device=step.ids.device)
            columns[step.rows] = step.ids
            self._written = torch.cat([self._written, columns], dim=1)

    def begin(self, n_prompt: Sequence[int]) -> None:
        self._given, self._step = n_prompt, None

    def resume(self, ids: Tensor, n_prompt: Tensor) -> None:
        """Say what was fed before the next step: `ids` (batch, token), -1 on padding, with `n_prompt` (batch,) tokens of prompt."""
        self._written, self._n_prompt, self._whole_prompt = ids, n_prompt, False

    def change(self, activation: Tensor, where: Positions, changed: Callable[[Tensor], Tensor]) -> Tensor:
        """`activation` (batch, token, …) with its chosen rows (row, …) replaced by what `changed` returns; itself if nothing changed."""
        if self._pass is None or self._pass[0] is not where:
            mask = self._mask(where)
            n = where.ids.numel() * mask if isinstance(mask, bool) else int(mask.sum())
            self._pass = where, None if isinstance(mask, bool) or n == mask.numel() else mask, n
            self.n_edited += n
        _, chosen, n = self._pass
        if n == 0:
            return activation
        chosen = None if chosen is None else chosen.to(activation.device)
        rows = activation.flatten(0, 1) if chosen is None else activation[chosen]
        new = changed(rows)
        if new is rows:
            return activation
        if chosen is None:
            return new.reshape(activation.shape).contiguous()
        after = activation.clone()
        after[chosen] = new
        return after

    def _mask(self, where: Positions) -> Tensor | bool:
        """The chosen columns of this pass; one bool if that is all of them or none."""
        if self._begins(where):
            ids = where.ids.masked_fill(where.index < 0, -1)
            n_prompt = (ids >= 0).sum(dim=1)
            if self._given is not None:
                n_prompt = self._checked(n_prompt)
            self._written, self._n_prompt = ids, n_prompt
            return self.scope.mask(ids, n_prompt=n_prompt)
        if self._step is None or len(self._step.rows) != len(where.ids):
            raise InputError(
                "this pass continues from a cache, but the tokens before it are not known: pass on_step=….on_step to generate or "
                "rollouts together with write=, and use an intervention for one run at a time"
            )
        rows, n = self._step.rows, where.ids.shape[1]
        if n == 1 and self._whole_prompt and (alike := self.scope.of_generated(self._generated - 1)) is not None:
            return alike
        if self.scope.is_local:
            return self.scope.local_mask(where.ids, where.index, self._n_prompt[rows])
        return self.scope.mask(self._written[rows], n_prompt=self._n_prompt[rows], last=n)

    def _begins(self, where: Positions) -> bool:
        """Whether this pass feeds sequences from their first token, and not a step that `on_step` announced."""
        if self._step is not None and self._step.index > 0 and self._step.ids is where.ids:
            return False
        return bool((where.index == 0).any(dim=1).all())

    def _checked(self, n_tokens: Tensor) -> Tensor:
        assert self._given is not None
        if len(self._given) != len(n_tokens):
            raise InputError(f"prompt lengths of {len(self._given)} sequences for a batch of {len(n_tokens)}")
        return torch.tensor(self._given, device=n_tokens.device)


class Steering(MaskedEdit, MeasuredMoves):
    """Applies a steering vector: by default `h + multiplier · direction` at each of its sites, on the tokens of `scope`.

    Args:
        vector: The directions, by site.
        multiplier: The strength; 0 leaves every bit as it is.
        scope: The tokens whose states are edited.
        operator: How they are edited, for instance one of OPERATORS.
        measure: Whether to record how far each edited token is moved (`distances`).

    Raises:
        InputError: For a multiplier that is not finite. While it runs: for a vector of another width than the model's, and for a strength
            whose result the dtype of the model cannot hold.

    Example:
        steering = Steering(vector, 0.5, Scope.thinking(model))
        traces = rollouts(model, problems, sampling, write=steering.edits, on_step=steering.on_step)
        print(steering.n_edited, "tokens edited")
    """

    def __init__(
        self,
        vector: "SteeringVector",
        multiplier: float,
        scope: Scope,
        *,
        operator: Operator = add,
        measure: bool = False,
    ) -> None:
        if not np.isfinite(multiplier):
            raise InputError(f"the multiplier is {multiplier}; a finite number is needed")
        super().__init__(scope)
        self.vector, self.multiplier, self.operator = vector, float(multiplier), operator
        self._measure = measure

    @property
    def edits(self) -> Mapping[Site, Edit]:
        return {site: self._edit(site, direction) for site, direction in self.vector.directions.items()}

    def _edit(self, site: Site, direction: NDArray[np.float32]) -> Edit:
        name, wide = str(site), torch.from_numpy(np.asarray(direction, dtype=np.float32))

        def edit(activation: Tensor, where: Positions) -> Tensor:
            if activation.shape[-1] != len(wide):
                raise InputError(
                    f"a direction of width {len(wide)} for activations of width {activation.shape[-1]} at {name}; "
                    "the vector was made from another model"
                )
            return self.change(activation, where, moved)

        def moved(before: Tensor) -> Tensor:
            if self.multiplier == 0:
                return before
            states = at_least_float32(before)
            after = self.operator(states, wide.to(states), self.multiplier).to(before.dtype)
            self._check(before, after, name)
            if self._measure:
                self.note(site, (after.float() - before.float()).detach(), wide)
            return after

        return edit

    def _check(self, before: Tensor, moved: Tensor, name: str) -> None:
        whole = moved.detach().sum(dtype=torch.float32)  # one step that almost always suffices
        if math.isfinite(whole.item()) or moved.isfinite().all():
            return
        dtype = str(moved.dtype).removeprefix("torch.")
        if not before.isfinite().all():
            raise InputError(
                f"the states at {name} are NaN or infinite in {dtype} before they are steered; load the model in bfloat16 or float32"
            )
        raise InputError(
            f"a multiplier of {self.multiplier:g} takes {name} beyond what {dtype} holds ({torch.finfo(moved.dtype).max:.3g}); lower it"
        )


class Composed:
    """Several interventions at once; if two edit the same site, the later one acts on what the earlier one left.

    `n_edited` is the sum over all of them. Raises InputError without interventions.

    Example:
        both = Composed(Steering(first, 0.5, scope), Steering(second, 1.0, scope))
        traces = rollouts(model, problems, sampling, write=both.edits, on_step=both.on_step)
        print(both.n_edited)
    """

    def __init__(self, *interventions: Intervention) -> None:
        if not interventions:
            raise InputError("no intervention to apply; give at least one")
        self.interventions = interventions

    @property
    def edits(self) -> Mapping[Site, Edit]:
        by_site: dict[Site, list[Edit]] = {}
        for intervention in self.interventions:
            for site, edit in intervention.edits.items():
                by_site.setdefault(site, []).append(edit)
        return {site: _one_after_another(edits) for site, edits in by_site.items()}

    @property
    def n_edited(self) -> int:
        return sum(intervention.n_edited for intervention in self.interventions)

    @property
    def distances(self) -> dict[Site, Values]:
        """How far each edited token was moved so far (edit,), by site, by those interventions that measure it."""
        found: dict[Site, list[Values]] = {}
        for intervention in self.interventions:
            if isinstance(intervention, MeasuredMoves | Composed):
                for site, values in intervention.distances.items():
                    found.setdefault(site, []).append(values)
        return {site: np.concatenate(parts) for site, parts in found.items()}

    def on_step(self, step: DecodingStep) -> None:
        for intervention in self.interventions:
            intervention.on_step(step)

    def begin(self, n_prompt: Sequence[int]) -> None:
        for intervention in self.interventions:
            intervention.begin(n_prompt)

    def resume(self, ids: Tensor, n_prompt: Tensor) -> None:
        """As `MaskedEdit.resume`, for those parts that follow the text."""
        for intervention in self.interventions:
            if isinstance(intervention, MaskedEdit | Composed):
                intervention.resume(ids, n_prompt)


def mean_distances(intervention: Intervention) -> dict[Site, float]:
    """How far an edited token was moved on average, by site; empty for an intervention that does not measure it.

    Vectors at the same site count alike, however many tokens each of them edited: a text with more separators says nothing about how far
    a separator was moved.
    """
    found: dict[Site, list[float]] = {}
    for part in parts_of(intervention):
        for site, values in part.distances.items() if isinstance(part, MeasuredMoves) else ():
            found.setdefault(site, []).append(float(values.mean()))
    return {site: float(np.mean(means)) for site, means in found.items()}


def mean_moves(intervention: Intervention) -> tuple[Mapping[Site, float], ...]:
    """`MeasuredMoves.moves` of each part of an intervention; empty for parts that do not measure it."""
    return tuple(part.moves if isinstance(part, MeasuredMoves) else {} for part in parts_of(intervention))


def parts_of(intervention: Intervention) -> tuple[Intervention, ...]:
    """What an intervention is composed of; itself if it is not."""
    if not isinstance(intervention, Composed):
        return (intervention,)
    return tuple(part for one in intervention.interventions for part in parts_of(one))


def check_vectors(intervention: Intervention, model: Model) -> None:
    """Raise InputError or SiteError if a vector that the intervention applies does not fit the model."""
    if isinstance(intervention, Composed):
        for one in intervention.interventions:
            check_vectors(one, model)
    elif isinstance(intervention, Steering):
        intervention.vector.check(model)


def require_edits(intervention: Intervention, name: str) -> None:
    """Raise InputError if an intervention that was run edited no token; a controller, which may find nothing to do, is left out."""
    edits = [part for part in parts_of(intervention) if not isinstance(part, LogitsProcessor)]
    if edits and not any(part.n_edited for part in edits):
        raise InputError(f"{name} edited no token: nothing that was given or generated lies in its scope")


def _one_after_another(edits: Sequence[Edit]) -> Edit:
    if len(edits) == 1:
        return edits[0]

    def edit(activation: Tensor, where: Positions) -> Tensor:
        for one in edits:
            activation = one(activation, where)
        return activation

    return edit
