"""What the features of a baseline predict: a linear model, in the folds of the probe and with a penalty chosen as the probe's is."""

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

import numpy as np
import torch
from scipy.sparse import csc_array
from scipy.special import expit
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from torch import Tensor

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.progress import tracked
from reasonscope.probes.evaluation.baselines import Features
from reasonscope.probes.evaluation.grouped_folds import Fold, Task, grouped_folds, nested_folds
from reasonscope.probes.fitting.sweep import BLOCK_BYTES, SOLVERS, mean_losses, sweep

_PENALTIES: Mapping[Task, Sequence[float]] = {
    "regression": (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0),
    "binary": (0.01, 0.1, 1.0, 10.0, 100.0),
}


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
    plan = nested_folds(targets, groups, task=task, folds=folds, seed=seed)
    every = [fold for nested in plan for fold in (nested.outer, *nested.inner)]
    truth = torch.from_numpy(targets.astype(np.float64))
    values = _values_of_texts(texts, truth, every, task)
    predictions = np.empty(len(targets))
    for nested in plan:
        outer = next(values)
        losses = torch.stack([mean_losses(next(values), truth[fold.test], task) for fold in nested.inner]).mean(0)
        predictions[nested.outer.test] = outer[losses.argmin()].numpy()
    return np.asarray(expit(predictions)) if task == "binary" else predictions


def _values_of_texts(texts: Features, targets: Tensor, folds: Sequence[Fold], task: Task) -> Iterator[Tensor]:
    """Decision values of each fold's test rows at every penalty, (penalty, test row); words are counted once for all folds."""
    counts = CountVectorizer(token_pattern=r"\w+").fit_transform(texts).tocsc()
    step = max(1, BLOCK_BYTES // (8 * counts.shape[0] * counts.shape[1]))
    for start in range(0, len(folds), step):
        block = folds[start : start + step]
        states = torch.zeros(len(block), *counts.shape, dtype=torch.float64)
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        for own, rows, fold in zip(states, mask, block, strict=True):
            weighted = _weighted(counts, fold.train)
            own[:, : weighted.shape[1]] = torch.from_numpy(weighted)
            rows[fold.train] = True
        path = SOLVERS[task](states, targets, _PENALTIES[task], mask)
        for own, fold, coef, intercept in zip(states, block, *path, strict=True):
            yield coef @ own[fold.test].mT + intercept[:, None]


def _weighted(counts: csc_array, train: Rows) -> Values:
    """TF-IDF of each text (row, word), from the words of the training rows and their frequencies there."""
    known = counts[:, np.diff(counts[train].tocsc().indptr) > 0].tocsr()
    weights: Values = TfidfTransformer(sublinear_tf=True).fit(known[train]).transform(known).toarray()
    return weights


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
