"""What an ablated model writes when it answers problems again, beside the unchanged model and random ablations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.generation.decoding import Completion, generate
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.controls import random_ablations
from reasonscope.steering.ablation.interventions import (
    AblationIntervention,
    MatchedMove,
    ReferenceStates,
    reference_states,
)
from reasonscope.steering.ablation.knockout import Edges, writing_without
from reasonscope.steering.ablation.targets import Ablation
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.experiment import Arm, SteeringExperiment, estimates_from_dict, estimates_to_dict


@dataclass(frozen=True, kw_only=True)
class RegenerationEffect:
    """What the ablated model writes when it answers problems again.

    Attributes:
        arm: The ablated model, compared with the unchanged one.
        random: Models without as many random other heads, MLPs, layers, neurons, experts or latents, with edges to other tokens cut,
            or with states moved as far in other directions. Empty for tokens: which others to remove can only be drawn in finished text.
        excess: Each measure of `arm` minus its mean over `random`.
        answers: By trace, the final answer of the unchanged and of the ablated model; None if it gave none.
    """

    arm: Arm
    random: tuple[Arm, ...]
    excess: Mapping[str, Estimate]
    answers: Mapping[str, tuple[str | None, str | None]]

    @property
    def n_changed(self) -> int:
        """How many final answers differ from those of the unchanged model, as texts."""
        return sum(before != after for before, after in self.answers.values())

    def to_dict(self) -> dict[str, Any]:
        """What the ablated model wrote, and what the random controls wrote, for JSON."""
        return {
            **self.arm.to_dict(),
            "random": [arm.to_dict() for arm in self.random],
            "excess_over_random": estimates_to_dict(self.excess),
            "answers": {id: {"unchanged": a, "ablated": b} for id, (a, b) in self.answers.items()},
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "RegenerationEffect":
        """What `to_dict` gave, again."""
        return cls(
            arm=Arm.from_dict(told),
            random=tuple(map(Arm.from_dict, told["random"])),
            excess=estimates_from_dict(told["excess_over_random"]),
            answers={id: (one["unchanged"], one["ablated"]) for id, one in told["answers"].items()},
        )


def regenerate_ablated(
    model: Model,
    ablation: Ablation,
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    n_controls: int = 5,
    seed: int = 0,
) -> RegenerationEffect:
    """Let the ablated model answer `problems` again, beside the unchanged model and random ablations of the same kind.

    Args:
        model: The model.
        ablation: What to remove.
        traces: Where means and drawn states come from.
        problems: What is answered.
        sampling: Decoding settings; every arm gets the same draws.
        n_controls: How many random ablations to run; fewer, if fewer different ones exist.
        seed: Seed of the random ablations.

    Raises:
        InputError: If nothing was edited or cut, or nothing else is left to compare with.
    """
    bank = reference_states(model, traces, [ablation.latents.site]) if ablation.latents else {}
    drawn = [] if ablation.tokens else random_ablations(model, ablation, bank=bank, n_controls=n_controls, seed=seed)
    wanted = [ablation, *drawn]
    if ablation.how != "zero" and not ablation.latents:
        bank = reference_states(model, traces, list({site: None for one in wanted for site in one.parts}))
    cuts = [_Cut(model, one.edges, sampling) for one in wanted if one.edges]
    conditions = [_condition(model, one, cuts, i, bank, seed) for i, one in enumerate(wanted)]
    if ablation.directions is not None:
        moves = [MatchedMove(model, ablation, bank, seed=seed, draw=seed + i) for i in range(n_controls)]
        conditions += [_named(f"{ablation.name}, random {i}", one) for i, one in enumerate(moves, start=1)]
    experiment = SteeringExperiment(model, problems, sampling)
    runs = experiment.run_all(conditions)
    _check_cut(ablation.name, [one.count for one in cuts])
    arm, *random = (experiment.arm(one.name, 1.0, run) for one, run in zip(conditions, runs, strict=True))
    excess = experiment.differences(runs[0], runs[1:]) if random else {}
    said = {
        plain.id: (plain.final_answer, again.final_answer)
        for plain, again in zip(experiment.base.traces, runs[0].traces, strict=True)
    }
    return RegenerationEffect(arm=arm, random=tuple(random), excess=excess, answers=said)


def _check_cut(name: str, counts: Sequence[int]) -> None:
    """Raise InputError if the ablation or one of its controls cut nothing; `counts` begins with the ablation's own."""
    if 0 not in counts:
        return
    number = counts.index(0)
    if number:
        raise InputError(
            f"random edges {number} in place of {name!r} cut none while the model wrote, because their tokens come too late to be read; "
            "answer more problems"
        )
    raise InputError(f"ablation {name!r} cut no edge while the model wrote: no token lies in its scopes")


def _condition(
    model: Model, ablation: Ablation, cuts: Sequence["_Cut"], number: int, bank: ReferenceStates, seed: int
) -> Condition:
    name = f"{ablation.name}, random {number}" if number else ablation.name
    if ablation.edges is not None:
        return Condition(name=name, multiplier=1.0, decode=cuts[number])
    return _named(name, AblationIntervention(model, ablation, bank, seed=seed + number))


def _named(name: str, intervention: AblationIntervention) -> Condition:
    return Condition(name=name, multiplier=1.0, intervention=intervention)


class _Cut:
    """A decoding loop (`Decode`) without some attention edges; `count` says how many it has cut."""

    def __init__(self, model: Model, edges: Edges, sampling: Sampling) -> None:
        self._model, self._edges, self._sampling = model, edges, sampling
        self.count = 0

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        with writing_without(self._model, self._edges) as cut:
            done = generate(self._model, prompts, self._sampling, seeds=seeds, on_step=cut.on_step)
        self.count += cut.count
        return done
