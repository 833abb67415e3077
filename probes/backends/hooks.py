"""The native engine: torch hooks on the Hugging Face model itself. It is the fastest, and the reference for the other backends."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reasonscope.probes.architecture.layout import Layout, Place, Term, rerouted
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import (
    Edit,
    Forward,
    Look,
    Pass,
    Positions,
    Reduce,
    cached,
    count_columns,
    differentiable,
    positions,
)
from reasonscope.probes.backends.compiled import eagerly, eagerly_if_compiled
from reasonscope.probes.backends.inference import make_ordinary, ordinary, outside_inference
from reasonscope.probes.backends.site_hooks import SiteHook, activations, checked_edit
from reasonscope.probes.backends.threads import threads_for_pass


def _pass_mode() -> AbstractContextManager[object]:
    """The mode of a native pass: gradients inside `gradients()`, inference elsewhere."""
    return torch.enable_grad() if differentiable() else torch.inference_mode()


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
        now: list[Positions] = []  # of the pass that runs
        seen: dict[Site, Tensor] = {}
        edits = write or {}

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
            if differentiable():
                make_ordinary(cache)
            seen.clear()
            now.append(where)
            try:
                with _pass_mode(), threads_for_pass(ids, self._d_model):
                    output = call_model(
                        self._hf,
                        ids,
                        mask,
                        position_ids=where.index if mask is None else where.index.clamp(min=0),
                        past_key_values=cache,
                        use_cache=use_cache,
                        logits_to_keep=1 if last_logits_only else 0,
                    )
            finally:
                now.clear()
            logits = ordinary(output.logits)
            return Forward(
                logits=logits[:, -1:] if last_logits_only else logits,
                activations=activations(read, {site: ordinary(kept) for site, kept in seen.items()}, n_keys, reduce),
                cache=count_columns(_cache_of(output), n_keys) if use_cache else None,
            )

        def reading(site: Site) -> SiteHook:
            def touch(activation: Tensor) -> Tensor:
                if now:
                    seen[site] = activation if reduce is None else reduce(activation)
                return activation

            return touch

        def writing(edit: Edit, then: SiteHook) -> SiteHook:
            edited = outside_inference(lambda activation: edit(activation, now[0]))
            return lambda activation: then(edited(activation)) if now else activation

        def looking(look: Look, then: SiteHook) -> SiteHook:
            def touch(activation: Tensor) -> Tensor:
                if now:
                    look.see(activation, now[0])
                return then(activation)

            return touch

        def touch_at(site: Site) -> SiteHook:
            keep = reading(site) if site in read else _same
            if site not in edits:
                return keep
            edit, checked = edits[site], checked_edit(site, edits[site])
            return looking(edit, keep) if isinstance(edit, Look) else writing(checked, keep)

        with ExitStack() as stack:
            stack.enter_context(eagerly_if_compiled(self._hf))
            if any(site.point == "attn_probs" for site in read):
                stack.enter_context(eager_attention(self._hf))
            for site in dict.fromkeys((*edits, *read)):
                stack.enter_context(_hooked(self._hf, self._layout, site, touch_at(site)))
            yield run


def _same(activation: Tensor) -> Tensor:
    return activation


def call_model(hf: PreTrainedModel, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """Run the model on token ids. Of `options`, models get those that they know: some count positions from the mask, some have no cache."""
    known, takes_any = _parameters(type(hf).forward)
    given = {"attention_mask": mask, "use_cache": False, **options}
    if "cache_params" in known:  # what state-space models call their cache
        given["cache_params"] = given.pop("past_key_values", None)
        # They multiply what is fed by its own mask, where attention needs that of all tokens so far.
        given["attention_mask"] = None if mask is None else mask[:, -ids.shape[1] :]
    return hf(input_ids=ids, **{name: value for name, value in given.items() if takes_any or name in known})


def _cache_of(output: Any) -> Any:
    return output.cache_params if "cache_params" in output else output.past_key_values


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The names that a forward pass takes, and whether it takes any other."""
    parameters = inspect.signature(forward).parameters.values()
    return frozenset(one.name for one in parameters), any(one.kind is one.VAR_KEYWORD for one in parameters)


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

    `touch` gets ordinary tensors, also in passes that run in inference mode. What is compiled runs eagerly inside, or it would not call it.
    """
    with ExitStack() as stack:
        stack.enter_context(_hooked(hf, layout, site, outside_inference(touch)))
        stack.enter_context(eagerly())
        return stack.pop_all()


def _hooked(hf: PreTrainedModel, layout: Layout, site: Site, touch: SiteHook) -> AbstractContextManager[object]:
    """A bare handle of torch, which removes its hook on exit: wrapping it in a context of our own costs as much as a small layer."""
    place = layout.place(site)
    module = hf.get_submodule(place.path)
    if place.router:
        return _hook_router(layout.block(hf, site.layer), module, touch)
    if not place.simple:
        return _hook_sum(hf, layout.block(hf, site.layer), place, touch)
    if place.value == "input":
        return module.register_forward_pre_hook(_input_hook(touch, place.heads), with_kwargs=True)
    return module.register_forward_hook(_output_hook(touch, place))


@contextmanager
def _removing(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module works on: its first argument, or the first tensor among the named ones."""
    if args:
        return args[0]  # type: ignore[no-any-return]  # modules take a tensor first
    return kwargs[_hidden_name(kwargs)]  # type: ignore[no-any-return]  # likewise


