"""The same numbers again: deterministic kernels, and float32 arithmetic over 16-bit weights.

What is guaranteed with these and without, and what is not, is in docs/determinism.md.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from reasonscope.data.errors import InputError

_HALF = (torch.float16, torch.bfloat16)


def make_deterministic() -> None:
    """From here on, in this process, PyTorch chooses kernels that give the same bits again, and raises where it has none.

    Call it before a GPU is first used: cuBLAS reads its workspace from the environment then. It cannot make two kinds of devices, numbers
    of threads or versions of a library agree.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """In float32, or as wide as they are: sums of 16-bit numbers lose what is small, and float64 keeps its own."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def compute_in_float32(hf: PreTrainedModel) -> None:
    """From here on every module of `hf` computes in float32, and its weights stay in memory in 16 bits.

    LayerCast (Yuan et al., arXiv 2506.09501, section 5): greedy decoding in bfloat16 depends on the batch, since rounding differs with
    the order of sums and the next token hangs on the last bit. Here each module's own weights are widened as it begins and dropped as
    it ends, so that no more than one module's are in memory twice, and all that flows between modules, the KV cache too, is float32.
    Departure: any module with weights of its own is widened, not linear layers alone. The same numbers as `hf.float()`, to the last
    bit. No gradient flows through it: backward passes would meet the narrow weights. Raises InputError for a model without 16-bit weights.
    """
    count = 0
    for module in hf.modules():
        narrow = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype in _HALF]
        if narrow:
            _widen_while_running(module, narrow)
            count += 1
    if not count:
        raise InputError(
            f"the weights are {hf.dtype}; float32 arithmetic over 16-bit weights is for float16 and bfloat16"
        )


def _widen_while_running(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    kept: list[torch.Tensor] = []

    def widen(_: nn.Module, __: Any) -> None:
        kept[:] = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()

    def narrow(_: nn.Module, __: Any, ___: Any) -> None:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow, always_call=True)  # where the module raises, too
