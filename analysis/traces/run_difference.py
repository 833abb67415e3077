"""How two runs differ on their common traces: the mean difference, its interval over problems, and what exchanging
the runs gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import difference_estimate


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Means `ours` and `theirs` over `n` traces of `n_groups` problems, and `difference` = ours − theirs.

    `interval`: 95 % over whole problems (`difference_estimate`); NaN for a single problem. `chance`: 95 % of the
    differences when the two runs are exchanged problem by problem at random.
    """

    ours: float
    theirs: float
    difference: float
    interval: tuple[float, float]
    chance: tuple[float, float]
    n: int
    n_groups: int


def paired_difference(
    ours: Values,
    theirs: Values,
    groups: Sequence[str],
    *,
    verdicts: bool = False,
    n_resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """The difference between two runs in a number per trace (trace,), given for the same traces in the same order;
    `groups` are their problems.

    `verdicts`: the number is 0 or 1. Raises InputError for no traces and for different lengths.
    """
    if not len(ours) or len(ours) != len(theirs) or len(ours) != len(groups):
        raise InputError(
            f"{len(ours)} and {len(theirs)} traces, {len(groups)} groups; give equally many, and at least one"
        )
    _, place = np.unique(list(groups), return_inverse=True)
    change = np.bincount(place, weights=ours - theirs)
    counts = np.bincount(place).astype(np.float64)
    rng = np.random.default_rng(seed)
    exchanged = rng.choice([-1.0, 1.0], size=(n_resamples, len(change))) @ change / counts.sum()
    found = (
        difference_estimate(ours, theirs, verdicts=verdicts, groups=groups).interval
        if len(change) > 1
        else (np.nan, np.nan)
    )
    low, high = np.quantile(exchanged, [0.025, 0.975])
    return PairedDifference(
        ours=float(ours.mean()),
        theirs=float(theirs.mean()),
        difference=float(change.sum() / counts.sum()),
        interval=found,
        chance=(float(low), float(high)),
        n=len(ours),
        n_groups=len(change),
    )
