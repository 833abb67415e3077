"""Held-out evaluation: predictions from folds that keep a problem together, and intervals that resample whole problems."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import GridSearchCV, GroupKFold

from reasonscope.data.errors import InputError

Values = NDArray[np.float64]
# (targets, predictions) of some rows to one number.
Metric = Callable[[Values, Values], float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with the `low` and `high` end of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high


def spearman(targets: Values, predictions: Values) -> float:
    """Rank correlation; 0 where either side is constant, since a constant orders nothing."""
    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(spearmanr(targets, predictions).statistic)


def grouped_predictions(
    estimator: BaseEstimator,
    features: NDArray[np.generic],
    targets: Values,
    groups: Sequence[str],
    *,
    grid: dict[str, list[object]] | None = None,
    folds: int = 5,
) -> Values:
    """Predict each row from a fit on the folds that hold no row of its group: (row,).

    `features` (row, …) may be an object array of texts for a pipeline that reads texts. What `grid` names (a penalty, a layer) is
    chosen by grouped folds within the training part of each fold, so no choice ever saw the row that it predicts. Raises InputError
    for fewer groups than folds or features that are not finite.
    """
    labels = np.asarray(groups)
    if len(np.unique(labels)) < folds:
        raise InputError(
            f"{len(np.unique(labels))} groups for {folds} folds; record more problems or ask for fewer folds"
        )
    if features.dtype.kind == "f" and not np.isfinite(features).all():
        raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")
    predictions = np.full(len(targets), np.nan)
    for train, test in GroupKFold(folds, shuffle=True, random_state=0).split(features, targets, labels):
        fitted = clone(estimator)
        if grid is not None:
            inner = GroupKFold(min(folds, len(np.unique(labels[train]))))
            search = GridSearchCV(fitted, grid, cv=inner, scoring="neg_mean_squared_error")
            fitted = search.fit(features[train], targets[train], groups=labels[train]).best_estimator_
        else:
            fitted.fit(features[train], targets[train])
        predictions[test] = fitted.predict(features[test])
    return predictions


def cluster_bootstrap(
    metric: Metric, targets: Values, predictions: Values, groups: Sequence[str], *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """`metric` with a percentile interval over `draws` resamples of whole groups: rows of one problem are not independent."""
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(labels == group) for group in range(labels.max() + 1)]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = np.concatenate([members[group] for group in rng.integers(len(members), size=len(members))])
        values.append(metric(targets[rows], predictions[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value=metric(targets, predictions), low=float(low), high=float(high))
