"""Conditions under which a model answers, several of them in one batch: decoding a small model costs passes, not rows."""

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
from reasonscope.probes.generation.rollout import Decode
from reasonscope.steering.vectors.application import VectorUse, as_intervention
from reasonscope.steering.vectors.intervention import Intervention
from reasonscope.steering.vectors.matched_controls import random_uses


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way to let a model answer: any of an intervention, logits processors and a prefill; with none, the model as it is.

    Attributes:
        name: What tables and figures call it.
        multiplier: The strength, kept for tables and figures only.
        intervention: Edits of hidden states.
        processors: Edits of the logits, in this order.
        prefill: Text that the thinking starts with; it counts as prompt.
        decode: A decoding loop of its own in place of `generate`; excludes the other three.

    Raises:
        InputError: If `decode` is combined with an intervention, processors or a prefill.

    Example:
        steering = Steering(vector, 0.5, Scope.thinking(model))
        condition = Condition(name="seal", multiplier=0.5, intervention=steering)
        arms = SteeringExperiment(model, problems, sampling).arms([condition])
    """

    name: str
    multiplier: float = 0.0
    intervention: Intervention | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    prefill: str = ""
    decode: Decode | None = None

    def __post_init__(self) -> None:
        if self.decode is not None and (self.intervention or self.processors or self.prefill):
            raise InputError(
                f"condition {self.name!r} has a decoding loop of its own, which takes no intervention, processors or prefill; "
                "build these into the loop"
            )

    @property
    def acts_on_states_alone(self) -> bool:
        """Whether all that it does can be repeated in one pass over finished text."""
        return not self.processors and not self.prefill and self.decode is None


def method_conditions(
    name: str, uses: Sequence[VectorUse], multiplier: float, *, n_controls: int = 0
) -> list[Condition]:
    """A steering method at one multiplier, then `n_controls` random vectors in its place (`random 1, NAME` …).

    Leave the controls of all but added vectors to `random_conditions`: how far other edits move states is known after their run.
    """
    steered = Condition(name=name, multiplier=multiplier, intervention=as_intervention(uses, multiplier))
    return [steered, *random_conditions(name, uses, multiplier, n_controls=n_controls)]


def random_conditions(
    name: str,
    uses: Sequence[VectorUse],
    multiplier: float,
    *,
    n_controls: int,
    moves: Sequence[Mapping[Site, float]] = (),
) -> list[Condition]:
    """Random vectors in place of a steering method; with the `moves` of its arm, they move states as far as it did (`random_uses`)."""
    drawn = {f"random {i}, {name}": random_uses(uses, i, moves=moves) for i in range(1, n_controls + 1)}
    return [
        Condition(name=of_arm, multiplier=multiplier, intervention=as_intervention(random, multiplier))
        for of_arm, random in drawn.items()
    ]


class BatchedConditions(LogitsProcessor):
    """Several conditions in one batch, each on rows of its own: the prompts come in equal parts, one part per condition.

    Pass `edits`, `on_step` and, among the processors, the object itself to `generate`. Each condition sees only its own rows, as though
    they were the whole batch: their activations, positions, logits and steps. Finished rows leave without reordering the others, so the
    rows of a condition always stay together.
    """

    def __init__(self, conditions: Sequence[Condition]) -> None:
        if not conditions:
            raise InputError("no condition to run; give at least one")
        self._conditions = tuple(conditions)
        self._sizes = [0] * len(self._conditions)  # rows of each in the current pass
        self._pass: tuple[Positions, list[Positions]] | None = None

    @property
    def edits(self) -> Mapping[Site, Edit]:
        each = [one.intervention.edits if one.intervention else {} for one in self._conditions]
        return {site: self._edit([edits.get(site) for edits in each]) for edits in each for site in edits}

    def on_step(self, step: DecodingStep) -> None:
        if step.index == 0:
            if len(step.rows) % len(self._conditions):
                raise InputError(
                    f"{len(step.rows)} rows cannot be split evenly between {len(self._conditions)} conditions; give each as many prompts"
                )
            self._share = len(step.rows) // len(self._conditions)
        owners = (step.rows // self._share).cpu()
        self._sizes = torch.bincount(owners, minlength=len(self._conditions)).tolist()
        parts = zip(self._conditions, step.rows.split(self._sizes), step.ids.split(self._sizes), strict=True)
        lengths = [None] * len(self._sizes) if step.n_prompt is None else step.n_prompt.split(self._sizes)
        for number, ((condition, rows, ids), n_prompt) in enumerate(zip(parts, lengths, strict=True)):
            if condition.intervention is not None and len(rows):
                own = DecodingStep(index=step.index, rows=rows - number * self._share, ids=ids, n_prompt=n_prompt)
                condition.intervention.on_step(own)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        changed = []
        parts = zip(self._conditions, input_ids.split(self._sizes), scores.split(self._sizes), strict=True)
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
        """The positions of each condition, the same objects at every site of a pass."""
        if self._pass is None or self._pass[0] is not where:
            parts = zip(where.index.split(self._sizes), where.ids.split(self._sizes), strict=True)
            self._pass = where, [Positions(index=index, ids=ids) for index, ids in parts]
        return self._pass[1]
