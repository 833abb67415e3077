"""Attention knockout: the queries of one span can no longer read from the keys of another."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import positions
from reasonscope.probes.backends.hooks import eager_attention
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.side_effects import LogitsFunction
from reasonscope.steering.vectors.scope import Scope


@dataclass(frozen=True, kw_only=True)
class Edges:
    """Attention edges from the queries of `readers` to the keys of `read`, in `layers` (all if None)."""

    readers: Scope
    read: Scope
    layers: tuple[int, ...] | None = None

    def cut(self, ids: Tensor, n_prompt: Tensor) -> Tensor:
        """True (batch, query, key) on the edges to cut. A token keeps the edge to itself, so that no row of attention is empty."""
        queries, keys = (scope.mask(ids, n_prompt=n_prompt) for scope in (self.readers, self.read))
        earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(-1)
        return queries[:, :, None] & keys[:, None, :] & earlier


@contextmanager
def without_edges(model: Model, cut: Tensor, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Inside the block, passes of `model.hf` over whole sequences have no attention where `cut` (batch, query, key) is true.

    The edges are cut before the softmax, so the remaining weights sum to 1 (Geva et al., arXiv 2304.14767, section 4). Runs with eager
    attention. Raises SiteError for a layer that the model does not have.
    """
    with ExitStack() as stack:
        stack.enter_context(eager_attention(model.hf))
        for layer in range(model.n_layers) if layers is None else layers:
            attention = model.layout.module(model.hf, Site("attn_probs", layer))
            stack.callback(attention.register_forward_pre_hook(_masking(cut), with_kwargs=True).remove)
        yield


def reading_without(model: Model, edges: Edges, count: Callable[[int], None] = lambda _: None) -> LogitsFunction:
    """Forward passes over whole sequences without `edges`; `count` is called with how many were cut in each pass.

    Raises InputError for a backend other than the native hooks, the only one that lets the mask be changed.
    """
    if model.backend.name != "hooks":
        raise InputError(
            f"attention edges can be cut with backend 'hooks' only, not {model.backend.name!r}; load the model with it"
        )

    def read(ids: Tensor, mask: Tensor, n_prompt: Sequence[int]) -> Tensor:
        real = ids.masked_fill(positions(ids, mask).index < 0, -1)
        cut = edges.cut(real, torch.tensor(n_prompt, device=ids.device))
        count(int(cut.sum()))
        with without_edges(model, cut, edges.layers):
            return model.backend.forward(ids, mask=mask).logits

    return read


def _masking(cut: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape[-2:] != cut.shape[-2:]:
            raise InputError("attention edges are cut in passes over whole sequences without a cache; replay the trace")
        gone = cut[:, None].to(mask.device)
        masked = mask & ~gone if mask.dtype == torch.bool else mask.masked_fill(gone, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": masked}

    return hook
