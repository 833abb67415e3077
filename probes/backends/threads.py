"""How many threads a matrix product is worth: one if it is small, all that there are if it is large.

Threads that share a product wait for each other after it, and they wait in a spin. For small matrices the wait takes longer than the
product, and beside another busy process it can take a hundred times as long. docs/performance.md has the measurements.

A thread count that the user set is left alone: by a variable of `SETTINGS`, by `torch.set_num_threads`, or by `threads=` of `load_model`.
The text baselines of the probes use this module without torch, so the functions that need torch import it.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from threadpoolctl import ThreadpoolController, threadpool_limits

from reasonscope.data.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Multiplications in one matrix product from which on it is shared: below, threads lose more beside other work than they save on an
# idle machine.
WORTH_SHARING = 1e7
# A product reads its weights from memory, which takes as long as multiplying them with about this many rows.
_ROWS_OF_A_READ = 16

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

# torch's count before the outermost `threads_for` of this Python thread chose another.
_OUTSIDE: ContextVar[int | None] = ContextVar("_OUTSIDE", default=None)


def _thread_count(products: float, available: int) -> int:
    """Threads for a matrix product of so many multiplications, if `available` can be had."""
    return available if products >= WORTH_SHARING else 1


def available_threads() -> int:
    """The threads that large work gets: as many as the user set, or else as torch takes, but no more than the container's quota."""
    count = _outside()
    return count if _chosen_by_user(count) else min(count, _quota())


@contextmanager
def threads_for(products: float) -> Iterator[None]:
    """Inside, torch uses the threads that matrix products of so many multiplications are worth; the count from before comes back.

    Does nothing if the user set a count. It takes about ten microseconds.
    """
    outside = _outside()
    if _chosen_by_user(outside):
        yield
        return
    token = _OUTSIDE.set(outside)
    try:
        with _torch_threads(_thread_count(products, min(outside, _quota()))):
            yield
    finally:
        _OUTSIDE.reset(token)


def threads_for_pass(ids: "Tensor", d_model: int) -> AbstractContextManager[None]:
    """`threads_for` a pass of `ids` (batch, token) through a model of this width; what runs on other devices needs no choice."""
    return threads_for(_pass_products(ids.numel(), d_model)) if ids.device.type == "cpu" else nullcontext()


def _pass_products(rows: int, d_model: int) -> int:
    """Multiplications of a typical matrix product in a pass that feeds `rows` tokens, counting what reading the weights costs."""
    return max(rows, _ROWS_OF_A_READ) * d_model**2


def blas_threads_for(products: float) -> AbstractContextManager[object]:
    """`threads_for` numpy, scipy and scikit-learn: they compute in another library than torch."""
    if _set_in_environment():
        return nullcontext()
    limit: AbstractContextManager[object] = _blas().limit(
        limits=_thread_count(products, min(max(_usual_counts()), _quota()))
    )
    return limit


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, each Python thread computes with one thread of its own: for a pool of Python threads, one for each core."""
    with _torch_threads(1), _blas().limit(limits=1):
        yield


def set_threads(count: int) -> None:
    """From here on everything in this process uses `count` threads, as if the user had set OMP_NUM_THREADS. Raises InputError."""
    import torch

    if count < 1:
        raise InputError(f"threads is {count}; at least 1 is needed")
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
    threadpool_limits(count)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _outside() -> int:
    """torch's count outside of any `threads_for`."""
    import torch

    return _OUTSIDE.get() or torch.get_num_threads()


def _chosen_by_user(count: int) -> bool:
    """Whether `count`, the threads that torch uses, is the user's choice and not torch's own."""
    return _set_in_environment() or count not in _usual_counts()


def _set_in_environment() -> bool:
    return any(os.environ.get(name) for name in SETTINGS)


@cache
def _usual_counts() -> frozenset[int]:
    """The thread counts that torch may start with: a thread for each CPU that this process may run on, or for each core (MKL)."""
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows
        return frozenset({os.cpu_count() or 1})
    cpus = os.sched_getaffinity(0)
    paths = [Path(_TOPOLOGY.format(cpu)) for cpu in cpus]
    siblings = {path.read_text(encoding="ascii") if path.exists() else path for path in paths}
    return frozenset({len(cpus), len(siblings)})


@cache
def _quota() -> int:
    """Whole CPUs that the control group of this process may use (cgroup v2, as in a container with `--cpus`); many without a quota."""
    text = _QUOTA.read_text(encoding="ascii") if _QUOTA.exists() else "max"
    quota, _, period = text.partition(" ")
    return 2**15 if quota.strip() == "max" else max(1, round(int(quota) / int(period)))


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of numpy and scipy."""
    import numpy as np  # noqa: F401  # loads the one
    import scipy.linalg  # noqa: F401  # loads the other

    return ThreadpoolController().select(user_api="blas")
