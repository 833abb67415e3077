"""Models that torch.compile has changed: they run uncompiled while something reads or edits them.

A compiled module keeps a graph that was made without our hooks, and torch does not look again whether there are any, so that an edit would
silently do nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock

import torch
from torch import nn
from torch._dynamo import OptimizedModule

_LOCK, _RUNNING = Lock(), [0]  # how many contexts hold the process in eager mode


def is_compiled(hf: nn.Module) -> bool:
    """Whether `hf` or a part of it is compiled: wrapped by `torch.compile`, in place by `.compile()`, or in its `forward` alone."""
    return any(
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in hf.modules()
    )


def is_wrapped(hf: nn.Module) -> bool:
    """Whether a part of `hf` was replaced by what `torch.compile` returned, so that its modules have other names."""
    return any(isinstance(module, OptimizedModule) for module in hf.modules())


def uncompiled(source: object) -> object:
    """The module that `torch.compile` wrapped; anything else as it is."""
    return source._orig_mod if isinstance(source, OptimizedModule) else source


def eagerly_if_compiled(hf: nn.Module) -> AbstractContextManager[None]:
    """`eagerly` for a compiled model, and nothing for another."""
    return eagerly() if is_compiled(hf) else nullcontext()


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, whatever is compiled in this process runs as it was written. Contexts of several threads may overlap."""
    with _LOCK:
        _RUNNING[0] += 1
        if _RUNNING[0] == 1:
            torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _LOCK:
            _RUNNING[0] -= 1
            if not _RUNNING[0]:
                torch.compiler.set_stance("default")
