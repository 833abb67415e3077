"""What only the order of values says: ranks, rank correlation, and how well scores tell two classes apart."""

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values


def _ranks(values: Values) -> Values:
    """Ranks from 1 of `values` (row,), ties at their mean; NaN if any value is.

    scipy's `rankdata` for one row of numbers: bootstraps ask for thousands of short ones, and its checks take ten times as long.
    """
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    order = values.argsort(kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(values))
    found = np.empty(len(values))
    found[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return found


def spearman(targets: Values, predictions: Values) -> float:
    """Rank correlation; 0 if either side is constant, since a constant orders nothing."""
    left, right = (_ranks(values) - (len(values) + 1) / 2 for values in (targets, predictions))
    scale = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / scale) if scale else 0.0


def auroc(targets: Values | NDArray[np.bool_], scores: Values) -> float:
    """How often a row of class 1 outscores one of class 0; ties count half. Takes any scores.

    Computed from ranks (Mann and Whitney): the value of scikit-learn's `roc_auc_score`, some twenty times faster, which thousands of
    resamples need.
    """
    positive = targets == 1
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((_ranks(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))
