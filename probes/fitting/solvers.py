"""Ridge and logistic regression for all layers, positions, folds and penalties in one call, in float64, on any torch device.

Three facts make it fast. The intercept is not penalised, so a shift of the features changes no coefficient: the inner products of the
rows are computed once per problem and serve every fold. The coefficients lie in the span of the training rows: if there are fewer rows
than features, everything is solved in the space of the rows, without a d_model × d_model matrix. And folds are independent: on the CPU
every core solves its own with one thread, which loses less time than cores that share a matrix. If they are small, a core solves many as
one batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.progress import working
from reasonscope.probes.backends.threads import (
    available_threads,
    blas_threads_for,
    one_thread_each,
    threads_for,
)
from reasonscope.probes.fitting.cholesky import bordered_solutions, gram
from reasonscope.probes.fitting.newton import ColumnSpace, RowSpace, newton_path

PROBLEMS_AT_A_TIME = 4  # for each core, if a batch does not hold more; this bounds the memory
# Of matrices in a batch: larger batches leave the caches of a core, and smaller ones leave a GPU idle.
BATCH_BYTES = {"cpu": 2**23, "cuda": 2**30}


class LinearPath(NamedTuple):
    """Coefficients of every problem (and fold, if the mask has folds) at every penalty, in the units of the features.

    `coef` (problem, [fold,] penalty, d_model) and `intercept` (problem, [fold,] penalty), float64.
    """

    coef: Tensor
    intercept: Tensor


def ridge_path(
    features: Tensor,
    targets: Tensor,
    penalties: Sequence[float],
    mask: Tensor | None = None,
    *,
    standardise: bool = False,
    device: torch.device | str | None = None,
) -> LinearPath:
    """Minimise Σ (target − w·x − b)² + penalty ‖w‖², as scikit-learn's `Ridge(alpha=penalty)` does.

    `features` are (problem, row, d_model), `targets` (row,) or (problem, row), and `mask` (problem, row) or (problem, fold, row) is True on
    training rows. With `standardise` the penalty is on features of unit deviation, and coefficients are in the units of the features all
    the same. Raises InputError for NaN, for shapes that do not fit, and for a penalty that is not above 0 or smaller than rounding.
    """
    return _path(_ridge, features, targets, penalties, mask, standardise, device)


def logistic_path(
    features: Tensor,
    targets: Tensor,
    penalties: Sequence[float],
    mask: Tensor | None = None,
    *,
    standardise: bool = False,
    device: torch.device | str | None = None,
) -> LinearPath:
    """Minimise Σ log-loss + penalty/2 ‖w‖², as scikit-learn's `LogisticRegression(C=1 / penalty)` does.

    Arguments are those of `ridge_path`, with `targets` 0 and 1. Damped Newton steps (iteratively reweighted least squares) go from the
    strongest penalty to the weakest, each starting where the last ones lead. Raises InputError also if a training set has one class only.
    """
    return _path(_logistic, features, targets, penalties, mask, standardise, device)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Centred and scaled features, and their inner products, which the folds share.

    Attributes:
        features: (row, d) float64, minus `centre` and divided by `scale`.
        centre: (d,).
        scale: (d,) or ().
        row_space: Whether `inner` are products of rows, (row, row), or of features, (d, d).
        inner: The inner products.
    """

    features: Tensor
    centre: Tensor
    scale: Tensor
    row_space: bool
    inner: Tensor

    @classmethod
    def of(cls, features: Tensor, centre: Tensor, scale: Tensor, *, row_space: bool) -> "_Problem":
        """Centre and scale `features`, which are overwritten."""
        scaled = features.sub_(centre)
        scaled = scaled.div_(scale) if scale.dim() else scaled
        if not torch.isfinite(scaled.sum()):  # one such value makes the sum so, in a tenth of the time of testing each
            raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")
        inner = gram(scaled if row_space else scaled.mT)
        return cls(features=scaled, centre=centre, scale=scale, row_space=row_space, inner=inner)

    def row_gram(self, rows: Tensor) -> Tensor:
        """Inner products of some rows: (m, m)."""
        return self.inner.index_select(0, rows).index_select(1, rows)

    def column_gram(self, rows: Tensor) -> Tensor:
        """Σ x xᵀ over some rows (d, d), which is the sum over all rows minus that over the others."""
        others = torch.ones(len(self.features), dtype=torch.bool, device=rows.device)
        others[rows] = False
        return self.inner - gram(self.features[others].mT)

    def combined(self, rows: Tensor, dual: Tensor) -> Tensor:
        """Sums of rows weighted by `dual` (penalty, m): (penalty, d)."""
        spread = dual.new_zeros(len(dual), len(self.features))
        spread[:, rows] = dual
        return spread @ self.features


