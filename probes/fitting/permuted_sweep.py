"""How well would the whole search have done on labels that mean nothing? Layer, position and penalty are chosen again for each shuffle.

Shuffling labels at the layer that was chosen on the real ones is not a null for a score that was searched for: on pure noise at 8 layers
it calls 12 of 40 runs significant at .05. Here every shuffle goes through the whole nested search. It is affordable because a ridge fit
factorises the features once and then serves any number of targets.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.intervals import permutation_p
from reasonscope.data.ranks import auroc, spearman
from reasonscope.probes.evaluation.grouped_folds import NestedFold, Task, check_finite, nested_folds
from reasonscope.probes.evaluation.permutation_null import Null, shuffled_targets
from reasonscope.probes.fitting.sweep import PENALTIES

N_PERMUTATIONS = 199  # the smallest p-value is 1 in 200

# Held-out loss summed over folds, and held-out predictions: (penalty, target) and (penalty, row, target).
_Judged = tuple[Tensor, Tensor]


def permuted_sweep(
    features: NDArray[np.floating],
    targets: Values,
    groups: Sequence[str],
    *,
    task: Task,
    within: bool = False,
    n_permutations: int = N_PERMUTATIONS,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Null:
    """Score the nested sweep of a least-squares probe on the true targets and on shuffled ones.

    Args:
        features: (row, layer, position, d_model), as `sweep` takes them.
        targets: (row,) quantities, or labels 0 and 1.
        groups: Rows of one group stay together in folds and shuffles.
        task: "regression" scores Spearman's correlation, "binary" AUROC, of the held-out predictions.
        within: Shuffle inside each group instead of between groups.
        n_permutations: Shuffles; the smallest p-value is 1 / (n_permutations + 1).
        penalties: Ridge penalties to choose from.
        folds: Outer and inner folds; they do not look at the targets, so that true and shuffled ones are exchangeable.
        seed: Seed of the folds and the shuffles.
        progress: Called with the cells (a layer at a position) done and their number.

    Returns:
        The observed score among those of the shuffles. Departure for labels: ridge on 0 and 1 replaces logistic regression, in
        the observed score as in the shuffled ones.

    Raises:
        InputError: No shuffle changes a target, or the features are not finite.
    """
    check_finite(features)
    shuffled = shuffled_targets(targets, groups, within=within, n_permutations=n_permutations, seed=seed)
    every = torch.from_numpy(np.stack([targets, *shuffled], axis=1).astype(np.float64))  # (row, target)
    plan = nested_folds(np.arange(len(targets), dtype=np.float64), groups, folds=folds, seed=seed)
    cells = features.transpose(1, 2, 0, 3).reshape(-1, len(targets), features.shape[-1])
    found: list[tuple[Tensor, Tensor]] = []
    for i, cell in enumerate(cells):
        found.append(_nested(torch.from_numpy(np.array(cell, dtype=np.float64)), every, plan, penalties))
        progress(i + 1, len(cells))
    losses, predictions = (torch.stack(parts) for parts in zip(*found, strict=True))
    chosen = losses.argmin(dim=0)  # (fold, target), the cell
    scores = [_score(_gathered(predictions, chosen, plan, k), every[:, k].numpy(), task) for k in range(every.shape[1])]
    null = np.array(scores[1:])
    return Null(observed=scores[0], null=null, p_value=float(permutation_p(scores[0], null)))


def _score(predicted: Values, targets: Values, task: Task) -> float:
    return spearman(targets, predicted) if task == "regression" else auroc(targets, predicted)


def _gathered(predictions: Tensor, chosen: Tensor, plan: Sequence[NestedFold], target: int) -> Values:
    """Held-out predictions (row,) of one target, each fold's by the cell that its training rows chose."""
    found = np.empty(predictions.shape[1])
    for index, nested in enumerate(plan):
        test = nested.outer.test
        found[test] = predictions[chosen[index, target], test, target].numpy()
    return found


def _nested(
    states: Tensor, targets: Tensor, plan: Sequence[NestedFold], penalties: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The inner loss of a cell's best penalty (fold, target), and the held-out predictions with it (row, target)."""
    alphas = torch.tensor(penalties, dtype=torch.float64)
    losses = torch.empty(len(plan), targets.shape[1], dtype=torch.float64)
    predictions = torch.empty(targets.shape, dtype=torch.float64)
    for index, nested in enumerate(plan):
        inner = sum(
            (_predicted(states, targets, fold.train, fold.test, alphas) - targets[fold.test]).square().mean(dim=1)
            for fold in nested.inner
        )
        assert isinstance(inner, Tensor)
        losses[index], best = inner.min(dim=0)  # over penalties
        outer = _predicted(states, targets, nested.outer.train, nested.outer.test, alphas)
        predictions[nested.outer.test] = outer.gather(0, best.expand(1, outer.shape[1], -1))[0]
    return losses, predictions


def _predicted(states: Tensor, targets: Tensor, train: Rows, test: Rows, alphas: Tensor) -> Tensor:
    """Ridge predictions (penalty, test row, target) from one factorisation of the standardised training rows."""
    own, mean = states[train], targets[train].mean(dim=0)
    centre, scale = own.mean(dim=0), own.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-12 * (1 + centre.abs()), scale, 1.0)
    own, held, y = (own - centre) / scale, (states[test] - centre) / scale, targets[train] - mean
    if own.shape[0] <= own.shape[1]:
        values, vectors = torch.linalg.eigh(own @ own.T)
        left, right = (held @ own.T) @ vectors, vectors.T @ y
    else:
        values, vectors = torch.linalg.eigh(own.T @ own)
        left, right = held @ vectors, vectors.T @ (own.T @ y)
    shrunk = left / (values.clamp(min=0) + alphas[:, None])[:, None]  # (penalty, test row, direction)
    predicted: Tensor = shrunk @ right + mean
    return predicted
