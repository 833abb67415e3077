"""Which layer and position know it? All of them are fitted at once, and every choice is made inside the training part of a fold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import softplus

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.ranks import auroc, spearman
from reasonscope.probes.evaluation.grouped_folds import (
    Fold,
    Metric,
    NestedFold,
    Task,
    check_finite,
    direction_cosines,
    nested_folds,
)
from reasonscope.probes.fitting.solvers import logistic_path, ridge_path

PENALTIES: tuple[float, ...] = tuple(float(penalty) for penalty in 10.0 ** np.arange(-2, 7))
BLOCK_BYTES = 2**28  # of coefficients in memory at a time; if there are more cells than fit, they are taken in turn
SOLVERS = {"regression": ridge_path, "binary": logistic_path}
_METRICS: dict[Task, Metric] = {"regression": spearman, "binary": auroc}


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What the inner folds chose: the index of the layer and of the position in the features, and the penalty."""

    layer: int
    position: int
    penalty: float


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A nested sweep over layers, positions and penalties.

    Attributes:
        task: "regression" or "binary".
        folds: The outer folds.
        predictions: Held-out predictions, (row,), each by the layer, position and penalty that its training rows chose; in the units of
            the targets, or for a binary task the probability of class 1.
        chosen: The choice of each fold, (fold,).
        scores: Spearman or AUROC of each cell on the held-out rows of each fold, (fold, layer, position), with only the penalty chosen
            inside; NaN if these rows are of one class. It is for a heat map: its maximum over cells is biased upwards, `predictions` are
            not.
        cosines: Mean cosine between the directions of a cell in different folds, (layer, position); NaN if one is 0.
        final: The choice on all rows.
        coef: The probe fitted with it on all rows, (d_model,).
        intercept: Its intercept.
    """

    task: Task
    folds: tuple[Fold, ...]
    predictions: Values
    chosen: tuple[LayerChoice, ...]
    scores: Values
    cosines: Values
    final: LayerChoice
    coef: Values
    intercept: float


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """Some cells (a layer at a position), at the best penalty of each in each of n outer folds, and last on all rows.

    Attributes:
        penalty: Index of the best penalty, (n + 1, cell).
        loss: Its inner loss, (n + 1, cell).
        coef: The fit with it, (n + 1, cell, d_model).
        intercept: Its intercept, (n + 1, cell).
        heldout: Decision values by the outer fit whose fold holds the row out, (cell, row).
    """

    penalty: NDArray[np.intp]
    loss: Values
    coef: Values
    intercept: Values
    heldout: Values


def sweep(
    features: NDArray[np.floating],
    targets: Values,
    groups: Sequence[str],
    *,
    task: Task,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
    standardise: bool = True,
    device: torch.device | str | None = None,
) -> SweepResult:
    """Fit and judge a probe at every layer and position by nested folds that keep groups whole.

    It is ridge on quantities and logistic regression on labels 0 and 1. Layer, position and penalty are those with the least loss
    (squared error, log-loss) on the inner folds.

    Args:
        features: (row, layer, position, d_model).
        targets: (row,).
        groups: The group of each row.
        task: "regression" or "binary".
        penalties: An `alpha`, or a 1 / C, as `ridge_path` and `logistic_path` take them.
        folds: Number of outer folds, and at most of inner folds.
        seed: Seed of the folds.
        standardise: Scale features by the standard deviation of the training rows.
        device: The device that solves; by default the CPU.

    Raises:
        InputError: Features are not finite or of another shape, there are fewer groups than folds, or a class is in too few groups.
    """
    if features.ndim != 4 or len(features) != len(targets):
        raise InputError(
            f"features of shape {features.shape} for {len(targets)} targets; they have to be (row, layer, position, d_model)"
        )
    check_finite(features)
    n_rows, n_layers, n_positions, width = features.shape
    plan = nested_folds(targets, groups, task=task, folds=folds, seed=seed)
    cells = torch.from_numpy(np.ascontiguousarray(features.transpose(1, 2, 0, 3)).reshape(-1, n_rows, width))
    fits = len(_training_sets(plan, n_rows))
    step = max(1, BLOCK_BYTES // (8 * fits * len(penalties) * width))
    parts = [
        _fit(cells[start : start + step], torch.from_numpy(targets), plan, task, penalties, standardise, device)
        for start in range(0, len(cells), step)
    ]
    whole = _Cells(
        penalty=np.concatenate([part.penalty for part in parts], axis=1),
        loss=np.concatenate([part.loss for part in parts], axis=1),
        coef=np.concatenate([part.coef for part in parts], axis=1),
        intercept=np.concatenate([part.intercept for part in parts], axis=1),
        heldout=np.concatenate([part.heldout for part in parts]),
    )
    return _result(whole, targets, plan, task, penalties, (n_layers, n_positions))


def _fit(
    cells: Tensor,
    targets: Tensor,
    plan: Sequence[NestedFold],
    task: Task,
    penalties: Sequence[float],
    standardise: bool,
    device: torch.device | str | None,
) -> _Cells:
    mask = torch.stack(_training_sets(plan, len(targets))).expand(len(cells), -1, -1)
    path = SOLVERS[task](cells, targets, penalties, mask, standardise=standardise, device=device)
    coef, intercept = path.coef.cpu().movedim(1, 0), path.intercept.cpu().movedim(1, 0)
    n = len(plan)
    heldout = torch.empty(len(cells), len(penalties), len(targets), dtype=torch.float64)
    losses = torch.zeros(n + 1, len(cells), len(penalties), dtype=torch.float64)
    inner = iter(range(n + 1, len(coef)))
    for index, nested in enumerate(plan):
        test = nested.outer.test
        heldout[..., test] = _values(cells, test, coef[index], intercept[index])
        losses[n] += mean_losses(heldout[..., test], targets[test], task)
        for fold in nested.inner:
            fit = next(inner)
            losses[index] += mean_losses(_values(cells, fold.test, coef[fit], intercept[fit]), targets[fold.test], task)
    best = losses.argmin(dim=-1, keepdim=True)  # (n + 1, cell, 1)
    kept = torch.empty(len(cells), len(targets), dtype=torch.float64)
    for index, nested in enumerate(plan):
        test = nested.outer.test
        kept[:, test] = heldout[..., test].take_along_dim(best[index][..., None], dim=1)[:, 0]
    return _Cells(
        penalty=best[..., 0].numpy(),
        loss=losses.take_along_dim(best, dim=-1)[..., 0].numpy(),
        coef=coef[: n + 1].take_along_dim(best[..., None], dim=2)[:, :, 0].numpy(),
        intercept=intercept[: n + 1].take_along_dim(best, dim=2)[..., 0].numpy(),
        heldout=kept.numpy(),
    )


def _training_sets(plan: Sequence[NestedFold], n_rows: int) -> list[Tensor]:
    """Masks, true on the rows to fit on: of each outer fold, all rows, and each inner fold. Outer folds are the inner ones of all rows."""
    trains = [nested.outer.train for nested in plan] + [np.arange(n_rows)]
    trains += [fold.train for nested in plan for fold in nested.inner]
    masks = torch.zeros(len(trains), n_rows, dtype=torch.bool)
    for mask, train in zip(masks, trains, strict=True):
        mask[train] = True
    return list(masks)


def _values(cells: Tensor, rows: NDArray[np.intp], coef: Tensor, intercept: Tensor) -> Tensor:
    """Decision values (cell, penalty, row)."""
    return coef @ cells[:, rows].to(torch.float64).mT + intercept[..., None]


def mean_losses(values: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Mean loss over the rows of a fold, (cell, penalty): folds have equal weight, as in scikit-learn's searches."""
    if task == "regression":
        return (values - targets).square().mean(-1)
    return (softplus(values) - targets * values).mean(-1)


