"""How wrong can a prediction be? Intervals from held-out residuals, in which every problem has the same weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ResidualBand:
    """The interval around a prediction that covers new problems.

    Attributes:
        low: What to add to a prediction for the lower end.
        high: What to add for the upper end.
        coverage: Share of new problems that the interval covers.
    """

    low: float
    high: float
    coverage: float


def residual_band(
    residuals: Values, truncated: NDArray[np.bool_], groups: Sequence[str], *, coverage: float = 0.9
) -> ResidualBand:
    """Quantiles of held-out residuals (true − predicted), split conformal with groups (Dunn, Wasserman & Ramdas 2022, pooled).

    Every group has the same weight, which its rows share, and the weight of one group lies at infinity for the new problem. The
    residual of a `truncated` row is at least what was counted, so it counts as infinite above. An end is infinite if there are too few
    groups (fewer than 2 / (1 − coverage) − 1) or too many truncated rows. Raises InputError for a coverage outside (0, 1).
    """
    if not 0 < coverage < 1:
        raise InputError(f"coverage {coverage} has to be between 0 and 1, such as 0.9")
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    weights = 1 / (sizes[group_of] * (len(sizes) + 1))
    level = 1 - (1 - coverage) / 2
    return ResidualBand(
        low=-_quantile(-residuals, weights, level),
        high=_quantile(np.where(truncated, np.inf, residuals), weights, level),
        coverage=coverage,
    )


def alarm_threshold(highest: Values, groups: Sequence[str], *, false_alarms: float) -> float:
    """The threshold that at most a share `false_alarms` of new problems exceeds, from the `highest` score of traces without cause.

    Split conformal with groups, as in `residual_band`: a new problem, exchangeable with these, lies above it with at most this
    probability. Raises InputError for a share outside (0, 1), or if there are fewer than 1 / `false_alarms` − 1 groups.
    """
    if not 0 < false_alarms < 1:
        raise InputError(f"false alarms in {false_alarms} of problems: give a share between 0 and 1, such as 0.05")
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    weights = 1 / (sizes[group_of] * (len(sizes) + 1)) if len(sizes) else np.zeros(0)
    threshold = _quantile(highest, weights, 1 - false_alarms)
    if not np.isfinite(threshold):
        raise InputError(
            f"{len(sizes)} groups of problems cannot bound false alarms at {false_alarms:g}; "
            f"calibrate on {int(np.ceil(1 / false_alarms - 1 - 1e-9))} or more, or allow more false alarms"
        )
    return threshold


def _quantile(values: Values, weights: Values, level: float) -> float:
    """The smallest value with at least `level` of the weight at or below it; the weight that is missing to 1 lies at infinity."""
    order = np.argsort(values)
    enough = np.flatnonzero(np.cumsum(weights[order]) >= level - 1e-12)
    return float(values[order][enough[0]]) if len(enough) else float("inf")
