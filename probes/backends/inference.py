"""Passes in torch's inference mode, which saves a small model an eighth of its time, and ordinary tensors for everybody outside of them.

A tensor that was made in inference mode can never enter a backward pass: training a probe on it would fail far from here. So nobody but
the model sees one: what a pass returns, and what an edit or a hook is given, are ordinary tensors that share its memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # documented, but not exported

_SHARED = ("cpu", "cuda")  # devices on which a tensor can be handed over without a copy


def ordinary(tensor: Tensor) -> Tensor:
    """`tensor`, or an ordinary one that shares its memory if it was made in inference mode. Inside that mode it stays as it is."""
    if not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return from_dlpack(to_dlpack(tensor)) if tensor.device.type in _SHARED else tensor.clone()


def outside_inference(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run`, which sees ordinary tensors and no inference mode, also if the pass around it is in that mode."""

    def outside(*tensors: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            return run(*tensors)
        with torch.inference_mode(False), torch.no_grad():
            given = [ordinary(tensor) for tensor in tensors]
            after = run(*given)
        return tensors[0] if after is given[0] else after  # the same tensor again means that nothing changed

    return outside


def make_ordinary(cache: Any) -> None:
    """Let gradients flow through what is computed from a transformers `Cache` of earlier passes."""
    for layer in getattr(cache, "layers", ()):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer, name, ordinary(value))
