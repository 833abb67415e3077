"""TransformerLens: the same reads and writes through the hook points of a `TransformerBridge`.

The bridge runs a twin of the model, which shares its weights, because it replaces submodules of the model that it is given. Weights stay
as Hugging Face has them (norms are not folded in, nothing is centred), and attention is always eager. The bridge is built with
`build_bridge_from_module`, because `boot_transformers` needs a tokenizer: without one it asks the hub, and it changes the one it gets.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonscope.data.errors import ArchitectureError, MissingExtraError, SiteError
from reasonscope.probes.architecture.layout import Layout, rerouted
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Forward, PassByPass, Reduce, full_mask, grad_mode, positions
from reasonscope.probes.backends.site_hooks import SiteHook, activations, site_hooks_for
from reasonscope.probes.backends.threads import threads_for_pass
from reasonscope.probes.backends.twin import twin

# Like ours, the bridge's `hook_attn_out` and `hook_mlp_out` come after the post-norms, if the family has any.
_HOOKS = {
    "resid_pre": "hook_in",
    "resid_post": "hook_out",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "attn_probs": "attn.hook_pattern",
}

# The name of a hook point, and the function that the bridge calls there with (activation, hook=point).
_Hook = tuple[str, Callable[..., Tensor | None]]


def _keep_activation(touch: SiteHook, site: Site, seen: dict[Site, Tensor], reduce: Reduce | None = None) -> SiteHook:
    """`touch`, which also puts the activation after it into `seen`, reduced if `reduce` is given."""

    def record(activation: Tensor) -> Tensor:
        after = touch(activation)
        seen[site] = after if reduce is None else reduce(after)
        return after

    return record


class TransformerLensBackend(PassByPass):
    """Runs a loaded model inside a `TransformerBridge`. Raises MissingExtraError, or ArchitectureError if it cannot bridge the model."""

    name = "transformer_lens"

    def __init__(self, hf: PreTrainedModel, layout: Layout) -> None:
        self._hf = hf
        self._layout = layout
        self._d_model = int(hf.config.get_text_config().hidden_size)
        self._bridge = _bridge(hf)

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
        """See `Backend.forward`."""
        mask = full_mask(ids, cache) if mask is None else mask
        where = positions(ids, mask)
        seen: dict[Site, Tensor] = {}
        hooks = [
            hook
            for site, touch in site_hooks_for(read, write, where).items()
            for hook in self._hooks(site, _keep_activation(touch, site, seen, reduce), ids.shape)
        ]
        with grad_mode(), threads_for_pass(ids, self._d_model), self._bridge.hooks(fwd_hooks=hooks):
            logits, cache = self._bridge(
                ids,
                attention_mask=mask,
                position_ids=where.index.clamp(min=0),
                past_key_values=cache,
                use_cache=use_cache,
                logits_to_keep=1 if last_logits_only else 0,
                return_type="logits_and_cache",
            )
        return Forward(
            logits=logits,
            activations=activations(read, seen, mask.shape[1], reduce),
            cache=cache if use_cache else None,
        )

    def _hooks(self, site: Site, touch: SiteHook, shape: torch.Size) -> list[_Hook]:
        module = self._layout.module(self._hf, site)  # raises for layers and points that this model does not have
        layout = self._layout.of_block[site.layer]
        if site.point not in ("router", *_HOOKS):
            raise SiteError(f"{site}: backend='transformer_lens' reads no {site.point}; use backend='hooks'")
        hooks: list[_Hook]
        block = f"blocks.{site.layer}."
        name = block + (f"{layout.router}.hook_out" if site.point == "router" else _HOOKS[site.point])
        if site.point == "z":  # the bridge splits heads wrongly if values and keys differ in width (DeepSeek)
            heads = layout.n_heads
            hooks = [(name, lambda seen, hook: touch(seen.reshape(*shape, heads, -1)).reshape(seen.shape))]
        elif site.point == "router":
            hooks = _router_hooks(name.removesuffix("hook_out"), touch, shape, partial(rerouted, module))
        else:
            hooks = [(name, lambda activation, hook: touch(activation))]
        for name, _ in hooks:
            if self._bridge.get_hook_point(name) is None:
                raise SiteError(f"{site}: TransformerLens has no hook point {name} on this model; use backend='hooks'")
        return hooks


def _router_hooks(
    prefix: str, touch: SiteHook, shape: torch.Size, route: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> list[_Hook]:
    """The bridge shows the router's logits, but computes nothing from them: edited scores and experts are set at two later points."""
    routed: list[tuple[Tensor, Tensor]] = []

    def logits_hook(logits: Tensor, hook: object) -> Tensor | None:
        seen = logits.view(*shape, -1)
        after = touch(seen)
        if after is seen:
            return None
        after, scores, experts = route(after.flatten(0, 1))
        routed.append((scores, experts))
        return after

    def weights_hook(weights: Tensor, hook: object) -> Tensor | None:
        if not routed:
            return None
        scores, experts = routed[0]
        return scores if weights.shape == scores.shape else torch.zeros_like(weights).scatter(-1, experts, scores)

    def indices_hook(indices: Tensor, hook: object) -> Tensor | None:
        return routed[0][1] if routed else None

    return [
        (f"{prefix}hook_out", logits_hook),
        (f"{prefix}hook_expert_weights", weights_hook),
        (f"{prefix}hook_expert_indices", indices_hook),
    ]


def _bridge(hf: PreTrainedModel) -> Any:
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise MissingExtraError(
            f"backend='transformer_lens' needs TransformerLens ({error}): pip install \"reasonscope[transformer-lens]\""
        ) from error
    model = twin(hf)
    model.set_attn_implementation("eager")
    try:
        return build_bridge_from_module(model, type(hf).__name__, hf_config=model.config)
    except (ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ArchitectureError(
            f"TransformerLens cannot bridge {type(hf).__name__}: {str(error)[:200]}; use backend='hooks'"
        ) from error
