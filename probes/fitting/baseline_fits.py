"""What the features of a baseline predict: a linear model, in the folds of the probe and with a penalty chosen as the probe's is."""

from collections.abc import Mapping, Sequence
from operator import itemgetter

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline

from reasonscope.data.arrays import Values
from reasonscope.data.progress import tracked
from reasonscope.probes.backends.threads import blas_threads_for
from reasonscope.probes.evaluation.baselines import Features
from reasonscope.probes.evaluation.grouped_folds import Task, grouped_folds, grouped_predictions
from reasonscope.probes.fitting.sweep import sweep

_PENALTIES = {"regression": (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0), "binary": (0.01, 0.1, 1.0, 10.0, 100.0)}


def baseline_predictions(
    features: Features,
    targets: Values,
    groups: Sequence[str],
    *,
    task: Task = "regression",
    folds: int = 5,
    seed: int = 0,
) -> Values:
    """Held-out predictions (row,) from a baseline's features by a linear model, its penalty chosen inside the fold.

    Texts are weighted by TF-IDF and numbers are standardised inside the fold. Features that never vary predict the mean of the
    training part.
    """
    if features.ndim == 1:
        return _from_texts(features, targets, groups, task=task, folds=folds, seed=seed)
    if np.ptp(features, axis=0).any():
        one_cell = features[:, None, None].astype(np.float64)
        return sweep(
            one_cell, targets, groups, task=task, penalties=_PENALTIES[task], folds=folds, seed=seed
        ).predictions
    predictions = np.empty(len(targets))
    for fold in grouped_folds(targets, groups, task=task, folds=folds, seed=seed):
        predictions[fold.test] = targets[fold.train].mean()
    return predictions


def _from_texts(
    texts: Features, targets: Values, groups: Sequence[str], *, task: Task, folds: int, seed: int
) -> Values:
    grid: dict[str, list[object]] = (
        {"ridge__alpha": list(_PENALTIES[task])}
        if task == "regression"
        else {"logisticregression__C": [1 / penalty for penalty in reversed(_PENALTIES[task])]}
    )
    linear = Ridge() if task == "regression" else LogisticRegression(solver="newton-cholesky", max_iter=1000)
    estimator = make_pipeline(TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True), linear)
    with blas_threads_for(len(texts) ** 3):  # a vocabulary is about as large as there are texts, if they are short
        return grouped_predictions(estimator, texts, targets, groups, grid=grid, task=task, folds=folds, seed=seed)


def rank_predictions(
    baselines: Mapping[str, Features],
    targets: Values,
    groups: Sequence[str],
    *,
    task: Task = "regression",
    folds: int = 5,
    seed: int = 0,
) -> dict[str, Values]:
    """`baseline_predictions` of each of `baselines` for a metric of order, such as AUROC and Spearman.

    Features that never vary predict the same for all rows here, because the means of the training parts would order the folds, and
    the wrong way round: a fold with high targets leaves a low mean to the others.
    """
    return {
        name: baseline_predictions(features, targets, groups, task=task, folds=folds, seed=seed)
        if features.ndim == 1 or np.ptp(features, axis=0).any()
        else np.full(len(targets), targets.mean())
        for name, features in tracked(list(baselines.items()), "judging baselines", "baselines", name=itemgetter(0))
    }
