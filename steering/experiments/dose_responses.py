"""What steering does at each strength, compared with its reverse and with random directions that move the states as far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import Summary
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.experiment import (
    Arm,
    ArmMeasurements,
    SteeringExperiment,
    estimates_from_dict,
    estimates_to_dict,
)
from reasonscope.steering.experiments.summaries import ArmRow, response_summary
from reasonscope.steering.vectors.application import VectorUse, as_intervention, check_uses
from reasonscope.steering.vectors.intervention import Composed
from reasonscope.steering.vectors.matched_controls import is_a_share, needs_a_run, random_uses
from reasonscope.steering.vectors.vector import SteeringVector

Moves: TypeAlias = Sequence[Mapping[Site, float]]  # of each vector of an arm, see `Arm.moves`
_AGAIN = 3  # runs at most in which a control is brought to the distance of the real edit


@dataclass(frozen=True, kw_only=True)
class Dose:
    """What a method did at one strength.

    Attributes:
        strength: The multiplier of its vectors.
        steered: The method.
        reversed: Its reverse, at the negative multiplier.
        random: Random vectors in its place.
        excess: Each measure of `steered` minus its mean over `random`, paired by problem and seed.
    """

    strength: float
    steered: Arm
    reversed: Arm
    random: tuple[Arm, ...]
    excess: Mapping[str, Estimate]

    @property
    def beyond_random(self) -> bool:
        """Whether the method changes the thinking tokens more than a random direction does.

        Two things have to hold. The change lies outside Student's prediction interval for one more draw of k random changes, mean ±
        t √(1 + 1/k) sd, which a random direction leaves in 5 % of cases (it lies outside the range of five others in a third of them).
        And its excess over the random vectors differs from 0 across problems.
        """
        changes = np.array([arm.change.value for arm in self.random])
        k, excess = len(changes), self.excess["tokens"]
        reach = float(t.ppf(0.975, k - 1)) * np.sqrt(1 + 1 / k) * changes.std(ddof=1)
        outside = bool(abs(self.steered.change.value - changes.mean()) > reach)
        return outside and (excess.low > 0 or excess.high < 0)

    def to_dict(self) -> dict[str, Any]:
        """Every arm with its numbers, for JSON."""
        return {
            "strength": self.strength,
            "steered": self.steered.to_dict(),
            "reversed": self.reversed.to_dict(),
            "random": [arm.to_dict() for arm in self.random],
            "excess_over_random": estimates_to_dict(self.excess),
            "beyond_random": self.beyond_random,
        }

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "Dose":
        """The dose that `to_dict` wrote."""
        return cls(
            strength=known["strength"],
            steered=Arm.from_dict(known["steered"]),
            reversed=Arm.from_dict(known["reversed"]),
            random=tuple(map(Arm.from_dict, known["random"])),
            excess=estimates_from_dict(known["excess_over_random"]),
        )


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """What a method did at every strength.

    Attributes:
        name: The method.
        sites: Where its vectors act.
        base: The unsteered model, strength 0.
        doses: One per strength, ascending.
        held_out: Whether the vectors say which problems they were made from; then none of these is among the problems here.
    """

    name: str
    sites: tuple[Site, ...]
    base: Arm
    doses: tuple[Dose, ...]
    held_out: bool

    control_name: ClassVar[str] = "random vectors"
    unit: ClassVar[str] = "below 0 the reverse"

    @property
    def curves(self) -> dict[str, tuple[Arm, ...]]:
        """The arms to draw as lines, by ascending strength: the method's, and those of its reverse."""
        return {
            self.name: tuple(dose.steered for dose in self.doses),
            f"{self.name} reversed": tuple(dose.reversed for dose in self.doses),
        }

    @property
    def controls(self) -> tuple[Arm, ...]:
        """The arms of the random vectors."""
        return tuple(arm for dose in self.doses for arm in dose.random)

    @property
    def arms(self) -> list[Arm]:
        """All arms, the unsteered first."""
        return [self.base, *(arm for dose in self.doses for arm in (dose.steered, dose.reversed, *dose.random))]

    def to_dict(self) -> dict[str, Any]:
        """Every arm with its measures, and for each strength the excess over the random vectors, for JSON."""
        return {
            "sites": [str(site) for site in self.sites],
            "held_out": self.held_out,
            "n_problems": self.base.n_problems,
            "base": self.base.to_dict(),
            "doses": [dose.to_dict() for dose in self.doses],
        }

    @classmethod
    def from_dict(cls, name: str, known: Mapping[str, Any]) -> "DoseResponse":
        """The response of the method `name` that `to_dict` wrote."""
        return cls(
            name=name,
            sites=tuple(map(Site.parse, known["sites"])),
            base=Arm.from_dict(known["base"]),
            doses=tuple(map(Dose.from_dict, known["doses"])),
            held_out=known["held_out"],
        )

    def summary(self) -> Summary:
        """What the method does at each strength, beside the unsteered model and the random vectors."""
        rows = [
            ArmRow(arm=dose.steered, controls=dose.random, reversed=dose.reversed, beyond=dose.beyond_random)
            for dose in self.doses
        ]
        return response_summary(self.name, self.base, rows, control=self.control_name, held_out=self.held_out)


def check_controls(n_controls: int) -> None:
    """Raise InputError for too few random controls."""
    if n_controls < 5:
        raise InputError(
            f"{n_controls} random controls are too few to say what chance does, and an effect is called one only beyond them: "
            "take at least 5, and fewer problems or strengths if that takes too long"
        )