@dataclass(frozen=True, kw_only=True)
class _Training:
    """Some `rows` (m,) of a problem, and their `targets` (m,)."""

    problem: _Problem
    rows: Tensor
    targets: Tensor


_Fitted = tuple[Tensor, Tensor]


class _Solver(Protocol):
    def __call__(self, batch: Sequence[_Training], penalties: Tensor) -> Iterable[_Fitted]:
        """Coefficients (penalty, d) and intercepts (penalty,) from each training set."""


def _path(
    solve: _Solver,
    features: Tensor,
    targets: Tensor,
    penalties: Sequence[float],
    mask: Tensor | None,
    standardise: bool,
    device: torch.device | str | None,
) -> LinearPath:
    targets, folds = _checked(features, targets, penalties, mask)
    if solve is _logistic:
        _check_classes(targets, folds)
    where = torch.device(device) if device is not None else features.device
    targets, folds = targets.to(where), folds.to(where)
    grid = torch.tensor(penalties, dtype=torch.float64, device=where)
    sizes = folds.sum(-1)
    row_space = int(sizes.max()) < features.shape[-1]
    at_once = _at_once(int(sizes.max()), features.shape[-1], where)

    def shared(problem: int) -> _Problem | None:
        if standardise:  # every fold has its own scale, so folds share no inner products
            return None
        states = features[problem].to(where, torch.float64, copy=True)
        return _Problem.of(states, states.mean(0), states.new_ones(()), row_space=row_space)

    def training(index: int, fold: int, problem: _Problem | None) -> _Training:
        rows = folds[index, fold].nonzero()[:, 0]
        y = targets[index, rows]
        if problem is None:
            states = features[index].to(where, torch.float64)[rows]
            problem = _Problem.of(states, *_moments(states), row_space=row_space)
            rows = torch.arange(len(rows), device=where)
        return _Training(problem=problem, rows=rows, targets=y)

    def fit(members: Sequence[tuple[int, int, _Problem | None]]) -> list[_Fitted]:
        batch = [training(*member) for member in members]
        return [_unscaled(one.problem, *fitted) for one, fitted in zip(batch, solve(batch, grid), strict=True)]

    n_problems, n_folds = folds.shape[:2]
    coef = torch.empty(n_problems, n_folds, len(grid), features.shape[-1], dtype=torch.float64, device=where)
    intercept = coef.new_empty(coef.shape[:-1])
    with (
        working("fitting", total=n_problems, unit="layers and positions") as work,
        _on_every_core(where, ceil(n_problems * n_folds / at_once), _products(folds, features)) as (run, cores),
    ):
        for start in range(0, n_problems, step := max(PROBLEMS_AT_A_TIME, ceil(at_once / n_folds)) * cores):
            part = range(start, min(start + step, n_problems))
            members = [
                (i, k, problem) for i, problem in zip(part, run(shared, part), strict=True) for k in range(n_folds)
            ]
            members.sort(key=lambda member: sizes[member[:2]])  # a batch is filled up to its largest training set
            batches = [members[first : first + at_once] for first in range(0, len(members), at_once)]
            for batch, fits in zip(batches, run(fit, batches), strict=True):
                for (i, k, _), (own, base) in zip(batch, fits, strict=True):
                    coef[i, k], intercept[i, k] = own, base
            work.advance(len(part))
    return (
        LinearPath(coef, intercept) if mask is not None and mask.dim() == 3 else LinearPath(coef[:, 0], intercept[:, 0])
    )


def _unscaled(problem: _Problem, coef: Tensor, intercept: Tensor) -> _Fitted:
    """Coefficients and intercepts in the units of the features."""
    own = coef / problem.scale
    return own, intercept - own @ problem.centre


