"""Ways to let a model answer, and several of them in one batch: decoding a small model takes as long as it takes passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.steering.vectors.intervention import Intervention


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way to let a model answer: steered, with controls of its decoding, with a thinking that was begun for it; or as it is.

    `multiplier` is kept for the tables, where there is one.
    """

    name: str
    multiplier: float = 0.0
    intervention: Intervention | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    prefill: str = ""


class BatchedConditions(LogitsProcessor):
    """Several treatments in one batch, each on rows of its own: the prompts are as many equal parts, one behind the other.

    `edits`, `on_step` and, among the processors, the object itself go to `generate`. A treatment meets its rows as though they were a
    batch of their own: activations, positions, logits and steps of them alone. Rows that end leave without changing the order, so that a
    treatment's rows always stand together.
    """

    def __init__(self, conditions: Sequence[Condition]) -> None:
        if not conditions:
            raise InputError("no treatment to apply; give at least one")
        self._treatments = tuple(conditions)
        self._sizes = [0] * len(self._treatments)  # rows of each in the pass that runs
        self._pass: tuple[Positions, list[Positions]] | None = None

    @property
    def edits(self) -> Mapping[Site, Edit]:
        each = [one.intervention.edits if one.intervention else {} for one in self._treatments]
        return {site: self._edit([edits.get(site) for edits in each]) for edits in each for site in edits}

    def on_step(self, step: DecodingStep) -> None:
        if step.index == 0:
            if len(step.rows) % len(self._treatments):
                raise InputError(f"{len(step.rows)} rows are no {len(self._treatments)} equal parts; give each as many")
            self._share = len(step.rows) // len(self._treatments)
        owners = (step.rows // self._share).cpu()
        self._sizes = torch.bincount(owners, minlength=len(self._treatments)).tolist()
        parts = zip(self._treatments, step.rows.split(self._sizes), step.ids.split(self._sizes), strict=True)
        for number, (condition, rows, ids) in enumerate(parts):
            if condition.intervention is not None and len(rows):
                own = DecodingStep(index=step.index, rows=rows - number * self._share, ids=ids)
                condition.intervention.on_step(own)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        changed = []
        parts = zip(self._treatments, input_ids.split(self._sizes), scores.split(self._sizes), strict=True)
        for condition, ids, logits in parts:
            for processor in condition.processors if len(ids) else ():
                logits = processor(cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits))
            changed.append(logits)
        return torch.cat(changed)

    def _edit(self, edits: Sequence[Edit | None]) -> Edit:
        def edit(activation: Tensor, where: Positions) -> Tensor:
            before = activation.split(self._sizes)
            after = [
                one(rows, at) if one is not None and len(rows) else rows
                for one, rows, at in zip(edits, before, self._positions(where), strict=True)
            ]
            same = all(new is old for new, old in zip(after, before, strict=True))
            return activation if same else torch.cat(after)

        return edit

    def _positions(self, where: Positions) -> list[Positions]:
        """Those of each treatment, the same objects at every site of a pass."""
        if self._pass is None or self._pass[0] is not where:
            parts = zip(where.index.split(self._sizes), where.ids.split(self._sizes), strict=True)
            self._pass = where, [Positions(index=index, ids=ids) for index, ids in parts]
        return self._pass[1]
