"""The native engine: torch hooks on the Hugging Face model itself. It is the fastest, and the reference for the other backends."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reasonscope.probes.architecture.layout import Layout, head_count
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Forward, Pass, Reduce, cached, grad_mode, positions
from reasonscope.probes.backends.site_hooks import SiteHook, activations, keep_activation, site_hooks_for
from reasonscope.probes.backends.threads import threads_for_pass


class HooksBackend:
    """Reads and writes through hooks that last as long as their passes. Works for any PreTrainedModel, spread by accelerate or not."""

    name = "hooks"

    def __init__(self, hf: PreTrainedModel, layout: Layout) -> None:
        self._hf = hf
        self._layout = layout
        self._d_model = int(hf.config.get_text_config().hidden_size)

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
        """See `Backend.forward`. A pass that reads `attn_probs` runs with eager attention."""
        with self.passes(read=read, write=write, reduce=reduce) as run:
            return run(ids, mask=mask, cache=cache, use_cache=use_cache, last_logits_only=last_logits_only)

    @contextmanager
    def passes(
        self, *, read: Sequence[Site] = (), write: Mapping[Site, Edit] | None = None, reduce: Reduce | None = None
    ) -> Iterator[Pass]:
        """See `Backend.passes`. The hooks stay on the model throughout, but do nothing between passes."""
        now: dict[Site, SiteHook] = {}
        seen: dict[Site, Tensor] = {}

        def run(
            ids: Tensor,
            *,
            mask: Tensor | None,
            cache: Any = None,
            use_cache: bool = False,
            last_logits_only: bool = False,
        ) -> Forward:
            where = positions(ids, mask, cache)
            n_keys = cached(cache) + ids.shape[1]
            seen.clear()
            now.update(site_hooks_for(read, write, where))
            try:
                with grad_mode(), threads_for_pass(ids, self._d_model):
                    output = self._hf(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=where.index if mask is None else where.index.clamp(min=0),
                        past_key_values=cache,
                        use_cache=use_cache,
                        logits_to_keep=1 if last_logits_only else 0,
                    )
            finally:
                now.clear()
            return Forward(
                logits=output.logits,
                activations=activations(read, seen, n_keys, reduce),
                cache=output.past_key_values if use_cache else None,
            )

        def touch_at(site: Site) -> SiteHook:
            def touch(activation: Tensor) -> Tensor:
                return keep_activation(now[site], site, seen, reduce)(activation) if now else activation

            return touch

        with ExitStack() as stack:
            if any(site.point == "attn_probs" for site in read):
                stack.enter_context(eager_attention(self._hf))
            for site in dict.fromkeys((*(write or {}), *read)):
                stack.enter_context(hook_site(self._hf, self._layout, site, touch_at(site)))
            yield run


@contextmanager
def eager_attention(hf: PreTrainedModel) -> Iterator[None]:
    """A context in which the model computes and returns attention weights, which fused kernels never build."""
    before = hf.config.get_text_config()._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def hook_site(hf: PreTrainedModel, layout: Layout, site: Site, touch: SiteHook) -> AbstractContextManager[object]:
    """A context in which every pass of `hf` hands the activation at `site` to `touch` and goes on with what it returns.

    It is a bare handle of torch, which removes its hook on exit: wrapping it in a context of our own would cost as much as a small layer.
    """
    module = layout.module(hf, site)
    if site.point == "router":
        return _hook_router(layout.block(hf, site.layer), module, layout, touch)
    if site.point in ("resid_pre", "z"):
        n_heads = head_count(hf.config) if site.point == "z" else None
        return module.register_forward_pre_hook(_input_hook(touch, n_heads), with_kwargs=True)
    return module.register_forward_hook(_output_hook(touch, 1 if site.point == "attn_probs" else 0))


@contextmanager
def _removing(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(touch: SiteHook, n_heads: int | None) -> Callable[..., Any]:
    """A hook on the first argument, split into heads if their number is given."""

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        flat = args[0] if args else kwargs["hidden_states"]
        seen = flat if n_heads is None else flat.unflatten(-1, (n_heads, -1))
        after = touch(seen)
        if after is seen:
            return None
        after = after.reshape(flat.shape)
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": after})

    return hook


def _output_hook(touch: SiteHook, item: int) -> Callable[..., Any]:
    """A hook on the output, or on one item of the output if that is a tuple."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        seen = output[item] if isinstance(output, tuple) else output
        after = touch(seen)
        if after is seen:
            return None
        return (*output[:item], after, *output[item + 1 :]) if isinstance(output, tuple) else after

    return hook


def _hook_router(block: nn.Module, router: nn.Module, layout: Layout, touch: SiteHook) -> AbstractContextManager[None]:
    """Routers see batch and token as one axis; the block's input still has both, so a hook there remembers the shape."""
    shape: list[torch.Size] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = [(args[0] if args else kwargs["hidden_states"]).shape[:2]]

    def hook(module: nn.Module, _: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen = output[0].reshape(*shape[0], -1)
        after = touch(seen)
        if after is seen:
            return None
        assert layout.route is not None
        return layout.route(module, after.flatten(0, 1))

    return _removing(block.register_forward_pre_hook(remember, with_kwargs=True), router.register_forward_hook(hook))
