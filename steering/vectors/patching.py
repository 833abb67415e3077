"""Edits of the user's own calls of `model.hf`, including `hf.generate`, until they are removed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reasonscope.data.errors import InputError
from reasonscope.probes.backends.attached import attached
from reasonscope.probes.backends.base import Edit, Positions, positions
from reasonscope.probes.backends.hooks import hook_site
from reasonscope.probes.backends.site_hooks import SiteHook
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.intervention import Intervention, require_edits


class PatchHandle:
    """Hooks on a model. `n_edited` counts the tokens edited so far; `remove` may be called twice."""

    def __init__(self, intervention: Intervention, calls: "_Calls", hooks: ExitStack) -> None:
        self._intervention, self._calls, self._hooks = intervention, calls, hooks

    @property
    def n_edited(self) -> int:
        return self._intervention.n_edited

    @property
    def passes(self) -> int:
        """Calls of the model so far."""
        return self._calls.count

    def remove(self) -> None:
        self._hooks.close()


@contextmanager
def patched(model: Model, intervention: Intervention, *, name: str) -> Iterator[PatchHandle]:
    """Edits `model.hf` inside the block only. Raises InputError if passes were run and no token was edited."""
    handle = patch(model, intervention)
    try:
        yield handle
    finally:
        handle.remove()
    if handle.passes:
        require_edits(intervention, name)


def patch(model: Model, intervention: Intervention) -> PatchHandle:
    """Edit every pass of `model.hf` until the handle's `remove` is called.

    It uses native hooks whichever backend the model has, so it acts on `model.hf` only (and on the passes of the backend `hooks`). The
    cache tells prompts from generated tokens: a pass without one starts again, and all of it is prompt. The rows of a batch have to stay
    in place, so beam search is refused; `rollouts` drops finished rows and takes `write=` and `on_step=` instead.

    Args:
        model: The model.
        intervention: What to do; for a vector see also `SteeringVector.apply`.

    Returns:
        A handle that counts the edited tokens and removes the hooks.

    Raises:
        SiteError: For a site that the model does not have; no hook is left.

    Example:
        handle = patch(model, Steering(vector, 0.5, Scope()))
        model.hf.generate(ids, max_new_tokens=50)
        handle.remove()
    """
    calls = _Calls(intervention)
    with ExitStack() as hooks:
        hooks.enter_context(attached(model.hf))
        hooks.callback(model.hf.register_forward_pre_hook(calls.hook, with_kwargs=True).remove)
        for site, edit in intervention.edits.items():
            hooks.enter_context(hook_site(model.hf, model.layout, site, calls.touch(edit)))
        return PatchHandle(intervention, calls, hooks.pop_all())


class _Calls:
    """Follows the calls of a Hugging Face model, and the positions of the columns of each."""

    def __init__(self, intervention: Intervention) -> None:
        self._intervention = intervention
        self._where: Positions | None = None
        self._n_seen = self._n_rows = 0
        self.count = 0

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each pass."""
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise InputError(
                "steering needs the token ids of a pass; call the model with input_ids, not with inputs_embeds"
            )
        cache = kwargs.get("past_key_values")
        n_cached = int(cache.get_seq_length()) if cache is not None else 0
        if cache is not None:
            cache.reorder_cache = _refuse_reordering
        self._where = positions(ids, _mask(kwargs.get("attention_mask"), ids, n_cached))
        if n_cached and (n_cached, len(ids)) != (self._n_seen, self._n_rows):
            raise InputError(
                f"the cache holds {n_cached} tokens of {len(ids)} sequences, but {self._n_seen} tokens of {self._n_rows} were seen here; "
                "patch the model before the prompt is fed, and use rollouts(write=…, on_step=…) to drop finished rows"
            )
        rows = torch.arange(len(ids), device=ids.device)
        self._intervention.on_step(DecodingStep(index=n_cached, rows=rows, ids=ids))
        self._n_seen, self._n_rows = n_cached + ids.shape[1], len(ids)
        self.count += 1

    def touch(self, edit: Edit) -> SiteHook:
        def touch(activation: Tensor) -> Tensor:
            assert self._where is not None
            return edit(activation, self._where)

        return touch


def _refuse_reordering(*_: object) -> None:
    raise InputError(
        "beam search reorders the sequences between passes, so that an edit would follow the wrong ones; generate with num_beams=1"
    )


def _mask(mask: object, ids: Tensor, n_cached: int) -> Tensor:
    if mask is None:
        return ids.new_ones(len(ids), n_cached + ids.shape[1])
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise InputError("steering needs an attention mask (batch, token) of ones and zeros, or no mask")
    return mask[:, : n_cached + ids.shape[1]].long()
