"""Many continuations of one sequence: its keys and values are computed once, and every continuation branches off them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.progress import working
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.cache import growing_cache
from reasonscope.probes.generation.decoding import BatchProgress, Completion, Past, generate
from reasonscope.probes.generation.padding import check_vocabulary
from reasonscope.probes.models.model import Model


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A continuation to write: after the first `cut` tokens of the sequence and then `stub`, drawn with `seed`."""

    cut: int
    seed: int
    stub: tuple[int, ...] = ()


class Writer(Protocol):
    """Completes token ids: a model of this process, or a server."""

    def __call__(self, token_ids: Sequence[int], branches: Sequence[Branch], sampling: Sampling) -> list[Completion]:
        """A completion of each branch, in their order; its prompt is the cut with the stub."""
        ...


class PrefixWriter:
    """Writes branches with a model of this process. The completions are those of `generate` on every prefix, up to rounding.

    The sequence runs once, up to the last cut. Each branch copies the keys and values of its prefix, so a batch takes `batch_size` times
    the memory of the cache of the whole sequence, but no prefix is computed twice. A model with recurrent or convolutional states, which
    tell nothing of an earlier cut, feeds every prefix whole.
    """

    def __init__(self, model: Model, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise InputError(f"invalid batch size {batch_size}: at least 1 is needed")
        self.model = model
        self._batch_size = batch_size

    def __call__(self, token_ids: Sequence[int], branches: Sequence[Branch], sampling: Sampling) -> list[Completion]:
        """As `Writer` says. Raises InputError for a cut outside the sequence, ContextError for a branch without room."""
        ids = [int(token) for token in token_ids]
        _check(ids, branches, self.model)
        if not branches:
            return []
        shared = _keys_and_values(self.model, ids[: max(branch.cut for branch in branches)])
        if shared is None:
            return SequenceWriter(self.model, batch_size=self._batch_size)(ids, branches, sampling)
        done: dict[int, Completion] = {}
        with working("writing", total=len(branches), unit="continuations") as work:
            progress = BatchProgress(work, len(branches), sampling.max_new_tokens)
            for batch in self._batches(branches):
                chosen = [branches[i] for i in batch]
                prompts = [[*ids[: branch.cut], *branch.stub] for branch in chosen]
                past = _past(shared, [len(prompt) - max(len(chosen[0].stub), 1) for prompt in prompts])
                seeds = [branch.seed for branch in chosen]
                completed = generate(self.model, prompts, sampling, seeds=seeds, on_step=progress.on_step, past=past)
                done |= dict(zip(batch, completed, strict=True))
                progress.batch_done(len(batch))
        return [done[i] for i in range(len(branches))]

    def _batches(self, branches: Sequence[Branch]) -> Iterator[list[int]]:
        """Stubs of the same length together, because the first pass has to end in the same column in every row."""
        order = sorted(range(len(branches)), key=lambda i: (len(branches[i].stub), branches[i].cut))
        for _, alike in groupby(order, key=lambda i: len(branches[i].stub)):
            same = list(alike)
            yield from (same[start : start + self._batch_size] for start in range(0, len(same), self._batch_size))


class SequenceWriter:
    """Writes branches as `PrefixWriter` does, but feeds every prefix whole: slower, and right for a model whose passes are edited.

    Such an edit has to see all tokens of a sequence, which a cache that another pass filled does not tell.
    """

    def __init__(self, model: Model, *, batch_size: int = 32, processors: Sequence[LogitsProcessor] = ()) -> None:
        self.model = model
        self._batch_size, self._processors = batch_size, tuple(processors)

    def __call__(self, token_ids: Sequence[int], branches: Sequence[Branch], sampling: Sampling) -> list[Completion]:
        """As `Writer` says. Raises as `PrefixWriter` does."""
        ids = [int(token) for token in token_ids]
        _check(ids, branches, self.model)
        order = sorted(range(len(branches)), key=lambda i: branches[i].cut + len(branches[i].stub))
        done: dict[int, Completion] = {}
        with working("writing", total=len(branches), unit="continuations") as work:
            progress = BatchProgress(work, len(branches), sampling.max_new_tokens)
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                completed = generate(
                    self.model,
                    [[*ids[: branches[i].cut], *branches[i].stub] for i in batch],
                    sampling,
                    seeds=[branches[i].seed for i in batch],
                    on_step=progress.on_step,
                    processors=self._processors,
                )
                done |= dict(zip(batch, completed, strict=True))
                progress.batch_done(len(batch))
        return [done[i] for i in range(len(branches))]


def _check(ids: Sequence[int], branches: Sequence[Branch], model: Model) -> None:
    check_vocabulary([ids], model.vocabulary)
    for branch in branches:
        if not 1 <= branch.cut <= len(ids):
            raise InputError(f"invalid cut {branch.cut}: it has to be from 1 to {len(ids)}, the length of the sequence")
        if branch.cut + len(branch.stub) >= model.context_length:
            raise ContextError(
                f"the first {branch.cut} tokens and a stub of {len(branch.stub)} leave no room in the context of "
                f"{model.context_length}; cut earlier, or leave the trace out"
            )


def _keys_and_values(model: Model, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values (1, kv_head, token, d_head) of each layer; None if a layer has other states. A cache without configuration keeps
    every token of windowed layers, too: branches at an early cut need them, and the mask holds the window."""
    if model.layout.layers_with("mixer_out"):
        return None
    fed = torch.tensor([list(ids)], device=model.device)
    out = model.backend.forward(
        fed, mask=torch.ones_like(fed), cache=DynamicCache(), use_cache=True, last_logits_only=True
    )
    layers = getattr(out.cache, "layers", [])
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        return None
    return [(layer.keys, layer.values) for layer in layers]


def _past(shared: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> Past | None:
    """A cache with one row per branch: the first `lengths[row]` tokens of the sequence, left-padded."""
    width = max(lengths)
    if width == 0:
        return None
    cache = growing_cache()
    for layer, both in enumerate(shared):
        rows = []
        for tensor in both:
            padded = tensor.new_zeros(len(lengths), tensor.shape[1], width, tensor.shape[3])
            for row, n in enumerate(lengths):
                padded[row, :, width - n :] = tensor[0, :, :n]
            rows.append(padded)
        cache.update(rows[0], rows[1], layer)
    return Past(cache=cache, columns=width)
