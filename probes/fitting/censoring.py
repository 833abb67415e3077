"""Lengths that the token limit cut off: longer than what was counted, nobody knows by how much (right-censored)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError, MissingExtraError
from reasonscope.probes.evaluation.grouped_folds import check_finite, grouped_folds

Mask = NDArray[np.bool_]


def concordance_index(tokens: Values, truncated: Mask, predictions: Values) -> float:
    """Harrell's C: of the pairs whose order is known, the share that `predictions` order rightly; ties of these count half.

    Of two lengths the order is known if the shorter was not `truncated`, or if one was not and both counts are equal (the truncated
    one is longer). 0.5 is chance; with nothing truncated, (Somers' D + 1) / 2. NaN where no pair's order is known. Equal to
    scikit-survival's `concordance_index_censored` with minus the prediction as risk and a tie tolerance of 0.
    """
    ended = ~truncated
    shorter = ended[:, None] & ((tokens[:, None] < tokens) | ((tokens[:, None] == tokens) & truncated))
    if not (pairs := int(shorter.sum())):
        return float("nan")
    ordered = np.sign(predictions - predictions[:, None])[shorter]
    return float((ordered.sum() / pairs + 1) / 2)


def aft_predictions(
    features: NDArray[np.floating[Any]],
    tokens: Values,
    truncated: Mask,
    groups: Sequence[str],
    *,
    penalty: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> Values:
    """Held-out lengths (row,), in tokens, by an accelerated failure time model: log(1 + tokens) linear in `features` (row, d_model).

    Squared error, and for a truncated row only as far as the prediction is below its count (scikit-survival's `FastSurvivalSVM`
    with a rank ratio of 0; Van Belle et al. 2011). Weighting by the probability of censoring would not do: all are cut at one limit,
    so nobody stands for the longest. `penalty` is of ‖w‖² on standardised features. Raises MissingExtraError without the extra
    `survival`, InputError for features that are not finite or a fold in which everything is truncated.
    """
    try:
        from sksurv.svm import FastSurvivalSVM
    except ImportError as error:
        raise MissingExtraError(
            "a model of censored lengths needs the extra survival: pip install 'reasonscope[survival]'"
        ) from error
    check_finite(features)
    observed = np.empty(len(tokens), dtype=[("ended", bool), ("tokens", np.float64)])
    observed["ended"], observed["tokens"] = ~truncated, tokens + 1
    predictions = np.full(len(tokens), np.nan)
    for fold in grouped_folds(tokens, groups, folds=folds, seed=seed):
        if truncated[fold.train].all():
            raise InputError("every trace of a training part is truncated; raise max_new_tokens and record again")
        scaler = StandardScaler().fit(features[fold.train].astype(np.float64))
        # Its alpha weighs the errors, not the coefficients.
        model = FastSurvivalSVM(alpha=1 / penalty, rank_ratio=0.0, fit_intercept=True, max_iter=200, random_state=seed)
        model.fit(scaler.transform(features[fold.train]), observed[fold.train])
        predictions[fold.test] = model.predict(scaler.transform(features[fold.test])) - 1
    return predictions