def _at_once(rows: int, width: int, device: torch.device) -> int:
    """Training sets of so many rows in a batch."""
    return max(1, BATCH_BYTES.get(device.type, 2**30) // (8 * rows * width))


@contextmanager
def _on_every_core(
    device: torch.device, tasks: int, products: float
) -> Iterator[tuple[Callable[..., Iterable[Any]], int]]:
    """A `map` that spreads tasks over the cores that torch may use, each with one thread of its own, and their number.

    A single task gets the threads that its `products` are worth.
    """
    cores = min(available_threads(), tasks) if device.type == "cpu" else 1
    if cores == 1:
        with threads_for(products), blas_threads_for(products):
            yield map, 1
    else:
        with one_thread_each(), ThreadPoolExecutor(cores) as pool:
            yield pool.map, cores


def _products(folds: Tensor, features: Tensor) -> float:
    """Multiplications of the inner products of the largest training set, between the rows or the features, whichever are fewer."""
    rows, width = int(folds.sum(-1).max()), features.shape[-1]
    return float(min(rows, width) ** 2 * max(rows, width))


def _ridge(batch: Sequence[_Training], penalties: Tensor) -> Iterator[_Fitted]:
    """Ridge with the intercept as one more unknown: Σ dual = 0 in row space, Σ (target − w·x − b) = 0 in feature space."""
    for one in batch:
        problem, rows, mean = one.problem, one.rows, one.targets.mean()
        y = one.targets - mean
        if problem.row_space:
            dual, intercept = bordered_solutions(problem.row_gram(rows), y, torch.ones_like(y), 0, penalties)
            yield problem.combined(rows, dual), intercept + mean
        else:
            states = problem.features[rows]
            coef, intercept = bordered_solutions(
                problem.column_gram(rows), y @ states, states.sum(0), len(rows), penalties
            )
            yield coef, intercept + mean


def _logistic(batch: Sequence[_Training], penalties: Tensor) -> Iterator[_Fitted]:
    """All training sets of the batch at once, filled up with rows of 0 that weigh nothing."""
    targets = _stacked([one.targets for one in batch])
    weight = _stacked([torch.ones_like(one.targets) for one in batch])
    if not batch[0].problem.row_space:
        space = ColumnSpace(_stacked([one.problem.features[one.rows] for one in batch]), weight)
        yield from zip(*newton_path(space, targets, penalties), strict=True)
        return
    grams = RowSpace(_stacked([one.problem.row_gram(one.rows) for one in batch]), weight)
    for one, dual, intercept in zip(batch, *newton_path(grams, targets, penalties), strict=True):
        yield one.problem.combined(one.rows, dual[:, : len(one.rows)]), intercept


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """`parts` as a batch, each filled up with 0 to the size of the largest."""
    if len(parts) == 1:
        return parts[0][None]  # no copy of what may be a large matrix
    whole = parts[0].new_zeros(len(parts), *map(max, *(part.shape for part in parts)))
    for filled, part in zip(whole, parts, strict=True):
        filled[tuple(slice(length) for length in part.shape)] = part
    return whole


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) of `features` (row, d); a constant has deviation 1."""
    mean = features.mean(0)
    variance = (features - mean).square().mean(0)
    # Rounding gives a constant some variance; the bound is that of scikit-learn's StandardScaler.
    epsilon = torch.finfo(torch.float64).eps * len(features)
    return mean, torch.where(variance <= epsilon * variance + (epsilon * mean) ** 2, 1.0, variance.sqrt())


def _checked(
    features: Tensor, targets: Tensor, penalties: Sequence[float], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Targets (problem, row) float64 and training sets (problem, fold, row) bool."""
    if features.dim() != 3 or not features.is_floating_point() or 0 in features.shape:
        raise InputError(f"features of shape {tuple(features.shape)}; give floats (problem, row, d_model)")
    if not penalties or not all(0 < penalty < float("inf") for penalty in penalties):
        raise InputError(f"penalties {list(penalties)}; each has to be a finite number above 0")
    problems, rows, _ = features.shape
    if targets.shape not in {(rows,), (problems, rows)}:
        raise InputError(f"targets of shape {tuple(targets.shape)} for features of {problems} problems and {rows} rows")
    targets = targets.to(features.device, torch.float64).expand(problems, rows)
    if not torch.isfinite(targets).all():
        raise InputError("a target is NaN or infinite; leave its row out")
    folds = (torch.ones(problems, 1, rows) if mask is None else mask).to(features.device, torch.bool)
    folds = folds[:, None] if folds.dim() == 2 else folds
    if folds.dim() != 3 or (folds.shape[0], folds.shape[2]) != (problems, rows):
        shape = None if mask is None else tuple(mask.shape)
        raise InputError(f"a mask of shape {shape} for {problems} problems and {rows} rows")
    if (folds.sum(-1) < 2).any():
        raise InputError("a training set has fewer than 2 rows; record more traces")
    return targets, folds


def _check_classes(targets: Tensor, folds: Tensor) -> None:
    if not ((targets == 0) | (targets == 1)).all():
        raise InputError("logistic targets other than 0 and 1; encode the two classes as 0 and 1")
    ones = (folds * targets[:, None]).sum(-1)
    if ((ones == 0) | (ones == folds.sum(-1))).any():
        raise InputError("a training set has one class only; record more traces of the other")
