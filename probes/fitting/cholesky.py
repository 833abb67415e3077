"""Linear systems with a symmetric positive definite matrix: by LAPACK on the CPU, by torch elsewhere. Matrices given are overwritten.

LAPACK and BLAS are called through ctypes, by the pointers that scipy offers to Cython, because ctypes releases Python's lock during the
call. `scipy.linalg.lapack` keeps it, so threads would wait for each other.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from scipy.linalg import cython_blas, cython_lapack
from torch import Tensor

from reasonscope.data.errors import InputError

_BLOCK = 64  # columns that LAPACK processes at a time, which decides the size of its work space


def gram(features: Tensor) -> Tensor:
    """Inner products of the rows of `features` (row, d): (row, row)."""
    if features.device.type != "cpu":
        return features @ features.mT
    values = features.numpy()
    return torch.from_numpy(values @ values.T)  # numpy computes only one triangle, torch both


def _factored(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Factorise `matrix` (k, k) by Cholesky, and return the function from `right` (k,) to matrix⁻¹ right."""
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        _check(int(info))
        return lambda right: torch.cholesky_solve(right[:, None], factor)[:, 0]
    k = len(matrix)
    _check(_lapack("dpotrf", b"L", k, matrix, k))

    def solve(right: Tensor) -> Tensor:
        solution = right.clone()
        for transposed in (
            b"N",
            b"T",
        ):  # for one right side this takes a third of the time of dpotrs, which packs the factor for many
            _call(cython_blas, "dtrsv", b"L", transposed, b"N", k, matrix, k, solution, 1)
        return solution

    return solve


class Factors:
    """Cholesky factors of a batch of matrices, each renewed as it gets old. A single large matrix is faster in LAPACK, many in torch."""

    def __init__(self) -> None:
        self._factors = torch.empty(0)
        self._single: Callable[[Tensor], Tensor] | None = None

    def renew(self, matrices: Tensor, which: Tensor | slice) -> None:
        """Factorise `matrices` (which, k, k), those of the indices `which` in the batch; the first call has to have all."""
        if isinstance(which, slice) and len(matrices) == 1:
            self._single = _factored(matrices[0])
            return
        factors, info = torch.linalg.cholesky_ex(matrices)
        _check(int(info.max()))
        if isinstance(which, slice):
            self._factors = factors
        else:
            self._factors[which] = factors

    def solve(self, right: Tensor) -> Tensor:
        """matrix⁻¹ right for each `right` (batch, k)."""
        if self._single:
            return self._single(right[0])[None]
        half = torch.linalg.solve_triangular(self._factors, right[..., None], upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self._factors.mT, half, upper=True)
        return whole[..., 0]


def ridged(matrix: Tensor, penalty: Tensor | float) -> Tensor:
    """matrix + penalty · 1, in place, of a matrix or of each in a batch."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(penalty)
    return matrix


def bordered_solutions(
    matrix: Tensor, right: Tensor, border: Tensor, corner: float, penalties: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve (matrix + penalty) x + b border = right and border · x + b corner = 0 for x (penalty, k) and b (penalty,), every penalty.

    `matrix` is (k, k), `right` and `border` are (k,). On the CPU one tridiagonal matrix with the same eigenvalues serves all penalties,
    for the price of four Cholesky factors.
    """
    sides = torch.stack([right, border])
    if matrix.device.type != "cpu":
        solvers = [_factored(ridged(matrix.clone(), penalty)) for penalty in penalties]
        return _bordered(
            torch.stack([torch.stack([solve(side) for side in sides]) for solve in solvers]), border, corner
        )
    k = len(matrix)
    diagonal, beside, reflectors = matrix.new_empty(k), matrix.new_empty(k - 1), matrix.new_empty(k)
    work = matrix.new_empty(_BLOCK * (k + _BLOCK))
    _lapack("dsytrd", b"L", k, matrix, k, diagonal, beside, reflectors, work, len(work))

    def rotated(sides: Tensor, transposed: bytes) -> Tensor:
        _lapack("dormtr", b"L", b"L", transposed, k, len(sides), matrix, k, reflectors, sides, k, work, len(work))
        return sides

    sides = rotated(sides, b"T")
    solutions = sides.repeat(len(penalties), 1, 1)
    for solution, penalty in zip(solutions, penalties, strict=True):
        _check(_lapack("dptsv", k, 2, diagonal + penalty, beside.clone(), solution, k))
    x, b = _bordered(solutions, sides[1], corner)
    return rotated(x, b"N"), b


def _bordered(solutions: Tensor, border: Tensor, corner: float) -> tuple[Tensor, Tensor]:
    """x and b from `solutions` (penalty, 2, k) for the right side and for the border."""
    plain, slid = solutions.unbind(1)
    b = (plain @ border) / (slid @ border - corner)
    return plain - b[:, None] * slid, b


def _check(info: int) -> None:
    if info:
        raise InputError(
            "a penalty is smaller than the rounding of the features' inner products; use a stronger penalty or standardise"
        )


def _lapack(name: str, *arguments: bytes | int | Tensor) -> int:
    """Call a routine of LAPACK and return its `info`."""
    info = ctypes.c_int()
    _call(cython_lapack, name, *arguments, info)
    return info.value


def _call(library: ModuleType, name: str, *arguments: bytes | int | Tensor | ctypes.c_int) -> None:
    """Call a routine with letters, sizes and contiguous tensors, which Fortran reads column by column, so transposed."""
    _routine(library, name, len(arguments))(*map(_pointer, arguments))


def _pointer(argument: bytes | int | Tensor | ctypes.c_int) -> object:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, bytes):
        return argument
    return ctypes.byref(argument if isinstance(argument, ctypes.c_int) else ctypes.c_int(argument))


@cache
def _routine(library: ModuleType, name: str, n_arguments: int) -> Callable[..., None]:
    """The compiled routine in a capsule of `scipy.linalg.cython_blas` or `cython_lapack`."""
    capsule = library.__pyx_capi__[name]
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * n_arguments)(address_of(capsule, name_of(capsule)))
