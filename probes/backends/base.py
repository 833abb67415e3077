"""What an engine must offer: a forward pass that reads and writes activations at sites. Everything else is built on it."""

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
    """The positions and tokens of the columns of a pass: what an edit has to know.

    Both tensors are on the device that ids are fed on. In a model that accelerate spreads over several devices, an activation may be on
    another one.

    Attributes:
        index: Absolute positions (batch, token); padding is not counted and is itself -1.
        ids: Token ids (batch, token).
    """

    index: Tensor
    ids: Tensor


# Takes the activation at a site and the positions of its columns; returns the activation to go on with, of the same shape and
# dtype. Returning the same tensor means that nothing changed.
Edit = Callable[[Tensor, Positions], Tensor]


@dataclass(frozen=True, kw_only=True)
class Look:
    """An edit that changes nothing, and need not be guarded as one that does: the native engine takes it for half of the time.

    Attributes:
        see: Takes the activation and the positions of its columns. What it keeps may be a tensor of inference mode.
    """

    see: Callable[[Tensor, Positions], object]

    def __call__(self, activation: Tensor, where: Positions) -> Tensor:
        self.see(activation, where)
        return activation


# Takes the activation that was read at a site; what it returns is kept instead.
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What one pass returns. Its values at padding are meaningless.

    Attributes:
        logits: Logits (batch, token, vocab), or (batch, 1, vocab) if only those of the last token were asked for.
        activations: What was read at each site, after any edit there.
        cache: The cache to hand to the next pass, if one was asked for.
    """

    logits: Tensor
    activations: Mapping[Site, Tensor] = field(default_factory=dict)
    cache: Any = None


class Pass(Protocol):
    """`Backend.forward` with the sites already fixed."""

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
    """An engine that runs one loaded model. Whatever happens, no hook is left on the model."""

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
        """Run the model on token ids, reading and writing activations at sites. Without gradients, except inside `gradients()`.

        Args:
            ids: Token ids (batch, token), left-padded.
            mask: 1 on real tokens and 0 on padding (batch, cached + token), cached columns included; None without padding.
            cache: The transformers `Cache` of the tokens before, with the same batch rows.
            use_cache: Whether to return a cache for the next pass.
            last_logits_only: Whether to compute the logits of the last token only.
            read: Sites to read.
            write: An edit for each site to write.
            reduce: Applied to each activation as soon as it is read, so that the whole is neither kept nor sent over a network.
        """
        ...

    def passes(
        self, *, read: Sequence[Site] = (), write: Mapping[Site, Edit] | None = None, reduce: Reduce | None = None
    ) -> AbstractContextManager[Pass]:
        """A context that gives a `forward` with fixed sites: the work to prepare it is done once for many passes."""
        ...


class PassByPass:
    """`Backend.passes` for an engine that gains nothing from preparing passes together."""

    forward: Callable[..., Forward]

    @contextmanager
    def passes(
        self, *, read: Sequence[Site] = (), write: Mapping[Site, Edit] | None = None, reduce: Reduce | None = None
    ) -> Iterator[Pass]:
        yield partial(self.forward, read=read, write=write, reduce=reduce)


_GRADIENTS: ContextVar[bool] = ContextVar("_GRADIENTS", default=False)


@contextmanager
def gradients() -> Iterator[None]:
    """A context in which forward passes can be differentiated; outside of it they cannot, whatever mode torch is in.

    Example:
        >>> with gradients():
        ...     logits = model.backend.forward(ids, mask=None, write={site: edit}).logits
        >>> logits[0, -1, token].backward()
    """
    token = _GRADIENTS.set(True)
    try:
        yield
    finally:
        _GRADIENTS.reset(token)


def differentiable() -> bool:
    """Whether this is inside `gradients()`."""
    return _GRADIENTS.get()


def grad_mode() -> AbstractContextManager[object]:
    """The gradient mode of a backend's forward pass: on inside `gradients()`, off elsewhere."""
    return torch.enable_grad() if differentiable() else torch.no_grad()


def cached(cache: Any) -> int:
    """Number of columns in a transformers `Cache`; 0 for None."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (
        ValueError,
        AttributeError,
    ):  # it holds states alone, which do not grow; `count_columns` has noted the number
        return int(getattr(cache, "n_columns", 0))


def count_columns(cache: Any, n: int) -> Any:
    """`cache`, on which the number of columns is noted: caches of models without attention do not know it."""
    cache.n_columns = n
    return cache


def full_mask(ids: Tensor, cache: Any) -> Tensor:
    """The mask (batch, cached + token) of a batch without padding, for an engine that needs one."""
    return ids.new_ones(ids.shape[0], cached(cache) + ids.shape[1])


def positions(ids: Tensor, mask: Tensor | None, cache: Any = None) -> Positions:
    """The positions of `ids` (batch, token), which follow the columns in `cache`; `mask` is (batch, cached + token)."""
    if mask is None:
        before = cached(cache)
        return Positions(
            index=torch.arange(before, before + ids.shape[1], device=ids.device).expand(ids.shape), ids=ids
        )
    index = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, -1)
    return Positions(index=index[:, -ids.shape[1] :], ids=ids)
