"""Lengths that the token limit cut off: longer than what was counted, by an unknown amount (right-censored)."""

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
    """Harrell's C: the share of pairs of known order that `predictions` order correctly; tied predictions count half.

    The order of two lengths is known if the shorter was not `truncated`, or if one was not and both counts are equal (the truncated one
    is longer). 0.5 is chance, and without truncation C is (Somers' D + 1) / 2. NaN if the order of no pair is known. It equals
    scikit-survival's `concordance_index_censored` with minus the prediction as the risk and a tie tolerance of 0.
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
    chosen: Sequence[int],
    penalty: float = 1.0,
    seed: int = 0,
) -> Values:
    """Held-out lengths (row,), in tokens, by an accelerated failure time model: log(1 + tokens) linear in `features` (row, site, d_model).

    Each of the folds reads the site that was `chosen` on its own training part: a site chosen on all rows has seen those that are judged.
    The loss is the squared error; a truncated row contributes only as far as the prediction is below its count (scikit-survival's
    `FastSurvivalSVM` with a rank ratio of 0; Van Belle et al. 2011). Weighting by the probability of censoring would not work: all
    traces are cut at the same limit, so none represents the longest. `penalty` applies to ‖w‖² on standardised features. Raises
    MissingExtraError without the extra `survival`, InputError for features that are not finite or a fold with truncated rows only.
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
    for fold, site in zip(grouped_folds(tokens, groups, folds=len(chosen), seed=seed), chosen, strict=True):
        states = features[:, site].astype(np.float64)
        if truncated[fold.train].all():
            raise InputError(
                "every trace of a training part was cut off at the token limit; record again with a larger --max-new-tokens"
            )
        scaler = StandardScaler().fit(states[fold.train])
        # This alpha is the weight of the errors, not of the coefficients.
        model = FastSurvivalSVM(alpha=1 / penalty, rank_ratio=0.0, fit_intercept=True, max_iter=200, random_state=seed)
        model.fit(scaler.transform(states[fold.train]), observed[fold.train])
        predictions[fold.test] = model.predict(scaler.transform(states[fold.test])) - 1
    return predictions