def dose_response(
    experiment: SteeringExperiment,
    uses: Sequence[VectorUse],
    strengths: Sequence[float],
    *,
    name: str = "",
    n_controls: int = 5,
    states: Mapping[Site, NDArray[np.float32]] | None = None,
    beside: Callable[[], Condition] | None = None,
) -> DoseResponse:
    """Steer with a method at several strengths, with its reverse and with random vectors, and with the same seeds.

    All share one batch, unless an edit depends on the state, as a clamp does: then the random vectors wait for the run of the method, to
    move states as far as it did at that strength. If it moves states by a share of their norm, a random vector runs again until it
    moves them as far at every site, to 1 %.

    Args:
        experiment: The problems and seeds. The problems have to be others than the vectors were made from.
        uses: The vectors of the method, each with its scope and operator; all of them act together.
        strengths: The multipliers to try, not 0, which is the unsteered run.
        name: What tables call the method; by default as its first vector does.
        n_controls: Random controls per strength (`random_uses`), at least 5.
        states: (row, d_model) by site. If given, random vectors are drawn from the covariance of these states.
        beside: Makes what acts together with the vectors in every arm but the base, such as logits processors.

    Returns:
        Length, accuracy and side effects at each strength, with those of the reverse and of the random vectors.

    Raises:
        InputError: For a strength that is 0 or not finite, fewer than 5 controls, problems that a vector was made from, a vector that
            does not fit the model, or one that edits no token.

    Example:
        experiment = SteeringExperiment(model, held_out, sampling)
        uses = rs.steering.extract("seal", store, model, ids=ids_of_other_problems)
        response = dose_response(experiment, uses, [0.5, 1.0])
    """
    chosen = sorted(set(strengths))
    if not chosen or 0 in chosen or not np.isfinite(chosen).all():
        raise InputError(
            f"strengths {list(strengths)}: give finite numbers other than 0, which is always run as the base"
        )
    check_controls(n_controls)
    check_uses(uses, experiment.model)
    held_out = [_check_held_out(use.vector, experiment.problems) for use in uses]
    name = name or uses[0].vector.method
    condition = partial(_condition, beside or partial(Condition, name=""))
    real = [condition(name, uses, sign * strength) for strength in chosen for sign in (1, -1)]
    waiting = needs_a_run(uses)
    runs = experiment.run_all(real) if waiting else []
    moves = [run.moves[: len(uses)] for run in runs[::2]] or [()] * len(chosen)

    def drawn(seed: int, i: int, pilot: Moves) -> Condition:
        random = random_uses(uses, seed, states=states, moves=moves[i], pilot=pilot)
        return condition(f"random {seed + 1}", random, chosen[i])

    random = [partial(drawn, seed, i) for i in range(len(chosen)) for seed in range(n_controls)]
    if waiting:
        again = _AGAIN if any(map(is_a_share, uses)) else 0
        runs += run_controls(experiment, random, [one for one in runs[::2] for _ in range(n_controls)], again=again)
    else:
        runs = experiment.run_all([*real, *(one(()) for one in random)])
    doses = []
    for i, strength in enumerate(chosen):
        steered, back = runs[2 * i : 2 * i + 2]
        start = len(real) + i * n_controls
        controls = runs[start : start + n_controls]
        doses.append(
            Dose(
                strength=strength,
                steered=experiment.arm(name, strength, steered),
                reversed=experiment.arm(f"{name} reversed", -strength, back),
                random=tuple(experiment.arm(f"random {j + 1}", strength, run) for j, run in enumerate(controls)),
                excess=experiment.differences(steered, controls),
            )
        )
    return DoseResponse(
        name=name,
        sites=tuple(site for use in uses for site in use.vector.directions),
        base=experiment.base_arm,
        doses=tuple(doses),
        held_out=all(held_out),
    )


def run_controls(
    experiment: SteeringExperiment,
    controls: Sequence[Callable[[Moves], Condition]],
    real: Sequence[ArmMeasurements],
    *,
    again: int = _AGAIN,
) -> list[ArmMeasurements]:
    """Run each control, made from its `pilot` (see `random_uses`), beside its real run.

    A control that moves a token 1 % farther or less far at some site runs `again` with its own moves as the pilot, so many times at most.
    """
    runs = experiment.run_all([one(()) for one in controls])
    for _ in range(again):
        off = [i for i, run in enumerate(runs) if not _as_far(run, real[i])]
        if not off:
            break
        for i, run in zip(off, experiment.run_all([controls[i](runs[i].moves) for i in off]), strict=True):
            runs[i] = run
    return runs


def _as_far(control: ArmMeasurements, real: ArmMeasurements) -> bool:
    """Whether a control moved a token as far as the real edit did at every site, to a hundredth."""
    return all(np.isclose(control.distances[site], moved, rtol=0.01) for site, moved in real.distances.items())


def _condition(beside: Callable[[], Condition], name: str, uses: Sequence[VectorUse], multiplier: float) -> Condition:
    steering, other = as_intervention(uses, multiplier), beside()
    both = steering if other.intervention is None else Composed(steering, other.intervention)
    return replace(other, name=f"{name} at {multiplier:g}", multiplier=multiplier, intervention=both)


def _check_held_out(vector: SteeringVector, problems: Sequence[Problem]) -> bool:
    """Whether the vector says which problems it was made from. Raises InputError if it was made from any of these."""
    if "groups" not in vector.provenance:
        return False
    if seen := sorted({problem.group for problem in problems} & set(vector.provenance["groups"])):
        raise InputError(
            f"the vector was made from {len(seen)} of these problems ({seen[0]!r} …); judge it on other problems"
        )
    return not vector.provenance.get("groups_incomplete", False)