def _hidden_name(kwargs: Mapping[str, Any]) -> str:
    return "hidden_states" if "hidden_states" in kwargs else next(k for k, v in kwargs.items() if isinstance(v, Tensor))


def _input_hook(touch: SiteHook, n_heads: int | None) -> Callable[..., Any]:
    """A hook on the first argument, split into heads if their number is given."""

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        flat = hidden_input(args, kwargs)
        seen = flat if n_heads is None else flat.unflatten(-1, (n_heads, -1))
        after = touch(seen)
        if after is seen:
            return None
        after = after.reshape(flat.shape)
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, _hidden_name(kwargs): after})

    return hook


def _output_hook(touch: SiteHook, place: Place) -> Callable[..., Any]:
    """A hook on the output, or on one item of the output if that is a tuple; split into heads if their number is given."""
    item, heads = place.item, place.heads

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        flat = output[item] if isinstance(output, tuple) else output
        seen = flat if heads is None else flat.unflatten(-1, (heads, -1))
        after = touch(seen)
        if after is seen:
            return None
        after = after.reshape(flat.shape)
        return (*output[:item], after, *output[item + 1 :]) if isinstance(output, tuple) else after

    return hook


def _hook_sum(hf: PreTrainedModel, block: nn.Module, place: Place, touch: SiteHook) -> AbstractContextManager[None]:
    """A sum of scaled outputs is complete when the last of its modules ends; an edit of the sum changes what that one gives."""
    terms = (*place.earlier, Term(path=place.path, scale=place.scale))
    kept: dict[Term, Tensor] = {}

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.clear()
        kept.update({term: hidden_input(args, kwargs) for term in terms if term.entering})

    def ending(term: Term) -> SiteHook:
        def end(output: Tensor) -> Tensor:
            kept[term] = output
            if len(kept) < len(terms):
                return output
            seen = _total([(kept[one], one.scale) for one in terms])
            after = touch(seen)
            return output if after is seen else output + ((after - seen) / term.scale).to(output.dtype)

        return end

    hooks = [
        hf.get_submodule(term.path).register_forward_hook(_output_hook(ending(term), Place()))
        for term in terms
        if not term.entering
    ]
    return _removing(block.register_forward_pre_hook(begin, with_kwargs=True), *hooks)


def _total(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    first, *rest = (part if scale == 1.0 else part * scale for part, scale in parts)
    return sum(rest, start=first)


def _hook_router(block: nn.Module, router: nn.Module, touch: SiteHook) -> AbstractContextManager[None]:
    """Routers see batch and token as one axis; the block's input still has both, so a hook there remembers the shape."""
    shape: list[torch.Size] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = [hidden_input(args, kwargs).shape[:2]]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        flat = output[0] if isinstance(output, tuple) else output
        seen = flat.reshape(*shape[0], -1)
        after = touch(seen)
        if after is seen:
            return None
        if not isinstance(output, tuple):
            return after.reshape(flat.shape)
        return rerouted(module, after.reshape(flat.shape), *args, **kwargs)

    return _removing(
        block.register_forward_pre_hook(remember, with_kwargs=True),
        router.register_forward_hook(hook, with_kwargs=True),
    )
