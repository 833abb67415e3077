"""Mutual information between two representations as MI-Peaks measures it, exact and without a d × d matrix."""

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError

SIGMA, EPSILON = 50.0, 1e-5  # from the published code; the paper's appendix tries widths from 50 to 400
_TOLERANCE = 1e-14  # relative to the kernel's diagonal, which is 1
_CHUNK = 2**16  # coordinates at a time, so that their factors stay in the processor's cache


def mutual_information(x: Values, y: Values, *, sigma: float = SIGMA, epsilon: float = EPSILON) -> Values:
    """Dependence of each row of `x` (row, d_model) on `y` (d_model,) or (target, d_model): (row,), or (row, target), without unit.

    The d coordinates are d paired scalar samples (MI-Peaks, arXiv 2506.02867, its code's `hsic_normalized_cca`): K_ij =
    exp(−(x_i − x_j)² / 2σ²), K̃ = HKH, R = K̃ (K̃ + εd I)⁻¹, value = tr(R_x R_y). A Gaussian kernel of scalars has a tiny numerical rank
    r, so with K = AAᵀ, A centred and c = εd it is tr(G_x⁻¹ C G_y⁻¹ Cᵀ) for G = AᵀA + cI and C = A_xᵀA_y: O(d r²) instead of O(d³).

    Departures: float64 (the published float32 is off by up to .06 at d = 4096). The value is not mutual information in nats, and depends
    on the scale of activations relative to σ, so values of different layers or models cannot be compared. Raises InputError.
    """
    rows, targets = np.atleast_2d(np.asarray(x, np.float64)), np.atleast_2d(np.asarray(y, np.float64))
    if rows.ndim != 2 or targets.ndim != 2 or rows.shape[1] != targets.shape[1] or rows.shape[1] < 2:
        raise InputError(f"representations {np.shape(x)} and {np.shape(y)}; both need the same last axis, d_model >= 2")
    if not (np.isfinite(rows).all() and np.isfinite(targets).all()):
        raise InputError("a representation is NaN or infinite; record the traces again in float32 or bfloat16")
    if not (sigma > 0 and epsilon > 0):
        raise InputError(f"sigma {sigma} and epsilon {epsilon} must be above 0")
    ridge = epsilon * rows.shape[1]
    sides = [_Side(target[None], sigma, ridge) for target in targets]
    values = np.empty((len(rows), len(targets)))
    chunk = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), chunk):
        left = _Side(rows[start : start + chunk], sigma, ridge)
        for column, right in enumerate(sides):
            values[start : start + chunk, column] = left.dependence(right)
    return values if np.ndim(y) == 2 else values[:, 0]


def squared_correlation(x: Values, y: Values) -> Values:
    """r² of the coordinates of each row of `x` (row, d_model) with those of `y` (d_model,): the linear part of the
    dependence; (row,)."""
    rows = np.asarray(x, np.float64) - np.mean(x, axis=1, keepdims=True)
    target = np.asarray(y, np.float64) - np.mean(y)
    products = rows @ target
    norms = np.einsum("td,td->t", rows, rows) * float(target @ target)
    return np.asarray(np.divide(products**2, norms, out=np.zeros_like(products), where=norms > 0), dtype=np.float64)


class _Side:
    """Centred kernel factors of rows (row, d_model) and their regularised Gram matrices."""

    def __init__(self, rows: Values, sigma: float, ridge: float) -> None:
        factor = _kernel_factor(rows, sigma)
        self.factor = factor - factor.mean(axis=-1, keepdims=True)
        self.gram = self.factor @ self.factor.transpose(0, 2, 1)
        self.gram += ridge * np.eye(self.gram.shape[1])

    def dependence(self, other: "_Side") -> Values:
        """tr(G_x⁻¹ C G_y⁻¹ Cᵀ) of every row here with the one row of `other`."""
        n, rank, width = self.factor.shape
        cross = (self.factor.reshape(n * rank, width) @ other.factor[0].T).reshape(n, rank, -1)
        left = np.linalg.solve(self.gram, cross)
        right = np.linalg.solve(other.gram[0], cross.reshape(n * rank, -1).T).T.reshape(cross.shape)
        return np.asarray(np.maximum(np.einsum("nij,nij->n", left, right), 0.0), dtype=np.float64)


def _kernel_factor(rows: Values, sigma: float) -> Values:
    """A of K = AᵀA for the Gaussian kernel of each row's scalars, (row, rank, d_model): Cholesky, largest residual
    first.

    All rows continue until the last of them has a residual of at most 1e-14 on its whole diagonal; a row that finishes
    earlier gets factors of zeros. Works in place, because memory traffic is the cost.
    """
    n, width = rows.shape
    here = np.arange(n)
    residual = np.ones((n, width))
    factors = np.empty((n, min(width, 8), width))
    rank = 0
    while rank < width:
        pivot = residual.argmax(axis=1)
        largest = residual[here, pivot]
        if largest.max() <= _TOLERANCE:
            break
        if rank == factors.shape[1]:
            factors = np.concatenate([factors, np.empty((n, min(rank, width - rank), width))], axis=1)
        factor = rows - rows[here, pivot][:, None]
        factor *= factor
        factor *= -1 / (2 * sigma**2)
        np.exp(factor, out=factor)
        factor -= (factors[:, :rank].transpose(0, 2, 1) @ factors[here, :rank, pivot][:, :, None])[:, :, 0]
        factor *= np.where(largest > _TOLERANCE, 1 / np.sqrt(np.maximum(largest, _TOLERANCE)), 0.0)[:, None]
        factors[:, rank] = factor
        factor *= factor
        residual -= factor
        residual[here, pivot] = 0.0
        rank += 1
    return factors[:, :rank]
