"""A recipe on a model that reads finished text: every pass is edited as the model was while it wrote."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.backends.attached import attached
from reasonscope.probes.backends.base import Edit, Positions, cached, positions
from reasonscope.probes.backends.hooks import hook_site
from reasonscope.probes.backends.site_hooks import SiteHook
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model
from reasonscope.steering.recipes.controls import ADAPTIVE
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.application import as_intervention
from reasonscope.steering.vectors.intervention import Composed, MaskedEdit


def recipe_of_run(store: TraceStore) -> Recipe | None:
    """The recipe that steered the traces of a store; None for traces of the plain model.

    Raises InputError if the store holds another recipe than its traces name.
    """
    if store.recipe is None:
        return None
    recipe = Recipe.load(store.recipe)
    if recipe.hash != store.meta["steered"]["hash"]:
        raise InputError(
            f"{store.recipe} is not the recipe that steered the traces ({store.meta['steered']['hash']}); restore it from a copy"
        )
    return recipe


def follow(model: Model, recipe: Recipe, prompts: Iterable[Sequence[int]]) -> ExitStack:
    """Edit every pass of the model as the recipe says, until the result is closed.

    The tokens of a pass decide which of them are edited, as they did while the model wrote; so the edits are those of the recording. A
    sequence that begins with one of `prompts` (token ids) was generated from there on; any other sequence counts as prompt. It acts on
    the Hugging Face model, whatever reads from it. Processors are not applied: a text that is read is not chosen again.

    Raises InputError or SiteError if the recipe does not fit the model, or adapts its strength while the model writes; as it runs, for a
    pass whose earlier tokens are not known.
    """
    if any(part.name == ADAPTIVE for part in recipe.controls):
        raise InputError(
            f"{recipe.name} adapts its strength to what the model has just written, so a finished text cannot be read again as it was "
            "steered; analyses of what the run stored need no model"
        )
    uses = recipe.uses(model)
    with ExitStack() as hooks:
        if uses:
            steering = as_intervention(uses, 1.0, measure=False)
            reader = _Reader(steering, prompts)
            hooks.enter_context(attached(model.hf))
            hooks.callback(model.hf.base_model.register_forward_pre_hook(reader.hook, with_kwargs=True).remove)
            for site, edit in steering.edits.items():
                hooks.enter_context(hook_site(model.hf, model.layout, site, reader.at(edit)))
        return hooks.pop_all()


class _Reader:
    """Follows the passes of a model by their tokens: whole sequences, steps of a generation, and the rest of a sequence just read."""

    def __init__(self, steering: MaskedEdit | Composed, prompts: Iterable[Sequence[int]]) -> None:
        self._steering = steering
        self._prompts = {tuple(int(token) for token in prompt) for prompt in prompts}
        self._lengths = sorted({len(prompt) for prompt in self._prompts}, reverse=True)
        self._where: Positions | None = None
        self._fed = torch.empty(0)  # (batch, token) so far, -1 on padding
        self._n_prompt = torch.empty(0)  # (batch,)
        self._cache: Any = None

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each pass."""
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise InputError(
                "a recipe needs the token ids of a pass; call the model with input_ids, not with inputs_embeds"
            )
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        start = cached(cache) or _start(kwargs.get("position_ids"), mask)
        if start:
            self._continue(ids, cache, start)
        else:
            self._begin(ids, mask, cache)

    def at(self, edit: Edit) -> SiteHook:
        def touch(activation: Tensor) -> Tensor:
            assert self._where is not None
            return edit(activation, self._where)

        return touch

    def _begin(self, ids: Tensor, mask: Tensor | None, cache: Any) -> None:
        if mask is not None and mask.dim() != 2:
            raise InputError("a recipe needs an attention mask (batch, token) of ones and zeros, or no mask")
        self._where = positions(ids, mask)
        self._fed = ids.masked_fill(self._where.index < 0, -1)
        n_prompt = [self._given([token for token in row if token >= 0]) for row in self._fed.tolist()]
        self._n_prompt = torch.tensor(n_prompt, device=ids.device)
        self._steering.begin(n_prompt)
        self._watch(cache)

    def _continue(self, ids: Tensor, cache: Any, start: int) -> None:
        """The next tokens of the sequences that were fed; without a cache, a copy of the rest of one, again."""
        known, n_prompt = self._fed, self._n_prompt
        same = known.shape[:2] == (1, start + ids.shape[1])
        if cache is None and same and torch.equal(known[:, start:].expand(ids.shape), ids):
            known, n_prompt = known[:, :start].expand(len(ids), -1), n_prompt.expand(len(ids))
        elif cache is None or cache is not self._cache or known.shape != (len(ids), start):
            raise InputError(
                "this pass continues from tokens that are not known, so a recipe cannot tell which ones it edits; feed whole sequences"
            )
        whole = torch.cat([known, ids], dim=1)
        index = ((whole >= 0).cumsum(dim=1) - 1).masked_fill(whole < 0, -1)[:, start:]
        rows = torch.arange(len(ids), device=ids.device)
        self._where = Positions(index=index, ids=ids)
        self._steering.resume(known, n_prompt)
        self._steering.on_step(DecodingStep(index=start, rows=rows, ids=ids))
        if cache is not None:
            self._fed = whole

    def _watch(self, cache: Any) -> None:
        """Follow which rows of the cache stay."""
        if cache is None or cache is self._cache:
            return
        self._cache, select = cache, cache.batch_select_indices

        def selected(indices: Tensor) -> Any:
            if cache is self._cache:
                kept = indices.to(self._fed.device)
                self._fed, self._n_prompt = self._fed[kept], self._n_prompt[kept]
            return select(indices)

        cache.batch_select_indices = selected

    def _given(self, row: Sequence[int]) -> int:
        """How many tokens of a sequence are prompt."""
        return next((n for n in self._lengths if tuple(row[:n]) in self._prompts), len(row))


def _start(places: Tensor | None, mask: Tensor | None) -> int:
    """The position of the first token that is fed; 0 if padding comes first."""
    return int(places.min()) if places is not None and mask is None else 0
