"""How good held-out predictions are, as one number: discrimination and calibration of probabilities, fit and order of quantities.

Every metric takes (targets, predictions), each (row,); those in `BINARY` take labels 0 or 1 and probabilities. A metric that is
undefined on its rows (one class only) is NaN, which `cluster_bootstrap` leaves out of an interval and refuses as a value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.ranks import auroc, spearman
from reasonscope.probes.evaluation.grouped_folds import Metric, mean_log_loss

_TINY = np.finfo(np.float64).eps


def _pr_auc(targets: Values, scores: Values) -> float:
    """Average precision of class 1 (chance is its share). Takes any scores."""
    if not _both(targets):
        return float("nan")
    hits, caught = _by_threshold(targets, scores)
    return float((np.diff(hits, prepend=0) * hits / caught).sum() / hits[-1])


def _balanced_accuracy(targets: Values, probabilities: Values) -> float:
    """Mean recall of the two classes, if a probability of one half or more means class 1."""
    if not _both(targets):
        return float("nan")
    right = (_probabilities(probabilities) >= 0.5) == targets
    return float((right[targets == 1].mean() + right[targets == 0].mean()) / 2)


def _log_loss(targets: Values, probabilities: Values) -> float:
    """Mean negative log-likelihood, in nats; lower is better."""
    return mean_log_loss(targets, _probabilities(probabilities))


def _brier(targets: Values, probabilities: Values) -> float:
    """Mean squared error of the probabilities; lower is better."""
    return float(np.mean((_probabilities(probabilities) - targets) ** 2))


def _calibration_error(targets: Values, probabilities: Values, *, bins: int = 10) -> float:
    """Expected calibration error over `bins` of equal mass: |mean label − mean probability|, weighted by rows; lower is better.

    Rows are sorted and cut into bins, so the top bin is closed and a probability of 1 is counted (half-open bins drop it); equal
    probabilities stay in one bin. It is biased upwards by about sqrt(bins / rows) even if the calibration is perfect.
    """
    found = reliability(targets, probabilities, bins=bins)
    return float(np.abs((found.share - found.predicted) * found.n).sum() / len(targets))


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What probabilities promise and what comes of it, by bins of equal mass.

    Attributes:
        predicted: Mean probability of the rows of each bin, (bin,).
        share: Share of class 1 among them, (bin,).
        n: Their number, (bin,).
    """

    predicted: Values
    share: Values
    n: Values


def reliability(targets: Values, probabilities: Values, *, bins: int = 10) -> Reliability:
    """Cut the sorted rows into at most `bins` bins of equal mass; equal probabilities stay in one bin."""
    values, inverse, counts = np.unique(_probabilities(probabilities), return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    bin_of = np.floor(middle / len(targets) * bins).astype(int)[inverse]
    sizes = np.bincount(bin_of)
    sums = [np.bincount(bin_of, weights=weights)[sizes > 0] for weights in (values[inverse], targets)]
    n = sizes[sizes > 0].astype(np.float64)
    return Reliability(predicted=sums[0] / n, share=sums[1] / n, n=n)


def _tpr_at_fpr(targets: Values, scores: Values, *, fpr: float = 0.01) -> float:
    """The largest share of class 1 that a threshold catches while it catches at most `fpr` of class 0. Takes any scores.

    Nothing is interpolated: with fewer than 1 / `fpr` rows of class 0, none of them may be caught.
    """
    if not _both(targets):
        return float("nan")
    hits, caught = _by_threshold(targets, scores)
    false = (caught - hits) / (caught[-1] - hits[-1])
    return float(hits[false <= fpr].max(initial=0) / hits[-1])


def _by_threshold(targets: Values, scores: Values) -> tuple[Values, Values]:
    """Rows of class 1, and all rows, that score at least each of the different scores, the highest first: (threshold,).

    What scikit-learn's curves are made of: bootstraps ask for thousands of them, and its checks take several times as long.
    """
    order = (-scores).argsort(kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    hits = np.cumsum(targets[order] == 1)[ends]
    return hits.astype(np.float64), (ends + 1).astype(np.float64)


def r2(targets: Values, predictions: Values) -> float:
    """1 − squared error / squared error of the targets' mean; below 0 if the mean predicts better."""
    if not np.ptp(targets):
        return float("nan")
    return float(1 - np.sum((targets - predictions) ** 2) / np.sum((targets - targets.mean()) ** 2))


def r2_log(targets: Values, predictions: Values) -> float:
    """`r2` on log(1 + tokens); targets and predictions are given in tokens."""
    return r2(np.log1p(targets), np.log1p(predictions))


def spearman_within(targets: Values, predictions: Values, strata: Sequence[object]) -> float:
    """Rank correlation inside each stratum (a data set, a difficulty), averaged with the weight rows − 1.

    A stratum of fewer than three rows or of equal targets orders nothing and is left out; NaN if no stratum is left.
    """
    _, stratum = np.unique(np.asarray(strata), return_inverse=True)
    inside = [np.flatnonzero(stratum == index) for index in range(stratum.max() + 1)]
    kept = [rows for rows in inside if len(rows) >= 3 and np.ptp(targets[rows]) > 0]
    if not kept:
        return float("nan")
    scores = [spearman(targets[rows], predictions[rows]) for rows in kept]
    return float(np.average(scores, weights=[len(rows) - 1 for rows in kept]))


BINARY: Mapping[str, Metric] = {
    "auroc": auroc,
    "pr_auc": _pr_auc,
    "balanced_accuracy": _balanced_accuracy,
    "log_loss": _log_loss,
    "brier": _brier,
    "calibration_error": _calibration_error,
    "tpr_at_1_fpr": _tpr_at_fpr,
}
TOKENS: Mapping[str, Metric] = {"spearman": spearman, "r2_log": r2_log, "r2": r2}


def _both(targets: Values) -> bool:
    return bool(np.ptp(targets) > 0)


def _probabilities(values: Values) -> Values:
    if values.size and not (values.min() >= -_TINY and values.max() <= 1 + _TINY):
        raise InputError(
            f"probabilities from {values.min():.3g} to {values.max():.3g}; they have to be between 0 and 1, "
            "so pass LinearProbe.probabilities instead of its scores"
        )
    return np.clip(values, 0, 1)
