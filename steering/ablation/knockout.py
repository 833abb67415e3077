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
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.side_effects import LogitsFunction
from reasonscope.steering.vectors.scope import Scope


@dataclass(frozen=True, kw_only=True)
class Edges:
    """Attention edges from the queries of `readers` to the keys of `read`, in `layers` (all if None)."""

    readers: Scope
    read: Scope
    layers: tuple[int, ...] | None = None

    def cut(self, ids: Tensor, n_prompt: Tensor, *, last: int | None = None) -> Tensor:
        """True (batch, query, key) on the edges to cut, of the `last` queries only if that is given.

        A token keeps the edge to itself, so that no row of attention is empty.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        keys = self.read.mask(ids, n_prompt=n_prompt)
        queries = self.readers.mask(ids, n_prompt=n_prompt)[:, -(last or ids.shape[1]) :]
        earlier = place[None, :] < place[-queries.shape[1] :, None]
        return queries[:, :, None] & keys[:, None, :] & earlier


@contextmanager
def _without_edges(model: Model, cut: Tensor, layers: Sequence[int] | None = None) -> Iterator[None]:
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
    _check_backend(model)

    def read(ids: Tensor, mask: Tensor, n_prompt: Sequence[int]) -> Tensor:
        real = ids.masked_fill(positions(ids, mask).index < 0, -1)
        cut = edges.cut(real, torch.tensor(n_prompt, device=ids.device))
        count(int(cut.sum()))
        with _without_edges(model, cut, edges.layers):
            return model.backend.forward(ids, mask=mask).logits

    return read


class _RunningCut:
    """Cuts edges while a model writes: follows the text of each row, and masks the keys of each pass. `count` is how many it has cut."""

    def __init__(self, edges: Edges) -> None:
        self._edges = edges
        self._step: DecodingStep | None = None
        self._written = self._n_prompt = torch.empty(0)
        self._cut = torch.empty(0)
        self.count = 0

    def on_step(self, step: DecodingStep) -> None:
        """Follow a generation; give this as `on_step` to `generate`."""
        self._step = step

    def begin_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each pass of the model: what is cut in it, (row, query, key)."""
        assert self._step is not None
        ids, mask = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
        n = ids.shape[1]
        if self._step.index == 0:
            self._written = ids if mask is None else ids.masked_fill(mask[:, -n:] == 0, -1)
            self._n_prompt = (self._written >= 0).sum(dim=1)
        else:
            columns = torch.full((len(self._written), n), -1, device=ids.device)
            columns[self._step.rows] = ids
            self._written = torch.cat([self._written, columns], dim=1)
        rows = self._step.rows
        self._cut = self._edges.cut(self._written[rows], self._n_prompt[rows], last=n)
        self.count += int(self._cut.sum())

    def mask(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before each attention: its mask without the edges. A layer with a window keeps the last keys only."""
        mask, cut = kwargs.get("attention_mask"), self._cut
        if mask is None:
            mask = torch.zeros(len(cut), 1, *cut.shape[1:], device=cut.device, dtype=torch.float32)
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] > cut.shape[-1]:
            raise InputError("attention edges can be cut only if a layer caches its keys in the order of the text")
        return args, {**kwargs, "attention_mask": _without(mask, cut[:, None, :, -mask.shape[-1] :])}


@contextmanager
def writing_without(model: Model, edges: Edges) -> Iterator[_RunningCut]:
    """Inside the block, `generate` with `on_step=cut.on_step` writes without `edges`, which are cut as `_without_edges` cuts them.

    Raises InputError for a backend other than the native hooks, SiteError for a layer that the model does not have.
    """
    _check_backend(model)
    cut = _RunningCut(edges)
    with ExitStack() as stack:
        stack.enter_context(eager_attention(model.hf))
        stack.callback(model.hf.register_forward_pre_hook(cut.begin_pass, with_kwargs=True).remove)
        for layer in range(model.n_layers) if edges.layers is None else edges.layers:
            attention = model.layout.module(model.hf, Site("attn_probs", layer))
            stack.callback(attention.register_forward_pre_hook(cut.mask, with_kwargs=True).remove)
        yield cut


def _check_backend(model: Model) -> None:
    if model.backend.name != "hooks":
        raise InputError(
            f"attention edges can be cut with backend 'hooks' only, not {model.backend.name!r}; load the model with it"
        )


def _without(mask: Tensor, gone: Tensor) -> Tensor:
    gone = gone.to(mask.device)
    return mask & ~gone if mask.dtype == torch.bool else mask.masked_fill(gone, torch.finfo(mask.dtype).min)


def _masking(cut: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape[-2:] != cut.shape[-2:]:
            raise InputError("attention edges are cut in passes over whole sequences without a cache; replay the trace")
        return args, {**kwargs, "attention_mask": _without(mask, cut[:, None])}

    return hook
