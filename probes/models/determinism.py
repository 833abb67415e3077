"""The same numbers again: deterministic kernels, and float32 arithmetic over 16-bit weights.

docs/determinism.md says what is guaranteed with and without them, and what is not.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from reasonscope.data.errors import InputError

_HALF = (torch.float16, torch.bfloat16)


def make_deterministic() -> None:
    """From now on PyTorch uses kernels in this process that give the same bits again, and raises an error if it has none.

    Call it before the GPU is first used, when cuBLAS reads its workspace from the environment. Different kinds of devices, thread counts
    and library versions may still give different bits.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32, or in float64 if they are: sums of 16-bit numbers lose small terms."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def compute_in_float32(hf: PreTrainedModel) -> None:
    """From now on every module of `hf` computes in float32, while its weights stay in memory in 16 bits.

    This is LayerCast (Yuan et al., arXiv 2506.09501, section 5): greedy decoding in bfloat16 depends on the batch, because rounding differs
    with the order of sums and the next token can depend on the last bit. Each module widens its own weights when it starts and drops
    them when it ends, so that only one module's weights are in memory twice. Everything that flows between modules is float32, including
    the KV cache. The numbers are those of `hf.float()`, to the last bit. No gradient flows through it: a backward pass would use the
    16-bit weights.

    Raises InputError if the model has no 16-bit weights.

    Departures: every module with weights of its own is widened, not only linear layers.
    """
    if not _widen(hf):
        raise InputError(
            f"the weights are {hf.dtype}; float32 arithmetic over 16-bit weights needs float16 or bfloat16 weights"
        )


@contextmanager
def in_float32(hf: PreTrainedModel) -> Iterator[None]:
    """Inside, every module with 16-bit weights computes in float32, as by `compute_in_float32`; others stay as they are."""
    handles = _widen(hf)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(hf: PreTrainedModel) -> list[RemovableHandle]:
    handles: list[RemovableHandle] = []
    for module in hf.modules():
        narrow = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype in _HALF]
        if narrow:
            handles += _widen_while_running(module, narrow)
    return handles


def _widen_while_running(module: nn.Module, parameters: list[nn.Parameter]) -> list[RemovableHandle]:
    kept: list[torch.Tensor] = []

    def widen(_: nn.Module, __: Any) -> None:
        kept[:] = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()

    def narrow(_: nn.Module, __: Any, ___: Any) -> None:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data

    # Narrow again even if the module raises.
    return [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow, always_call=True)]
