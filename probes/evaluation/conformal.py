"""How wrong a prediction can be: intervals from held-out residuals, problems counted and not rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ResidualBand:
    """What is to be added to a prediction for the ends of an interval that covers a share `coverage` of new problems."""

    low: float
    high: float
    coverage: float


def residual_band(
    residuals: Values, truncated: NDArray[np.bool_], groups: Sequence[str], *, coverage: float = 0.9
) -> ResidualBand:
    """Quantiles of held-out residuals (true − predicted), split conformal with groups (Dunn, Wasserman & Ramdas 2022, pooled).

    Every group weighs the same, its rows share its weight, and one group's weight lies at infinity for the new problem. The residual
    of a `truncated` row is only known to be at least what was counted: infinite above. So an end is infinite where there are too few
    groups (fewer than 2 / (1 − coverage) − 1) or too many truncated rows to know better. Raises InputError for a coverage outside (0, 1).
    """
    if not 0 < coverage < 1:
        raise InputError(f"coverage {coverage}; it has to be between 0 and 1, as 0.9")
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    weights = 1 / (sizes[group_of] * (len(sizes) + 1))
    level = 1 - (1 - coverage) / 2
    return ResidualBand(
        low=-_quantile(-residuals, weights, level),
        high=_quantile(np.where(truncated, np.inf, residuals), weights, level),
        coverage=coverage,
    )


def _quantile(values: Values, weights: Values, level: float) -> float:
    """The smallest value with at least `level` of the weight at or below it; what the weights lack to 1 lies at infinity."""
    order = np.argsort(values)
    enough = np.flatnonzero(np.cumsum(weights[order]) >= level - 1e-12)
    return float(values[order][enough[0]]) if len(enough) else float("inf")
