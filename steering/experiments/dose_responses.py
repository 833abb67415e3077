"""What steering does at each strength, beside what it is for and beside what random directions of the same norm do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.experiment import Arm, SteeringExperiment
from reasonscope.steering.vectors.application import VectorUse, as_intervention, check_uses
from reasonscope.steering.vectors.matched_controls import random_uses
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class Dose:
    """One strength: the vector, its reverse, and random vectors of its norm, each at that multiplier.

    `excess`: the arm `steered` less the mean of the arms `random`, paired by problem and seed.
    """

    strength: float
    steered: Arm
    reversed: Arm
    random: tuple[Arm, ...]
    excess: Mapping[str, Estimate]

    @property
    def beyond_random(self) -> bool:
        """Whether the change of thinking tokens is one that a random direction makes in at most 5 % of cases, and its excess over the
        random ones is not 0 on other problems.

        The first is Student's prediction interval for one more draw of k random changes, mean ± t √(1 + 1/k) sd: to lie outside of all
        of five happens to a random direction one time in three.
        """
        changes = np.array([arm.change.value for arm in self.random])
        k, excess = len(changes), self.excess["tokens"]
        reach = float(t.ppf(0.975, k - 1)) * np.sqrt(1 + 1 / k) * changes.std(ddof=1)
        outside = bool(abs(self.steered.change.value - changes.mean()) > reach)
        return outside and (excess.low > 0 or excess.high < 0)


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """`doses` in ascending order of strength; strength 0 is `base`. `held_out`: whether the vector says which problems it was made from
    (none of which is here), or does not say."""

    name: str
    sites: tuple[Site, ...]
    base: Arm
    doses: tuple[Dose, ...]
    held_out: bool

    null_name: ClassVar[str] = "random vectors"
    unit: ClassVar[str] = "below 0 the reverse"

    @property
    def curves(self) -> dict[str, tuple[Arm, ...]]:
        """Arms by ascending strength: the method's, and those of its reverse."""
        return {
            self.name: tuple(dose.steered for dose in self.doses),
            f"{self.name} reversed": tuple(dose.reversed for dose in self.doses),
        }

    @property
    def nulls(self) -> tuple[Arm, ...]:
        return tuple(arm for dose in self.doses for arm in dose.random)

    @property
    def arms(self) -> list[Arm]:
        """All arms, the unsteered first."""
        return [self.base, *(arm for dose in self.doses for arm in (dose.steered, dose.reversed, *dose.random))]


def dose_response(
    experiment: SteeringExperiment,
    parts: Sequence[VectorUse],
    strengths: Sequence[float],
    *,
    name: str = "",
    n_controls: int = 5,
    states: Mapping[Site, NDArray[np.float32]] | None = None,
) -> DoseResponse:
    """Steer the problems of `experiment` with all `parts` of a method at each of `strengths`, in reverse too, and with `n_controls` random
    vectors of the same norm, all of it in one batch; same seeds throughout.

    With `states` (row, d_model) by site the random vectors have their covariance. Raises InputError for a strength of 0 (it is there),
    for fewer than 5 nulls, for problems that the vector was made from, for a vector that does not fit, and where it touched no token.
    """
    chosen = sorted(set(strengths))
    if not chosen or 0 in chosen or not np.isfinite(chosen).all():
        raise InputError(
            f"strengths {list(strengths)}: give finite ones other than 0, which is always there as the base"
        )
    if n_controls < 5:
        raise InputError(f"{n_controls} random vectors; at least 5 are needed to say what chance does")
    check_uses(parts, experiment.model)
    held_out = [_check_held_out(part.vector, experiment.problems) for part in parts]
    name = name or parts[0].vector.method
    random_parts = [random_uses(parts, seed, states=states) for seed in range(n_controls)]
    drawn = [parts, *random_parts]
    names = [name, *(f"random {i + 1}" for i in range(n_controls))]
    wanted = {(0, sign * strength) for strength in chosen for sign in (1, -1)}
    wanted |= {(i + 1, strength) for strength in chosen for i in range(n_controls)}
    conditions = {
        (i, multiplier): Condition(
            name=f"{names[i]} at {multiplier:g}",
            multiplier=multiplier,
            intervention=as_intervention(drawn[i], multiplier),
        )
        for i, multiplier in sorted(wanted)
    }
    runs = dict(zip(conditions, experiment.run_all(list(conditions.values())), strict=True))
    doses = []
    for strength in chosen:
        random = [runs[i + 1, strength] for i in range(n_controls)]
        doses.append(
            Dose(
                strength=strength,
                steered=experiment.arm(name, strength, runs[0, strength]),
                reversed=experiment.arm(f"{name} reversed", -strength, runs[0, -strength]),
                random=tuple(experiment.arm(names[i + 1], strength, run) for i, run in enumerate(random)),
                excess=experiment.differences(runs[0, strength], random),
            )
        )
    return DoseResponse(
        name=name,
        sites=tuple(site for part in parts for site in part.vector.directions),
        base=experiment.base_arm,
        doses=tuple(doses),
        held_out=all(held_out),
    )


def _check_held_out(vector: SteeringVector, problems: Sequence[Problem]) -> bool:
    if "groups" not in vector.provenance:
        return False
    if seen := sorted({problem.group for problem in problems} & set(vector.provenance["groups"])):
        raise InputError(
            f"the vector was made from {len(seen)} of these problems ({seen[0]!r} …); judge it on problems that it was not made from"
        )
    return True
