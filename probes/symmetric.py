"""Systems of a symmetric positive definite matrix: by LAPACK on the CPU, by torch on other devices. Matrices given here are overwritten.

LAPACK is called as scipy offers it to Cython, through ctypes, which gives Python's lock back meanwhile; `scipy.linalg.lapack` keeps it,
so that threads would wait for each other.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from scipy.linalg import cython_lapack
from torch import Tensor

from reasonscope.data.errors import InputError

_BLOCK = 64  # columns that LAPACK treats at a time, for the size of its work space


def gram(features: Tensor) -> Tensor:
    """Inner products of the rows of `features` (row, d): (row, row)."""
    if features.device.type != "cpu":
        return features @ features.mT
    values = features.numpy()
    return torch.from_numpy(values @ values.T)  # numpy computes one triangle only, torch both


def factored(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """The Cholesky factor of `matrix` (k, k), as the function that takes `right` (k,) to matrix⁻¹ right."""
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        _check(int(info))
        return lambda right: torch.cholesky_solve(right[:, None], factor)[:, 0]
    k = len(matrix)
    _check(_lapack("dpotrf", b"L", k, matrix, k))

    def solve(right: Tensor) -> Tensor:
        solution = right.clone()
        _lapack("dpotrs", b"L", k, 1, matrix, k, solution, k)
        return solution

    return solve


def ridged(matrix: Tensor, penalty: Tensor | float) -> Tensor:
    """matrix + penalty · 1, in place."""
    matrix.diagonal().add_(penalty)
    return matrix


def shifted_solutions(matrix: Tensor, right: Tensor, penalties: Tensor) -> Tensor:
    """(matrix + penalty)⁻¹ right for every penalty, of `matrix` (k, k) and `right` (side, k): (penalty, side, k).

    On the CPU one tridiagonal matrix, of the same eigenvalues, serves all penalties for the price of four Cholesky factors.
    """
    if matrix.device.type != "cpu":
        solvers = [factored(ridged(matrix.clone(), penalty)) for penalty in penalties]
        return torch.stack([torch.stack([solve(side) for side in right]) for solve in solvers])
    k = len(matrix)
    diagonal, beside, reflectors = matrix.new_empty(k), matrix.new_empty(k - 1), matrix.new_empty(k)
    work = matrix.new_empty(_BLOCK * (k + _BLOCK))
    _lapack("dsytrd", b"L", k, matrix, k, diagonal, beside, reflectors, work, len(work))

    def rotated(sides: Tensor, transposed: bytes) -> Tensor:
        n = sides.numel() // k
        _lapack("dormtr", b"L", b"L", transposed, k, n, matrix, k, reflectors, sides, k, work, len(work))
        return sides

    solutions = rotated(right.clone(), b"T").repeat(len(penalties), 1, 1)
    for solution, penalty in zip(solutions, penalties, strict=True):
        _check(_lapack("dptsv", k, len(right), diagonal + penalty, beside.clone(), solution, k))
    return rotated(solutions, b"N")


def _check(info: int) -> None:
    if info:
        raise InputError(
            "a penalty is lost in the rounding of the features' inner products; use a stronger penalty or standardise"
        )


def _lapack(name: str, *arguments: bytes | int | Tensor) -> int:
    """Call a routine with letters, sizes and contiguous tensors (column by column, so transposed), and return its `info`."""
    info = ctypes.c_int()
    _routine(name, len(arguments) + 1)(*(_pointer(argument) for argument in arguments), ctypes.byref(info))
    return info.value


def _pointer(argument: bytes | int | Tensor) -> object:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return ctypes.byref(ctypes.c_int(argument)) if isinstance(argument, int) else argument


@cache
def _routine(name: str, n_arguments: int) -> Callable[..., None]:
    """The compiled routine of LAPACK that `scipy.linalg.cython_lapack` keeps in a capsule."""
    capsule = cython_lapack.__pyx_capi__[name]
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * n_arguments)(address_of(capsule, name_of(capsule)))
