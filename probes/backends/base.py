"""What an engine has to do for us: one forward pass that reads and writes at sites. All else is built on it once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from reasonscope.probes.architecture.sites import Site


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Where the columns of this pass stand.

    `index` (batch, token): absolute positions, padding not counted and itself -1; `ids` (batch, token): the tokens. Both lie
    where ids are fed; of a dispatched model an activation may lie elsewhere.
    """

    index: Tensor
    ids: Tensor


# Takes the activation at a site and the positions of its columns; returns what stands there from now on (the very same
# tensor: nothing was changed). The returned tensor has the same shape and dtype.
Edit = Callable[[Tensor, Positions], Tensor]
# Takes what was read at a site; what it returns is kept in its place.
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What one pass gives: `logits` (batch, token, vocab), or of the last token alone (batch, 1, vocab); what was read,
    by site, AFTER any edit at the same site; and the cache to hand to the next pass. Rows of padding mean nothing."""

    logits: Tensor
    activations: Mapping[Site, Tensor] = field(default_factory=dict)
    cache: Any = None


class Pass(Protocol):
    """`Backend.forward` with its sites already said."""

    def __call__(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None,
        cache: Any = None,
        use_cache: bool = False,
        last_logits_only: bool = False,
    ) -> Forward: ...


class Backend(Protocol):
    """An engine holding one loaded model. It leaves no hook behind, whatever happens."""

    name: str

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None,
        cache: Any = None,
        use_cache: bool = False,
        last_logits_only: bool = False,
        read: Sequence[Site] = (),
        write: Mapping[Site, Edit] | None = None,
        reduce: Reduce | None = None,
    ) -> Forward:
        """Run `ids` (batch, token), left-padded, behind what is in `cache`.

        `mask` (batch, cached + token) is 1 on real tokens, 0 on padding, over the cached columns too; None where nothing is padding.
        A cache is the transformers `Cache` object of the same batch rows. `reduce` takes what was read where it is read, so that the
        whole of it is neither kept nor sent; what it returns is in `activations`. Runs under `grad_mode()`.
        """
        ...

    def passes(
        self, *, read: Sequence[Site] = (), write: Mapping[Site, Edit] | None = None, reduce: Reduce | None = None
    ) -> AbstractContextManager[Pass]:
        """Inside, a `forward` that reads and writes the same every time: what prepares it is done once."""
        ...


class PassByPass:
    """`Backend.passes` of an engine that has nothing to gain from knowing that passes are alike."""

    forward: Callable[..., Forward]

    @contextmanager
    def passes(
        self, *, read: Sequence[Site] = (), write: Mapping[Site, Edit] | None = None, reduce: Reduce | None = None
    ) -> Iterator[Pass]:
        yield partial(self.forward, read=read, write=write, reduce=reduce)


_GRADIENTS: ContextVar[bool] = ContextVar("_GRADIENTS", default=False)


@contextmanager
def gradients() -> Iterator[None]:
    """Inside, forward passes build the graph for `backward`; outside they do not, whatever torch's own mode."""
    token = _GRADIENTS.set(True)
    try:
        yield
    finally:
        _GRADIENTS.reset(token)


def grad_mode() -> AbstractContextManager[object]:
    """What a backend's forward pass runs under.

    Not `torch.inference_mode`: what it makes can never enter a backward pass, and a probe trained on captured
    activations would fail far from here.
    """
    return torch.enable_grad() if _GRADIENTS.get() else torch.no_grad()


def cached(cache: Any) -> int:
    """Columns that a transformers `Cache` holds; none where it is None."""
    return 0 if cache is None else int(cache.get_seq_length())


def full_mask(ids: Tensor, cache: Any) -> Tensor:
    """The mask (batch, cached + token) of a batch without padding, for an engine that has to be given one."""
    return ids.new_ones(ids.shape[0], cached(cache) + ids.shape[1])


def positions(ids: Tensor, mask: Tensor | None, cache: Any = None) -> Positions:
    """The positions of the columns of `ids` (batch, token) under `mask` (batch, cached + token), or of all behind `cache`."""
    if mask is None:
        before = cached(cache)
        return Positions(
            index=torch.arange(before, before + ids.shape[1], device=ids.device).expand(ids.shape), ids=ids
        )
    index = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, -1)
    return Positions(index=index[:, -ids.shape[1] :], ids=ids)
