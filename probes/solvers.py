"""Ridge and logistic regression for all layers, positions, folds and penalties at once, in float64, on any torch device.

Two facts carry the speed. The intercept is not penalised, so a shift of the features changes no coefficient: the rows' inner products
are computed once per problem and serve every fold. And the coefficients lie in the span of the training rows: with fewer rows than
features, everything is solved between the rows ("row space") and never sees a matrix of d_model × d_model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.probes.newton import ColumnSpace, RowSpace, newton_path

# Bytes that one chunk of problems may take; a chunk is at least one problem with all of its folds.
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**33}


class LinearPath(NamedTuple):
    """Coefficients of every problem (and fold, where the mask has folds) at every penalty, in the units of the features.

    `coef` (problem, [fold,] penalty, d_model) and `intercept` (problem, [fold,] penalty), float64.
    """

    coef: Tensor
    intercept: Tensor


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some problems with their folds. `features` (problem, row, d) centred; a fold's training rows `rows` (problem, fold, m) are padded
    to the same number m with rows of `weight` 0; `targets` (problem, fold, m), 0 in the padding."""

    features: Tensor
    targets: Tensor
    rows: Tensor
    weight: Tensor

    @property
    def in_row_space(self) -> bool:
        return self.rows.shape[-1] < self.features.shape[-1]

    @property
    def row_gram(self) -> Tensor:
        """Inner products of the training rows: (problem fold, m, m)."""
        gram = self.features @ self.features.mT
        folds, m = self.rows.shape[1:]
        wide = gram[:, None].expand(-1, folds, -1, -1)
        tall = wide.gather(2, self.rows[..., None].expand(-1, -1, -1, gram.shape[-1]))
        return tall.gather(3, self.rows[:, :, None].expand(-1, -1, m, -1)).flatten(0, 1)

    @property
    def row_features(self) -> Tensor:
        """The training rows: (problem fold, m, d)."""
        wide = self.features[:, None].expand(-1, self.rows.shape[1], -1, -1)
        return wide.gather(2, self.rows[..., None].expand(-1, -1, -1, wide.shape[-1])).flatten(0, 1)

    def combined(self, dual: Tensor) -> Tensor:
        """Σ dual · row of `dual` (problem fold, …, m): (problem fold, …, d). The padding counts 0."""
        problems, folds, m = self.rows.shape
        flat = (dual * self._flat(self.weight, dual)).reshape(problems, folds, -1, m)
        spread = flat.new_zeros(*flat.shape[:3], self.features.shape[1])
        spread.scatter_add_(3, self.rows[:, :, None].expand_as(flat), flat)
        return (spread.flatten(1, 2) @ self.features).reshape(*dual.shape[:-1], -1)

    def _flat(self, values: Tensor, like: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        return flat.reshape(len(flat), *[1] * (like.dim() - 2), -1)


def ridge_path(
    features: Tensor,
    targets: Tensor,
    penalties: Sequence[float],
    mask: Tensor | None = None,
    *,
    standardise: bool = False,
    device: torch.device | str | None = None,
) -> LinearPath:
    """Minimise Σ (target − w·x − b)² + penalty ‖w‖²: scikit-learn's `Ridge(alpha=penalty)`.

    `features` (problem, row, d_model) of any float type; `targets` (row,) or (problem, row); `mask` (problem, row) is true on the
    training rows, (problem, fold, row) gives every problem several training sets, which share what can be shared. A problem is usually a
    layer at a position. `standardise` divides by the training rows' own standard deviation; the coefficients come back in the units
    of the features. One symmetric eigendecomposition per training set serves all penalties. Problems are taken to `device` (theirs if
    None) chunk by chunk, the results are left there. Raises InputError for NaN, shapes that do not fit, or a penalty that is not above 0.
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
    """Minimise Σ log-loss + penalty/2 ‖w‖²: scikit-learn's `LogisticRegression(C=1 / penalty)`.

    As `ridge_path`, with `targets` 0 and 1. Damped Newton steps (iteratively reweighted least squares), from the strongest penalty to
    the weakest, each starting where the last one ended. Raises InputError, besides, where a training set holds one class only.
    """
    return _path(_logistic, features, targets, penalties, mask, standardise, device)


class _Solver(Protocol):
    def __call__(self, chunk: _Chunk, penalties: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (problem fold, penalty, d) and intercepts (problem fold, penalty) for the features of the chunk."""


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
    grid = torch.tensor(penalties, dtype=torch.float64, device=where)
    coefs, intercepts = [], []
    for part in _parts(len(features), features.shape[1:], folds.shape[1], standardise, where):
        inputs = features[part].to(where, torch.float64), targets[part].to(where), folds[part].to(where)
        coef, intercept = _solved(solve, *inputs, grid, standardise)
        coefs.append(coef)
        intercepts.append(intercept)
    path = LinearPath(torch.cat(coefs), torch.cat(intercepts))
    return path if mask is not None and mask.dim() == 3 else LinearPath(path.coef[:, 0], path.intercept[:, 0])


def _solved(
    solve: _Solver, features: Tensor, targets: Tensor, folds: Tensor, penalties: Tensor, standardise: bool
) -> tuple[Tensor, Tensor]:
    """One chunk: centred, where asked scaled fold by fold, solved, and brought back to the units of `features`."""
    problems, n_folds, n_rows = folds.shape
    centre, scale = features.mean(1, keepdim=True), torch.ones((), dtype=torch.float64, device=features.device)
    if standardise:  # every fold has its own scale, so no two share their inner products
        features = features[:, None].expand(-1, n_folds, -1, -1).flatten(0, 1)
        targets = targets[:, None].expand(-1, n_folds, -1).flatten(0, 1)
        folds = folds.reshape(-1, 1, n_rows)
        centre, scale = _moments(features, folds.mT)
    shifted = (features - centre) / scale
    if not torch.isfinite(shifted).all():
        raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")
    rows, weight = _training_rows(folds)
    gathered = targets[:, None].expand_as(folds).gather(2, rows) * weight
    coef, intercept = solve(_Chunk(features=shifted, targets=gathered, rows=rows, weight=weight), penalties)
    coef = coef.reshape(problems, n_folds, len(penalties), -1)
    coef = coef / scale.reshape(problems, n_folds, 1, -1) if standardise else coef
    shift = coef @ centre.reshape(problems, -1, centre.shape[-1], 1)
    return coef, intercept.reshape(coef.shape[:-1]) - shift[..., 0]


def _ridge(chunk: _Chunk, penalties: Tensor) -> tuple[Tensor, Tensor]:
    weight, targets = chunk.weight.flatten(0, 1), chunk.targets.flatten(0, 1)
    counts = weight.sum(-1, keepdim=True)
    mean_target = targets.sum(-1, keepdim=True) / counts
    means = chunk.combined(weight[:, None] / counts[:, None])  # (problem fold, 1, d)
    centred = weight * (targets - mean_target)
    if chunk.in_row_space:
        gram = chunk.row_gram
        along = (gram @ weight[..., None]) / counts[..., None]
        overall = (weight[:, None] @ along) / counts[..., None]
        gram = (gram - along - along.mT + overall) * weight[..., None] * weight[:, None]
        dual = _shrunk(gram, centred, penalties)
        # Exactly 0 on paper; without it a tiny penalty blows the rounding of the sum up.
        coef = chunk.combined(dual - dual.sum(-1, keepdim=True) / counts[..., None])
    else:
        gram = _column_gram(chunk) - counts[..., None] * means.mT * means
        coef = _shrunk(gram, chunk.combined(centred), penalties)
    return coef, mean_target - (coef @ means.mT)[..., 0]


def _shrunk(gram: Tensor, right: Tensor, penalties: Tensor) -> Tensor:
    """(gram + penalty)⁻¹ right for every penalty, of `gram` (…, k, k) and `right` (…, k): (…, penalty, k)."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(gram)
    along = (right[..., None, :] @ vectors) / (values.clamp(min=0)[..., None, :] + penalties[:, None])
    return along @ vectors.mT


def _column_gram(chunk: _Chunk) -> Tensor:
    """Σ x xᵀ over the training rows: that of all rows, computed once, less that of the rows held out."""
    problems, folds, _ = chunk.rows.shape
    training = torch.zeros(problems, folds, chunk.features.shape[1], dtype=torch.float64, device=chunk.rows.device)
    training.scatter_add_(2, chunk.rows, chunk.weight)
    rows, weight = _training_rows(training == 0)
    held_out = _Chunk(features=chunk.features, targets=weight, rows=rows, weight=weight)
    without = held_out.row_features * weight.flatten(0, 1)[..., None]
    whole = (chunk.features.mT @ chunk.features)[:, None].expand(-1, folds, -1, -1)
    return whole.flatten(0, 1) - without.mT @ without


def _logistic(chunk: _Chunk, penalties: Tensor) -> tuple[Tensor, Tensor]:
    space = RowSpace(chunk.row_gram) if chunk.in_row_space else ColumnSpace(chunk.row_features)
    thetas, intercepts = newton_path(space, chunk.targets.flatten(0, 1), chunk.weight.flatten(0, 1), penalties)
    return chunk.combined(thetas) if chunk.in_row_space else thetas, intercepts


def _training_rows(folds: Tensor) -> tuple[Tensor, Tensor]:
    """Of `folds` (problem, fold, row), true on rows to take: their indices and weight 1, padded with others of weight 0."""
    m = int(folds.sum(-1).max())
    rows = folds.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :m]
    return rows, folds.gather(-1, rows).to(torch.float64)


def _moments(features: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (problem, 1, d) over the rows where `training` (problem, row, 1); a constant has deviation 1."""
    count = training.sum(1, keepdim=True)
    mean = torch.where(training, features, 0).sum(1, keepdim=True) / count
    variance = torch.where(training, features - mean, 0).square().sum(1, keepdim=True) / count
    # What rounding leaves of a constant; the bound is that of scikit-learn's StandardScaler.
    epsilon = torch.finfo(torch.float64).eps * count
    return mean, torch.where(variance <= epsilon * variance + (epsilon * mean) ** 2, 1.0, variance.sqrt())


def _parts(n_problems: int, size: torch.Size, n_folds: int, standardise: bool, device: torch.device) -> Iterator[slice]:
    """Cut the problems so that one chunk's features and matrices fit into CHUNK_BYTES."""
    rows, width = size
    side = min(rows, width)
    per_problem = 8 * (rows * width * (3 * n_folds if standardise or width <= rows else 3) + 4 * n_folds * side**2)
    step = max(1, CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"] // per_problem)
    return (slice(start, start + step) for start in range(0, n_problems, step))


def _checked(
    features: Tensor, targets: Tensor, penalties: Sequence[float], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Targets (problem, row) float64 and training sets (problem, fold, row) bool."""
    if features.dim() != 3 or not features.is_floating_point() or 0 in features.shape:
        raise InputError(f"features of shape {tuple(features.shape)}; they are floats (problem, row, d_model)")
    if not penalties or not all(0 < penalty < float("inf") for penalty in penalties):
        raise InputError(f"penalties {list(penalties)}; each is a finite number above 0")
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
        raise InputError("a training set has fewer than 2 rows; record more traces or ask for fewer folds")
    return targets, folds


def _check_classes(targets: Tensor, folds: Tensor) -> None:
    if not ((targets == 0) | (targets == 1)).all():
        raise InputError("logistic targets other than 0 and 1; encode the two classes so")
    ones = (folds * targets[:, None]).sum(-1)
    if ((ones == 0) | (ones == folds.sum(-1))).any():
        raise InputError("a training set holds one class only; record traces of both or ask for fewer folds")
