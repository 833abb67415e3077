"""nnsight: the same reads and writes as interventions of a trace, on this machine or on NDIF.

The engine runs a twin of the model, which shares its weights, because nnsight instruments every module of the model that it is given.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reasonscope.data.errors import MissingExtraError, SiteError
from reasonscope.probes.architecture.layout import Layout, rerouted
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.backends.base import Edit, Forward, PassByPass, Reduce, full_mask, grad_mode, positions
from reasonscope.probes.backends.hooks import eager_attention
from reasonscope.probes.backends.site_hooks import SiteHook, activations, site_hooks_for
from reasonscope.probes.backends.threads import threads_for_pass
from reasonscope.probes.backends.twin import twin

# The order in which a trace reaches the points of a block; it cannot go back.
_ORDER: tuple[Point, ...] = (
    "embed", "resid_pre", "q", "k", "v", "z", "attn_probs", "attn_out", "mixer_out", "router", "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """What to do at one site, in a form that can be sent to another machine.

    Attributes:
        path: The module.
        value: "input" or "output" of the module.
        touch: What to do with the activation.
        item: Which item to take if the value is a tuple.
        view: The shape in which `touch` sees the activation; None for its own.
        router: Whether the module is a router, which hands on more than its logits.
    """

    path: str
    value: str
    touch: SiteHook
    item: int = 0
    view: tuple[int, ...] | None = None
    router: bool = False


class NNsightBackend(PassByPass):
    """Runs a loaded model inside nnsight's `TransformersModel`. Raises MissingExtraError.

    `remote` is passed on to `trace`: False, True (NDIF, whose errors come through unchanged), "local" (serialised and run here as a
    server would run it) or the address of a server. Unless it is False, edits must be functions that can be pickled.
    """

    name = "nnsight"

    def __init__(self, hf: PreTrainedModel, layout: Layout, *, remote: bool | str = False) -> None:
        self._hf = twin(hf)
        self._layout = layout
        self._d_model = int(hf.config.get_text_config().hidden_size)
        self._remote = remote
        self._engine = _engine(self._hf, travels=bool(remote))

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
        from nnsight import save

        mask = full_mask(ids, cache) if mask is None else mask
        where = positions(ids, mask)
        touch_at = site_hooks_for(read, write, where)
        for site in touch_at:
            self._check(site)
        sites = sorted(touch_at, key=lambda site: (site.layer, _ORDER.index(site.point)))
        visits = [self._visit(site, touch_at[site], ids.shape) for site in sites]
        kept = [i for i, site in enumerate(sites) if site in read]
        engine = self._engine
        with ExitStack() as stack:
            stack.enter_context(grad_mode())
            stack.enter_context(threads_for_pass(ids, self._d_model))
            if any(site.point == "attn_probs" for site in read):
                stack.enter_context(eager_attention(self._hf))
            with engine.trace(
                input_ids=ids,
                attention_mask=mask,
                position_ids=where.index.clamp(min=0),
                past_key_values=cache,
                use_cache=use_cache,
                logits_to_keep=1 if last_logits_only else 0,
                remote=self._remote,
            ):
                # Only saved values come back, and from another machine every byte takes time.
                values = [_pay(engine.get(visit.path), visit) for visit in visits]
                values = save([values[i] if reduce is None else reduce(values[i]) for i in kept])
                logits = save(engine.output.logits)
                cache = save(engine.output.past_key_values if use_cache else None)
        seen = dict(zip((sites[i] for i in kept), values, strict=True))
        return Forward(logits=logits, activations=activations(read, seen, mask.shape[1], reduce), cache=cache)

    def _check(self, site: Site) -> None:
        """Raise SiteError for a site that the model lacks, or that takes more than one module."""
        if not self._layout.place(site).simple:
            raise SiteError(f"{site}: nnsight reads one module at a time, and this site is a sum; use backend='hooks'")

    def _visit(self, site: Site, touch: SiteHook, shape: torch.Size) -> _Visit:
        place = self._layout.place(site)
        view = (*shape, -1) if place.router else None if place.heads is None else (*shape, place.heads, -1)
        return _Visit(path=place.path, value=place.value, touch=touch, item=place.item, view=view, router=place.router)


def _pay(envoy: Any, visit: _Visit) -> Tensor:
    """Apply the visit's hook to the activation while the model runs; returns the activation that the model goes on with."""
    whole = getattr(envoy, visit.value)
    flat: Tensor = whole[visit.item] if isinstance(whole, tuple) else whole
    seen = flat if visit.view is None else flat.view(visit.view)
    after = visit.touch(seen)
    if after is seen:
        return after
    flat = after.reshape(flat.shape)
    if visit.router:
        setattr(envoy, visit.value, rerouted(envoy._module, flat))
    elif isinstance(whole, tuple):
        setattr(envoy, visit.value, (*whole[: visit.item], flat, *whole[visit.item + 1 :]))
    else:
        setattr(envoy, visit.value, flat)
    return after


def _engine(hf: PreTrainedModel, *, travels: bool) -> Any:
    try:
        from nnsight import TransformersModel, register
    except ImportError as error:
        raise MissingExtraError(
            f"backend='nnsight' needs nnsight ({error}): pip install \"reasonscope[nnsight]\""
        ) from error
    if travels:
        register("reasonscope")  # sends our code along with the trace, because servers do not have it installed
    # Without a device, the pipeline inside would move the weights, which the caller's model shares, to the first accelerator.
    placed = {} if getattr(hf, "hf_device_map", None) else {"device": hf.device}
    # nnsight changes the padding of the tokenizer that it is given. We feed ids only, so it gets a tokenizer of its own.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))
    return TransformersModel(hf, tokenizer=tokenizer, **placed)