def _result(
    cells: _Cells,
    targets: Values,
    plan: Sequence[NestedFold],
    task: Task,
    penalties: Sequence[float],
    grid: tuple[int, int],
) -> SweepResult:
    chosen = cells.loss.argmin(axis=-1)  # (n + 1,)
    predictions = np.full(len(targets), np.nan)
    scores = np.full((len(plan), len(cells.heldout)), np.nan)
    for index, nested in enumerate(plan):
        held = cells.heldout[:, nested.outer.test]
        predictions[nested.outer.test] = held[chosen[index]]
        scores[index] = [_METRICS[task](targets[nested.outer.test], values) for values in held]
    choices = [
        LayerChoice(
            layer=int(cell) // grid[1], position=int(cell) % grid[1], penalty=penalties[cells.penalty[index, cell]]
        )
        for index, cell in enumerate(chosen)
    ]
    return SweepResult(
        task=task,
        folds=tuple(nested.outer for nested in plan),
        predictions=expit(predictions) if task == "binary" else predictions,
        chosen=tuple(choices[:-1]),
        scores=scores.reshape(-1, *grid),
        cosines=np.array([_mean_cosine(directions) for directions in cells.coef[:-1].swapaxes(0, 1)]).reshape(grid),
        final=choices[-1],
        coef=cells.coef[-1, chosen[-1]],
        intercept=float(cells.intercept[-1, chosen[-1]]),
    )


def _mean_cosine(directions: Values) -> float:
    if not np.linalg.norm(directions, axis=-1).all():
        return float("nan")
    return float(direction_cosines(directions)[np.triu_indices(len(directions), k=1)].mean())
