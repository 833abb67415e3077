"""The one decoding loop, the same for every backend: sampling, stopping, and capture or edits while the model writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import ContextError, InputError, SiteError
from reasonscope.data.progress import Work, count_tokens
from reasonscope.data.trace import FinishReason, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Pass
from reasonscope.probes.backends.threads import threads_for_pass
from reasonscope.probes.generation.cache import growing_cache
from reasonscope.probes.generation.padding import check_vocabulary, left_padded
from reasonscope.probes.models.model import Model


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and what the model wrote after it.

    Attributes:
        token_ids: (token,) int64, the prompt and then the generated tokens with the stop token, if any.
        n_prompt_tokens: How many of them are the prompt.
        finish_reason: "stop" for a stop token, "length" if the token limit or the context was reached.
        logprobs: (generated token,) float32, log-probability of each generated token in nats, at the sampling temperature (1 if that
            is 0), after the logits processors and penalties, before top_k, top_p and min_p.
        entropies: (generated token,) float32, entropy of the same distributions in nats.
        activations: By site, (prompt + generated − 1, …) in the model's dtype; the last token is never fed back.
    """

    token_ids: NDArray[np.int64]
    n_prompt_tokens: int
    finish_reason: FinishReason
    logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32]
    activations: Mapping[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values of the first `columns` columns of a left-padded batch, in a transformers `Cache` with its rows."""

    cache: object
    columns: int


@dataclass(frozen=True, kw_only=True)
class DecodingStep:
    """A forward pass of `generate` that is about to run.

    Attributes:
        index: 0 for the pass over the prompts, then 1, 2, … for passes over one token per row.
        rows: (batch,), the index of the prompt that each row continues. Finished rows are dropped, so an edit that keeps state per
            sequence has to follow this.
        ids: (batch, token), the tokens that are fed; left-padded if `index` is 0.
        n_prompt: (batch,), how many tokens each prompt has; known if `index` is 0.
    """

    index: int
    rows: Tensor
    ids: Tensor
    n_prompt: Tensor | None = None


class BatchProgress:
    """Follows `generate` over several batches, so that `work` moves with every token: finished rows, and the share of all steps.

    The number of steps of a batch is estimated by the mean of the finished batches; until one has finished, `longest` is its bound.
    """

    def __init__(self, work: Work, n_rows: int, longest: int) -> None:
        self._work, self._n_rows, self._longest = work, n_rows, longest
        self._rows_done = self._size = self._n_steps = 0
        self._lengths: list[int] = []

    def on_step(self, step: DecodingStep) -> None:
        """Follow a step; give this as `on_step` to `generate`."""
        n_running = len(step.rows)
        if step.index == 0:
            self._size = n_running
        self._n_steps = step.index + 1
        expected = sum(self._lengths) / len(self._lengths) if self._lengths else self._longest
        within = step.index / max(expected, self._n_steps)
        self._work.done = self._work.started_at + self._rows_done + self._size - n_running
        self._work.share = (self._rows_done + within * self._size) / self._n_rows
        self._work.at_most = not self._lengths

    def batch_done(self, n_rows: int) -> None:
        """Count a batch of `n_rows` as done."""
        self._rows_done += n_rows
        if self._n_steps:
            self._lengths.append(self._n_steps)
        self._n_steps = 0
        self._work.done = self._work.started_at + self._rows_done
        self._work.share = self._rows_done / self._n_rows
        self._work.at_most = False


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    read: Sequence[Site] = (),
    write: Mapping[Site, Edit] | None = None,
    on_step: Callable[[DecodingStep], None] | None = None,
    processors: Sequence[LogitsProcessor] = (),
    past: Past | None = None,
) -> list[Completion]:
    """Complete prompts in one batch. A prompt's completion depends on its own seed and not on the other prompts.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        sampling: Temperature, what limits and penalises tokens, stop texts and the largest number of new tokens; its own seed is not used.
        seeds: One seed per prompt.
        read: Sites to record while decoding. This is slower than `replay` afterwards, and both give the same up to rounding.
        write: Edits by site, as `Backend.passes` takes them.
        on_step: Called before each forward pass.
        processors: Called one after the other with the tokens so far (batch, token), left-padded, and the logits (batch, vocab)
            before the temperature, as in `generate` of Hugging Face. Finished sequences are left out. One whose attribute `idle` is true
            is passed over at that step.
        past: Keys and values of the first columns of the left-padded prompts, which are then neither fed, read nor edited.

    Returns:
        One completion per prompt, in their order. A sequence ends at a stop token, with the token that completes a stop text, after
        `sampling.max_new_tokens`, or when the context is full.

    Raises:
        InputError: If a prompt is empty, has tokens outside the vocabulary or no seed, or if logits are not finite.
        ContextError: If a prompt fills the context.
        SiteError: If `read` names `attn_probs`; use `replay` instead.

    Example:
        prompt = model.encode_prompt(rs.Problem(id="sum", prompt="1 + 1 ="))
        (done,) = rs.generate(model, [prompt], rs.Sampling(max_new_tokens=20), seeds=[0])
        print(model.tokenizer.decode(done.token_ids))
    """
    for site in read:
        if site.point == "attn_probs":
            raise SiteError(f"{site} cannot be read while decoding (its columns grow); replay the finished sequence")
    limits = room_for(model, prompts, sampling, seeds)
    if not prompts:
        return []
    decoding = _Decoding(model, prompts, limits, sampling, seeds, past)
    with threads_for_pass(decoding.rows, model.d_model), model.backend.passes(read=read, write=write) as run:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        for index in range(decoding.longest):
            if on_step is not None:
                n_prompt = None if index else lengths
                on_step(DecodingStep(index=index, rows=decoding.rows, ids=decoding.feed, n_prompt=n_prompt))
            n_running = len(decoding.rows)
            decoding.advance(index, run, processors)
            count_tokens(n_running)
            if not len(decoding.rows):
                break
    return decoding.completions(prompts)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a token in each row of `logits` (batch, vocab) by `uniform` (batch,) in [0, 1): (token, log-probability, entropy).

    The draw inverts the cumulative distribution over the vocabulary, so that the choice in a row depends only on its own number. As in
    transformers, top_k comes before top_p, which counts probabilities among the tokens left, and min_p comes last.
    """
    scaled = logits.float() / sampling.temperature if sampling.temperature else logits.float()
    logprobs = scaled.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        kept = _limited(probabilities, sampling)
        cumulative = _running_sum(kept, _precise(logits.device))
        token = torch.searchsorted(cumulative, uniform[:, None].to(cumulative) * cumulative[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0], entropy


def _precise(device: torch.device) -> torch.dtype:
    """float64 if the device has it: over a vocabulary of 150,000 a float32 sum is off by more than the probability of rare tokens."""
    return torch.float32 if device.type == "mps" else torch.float64


def _running_sum(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cumulative sum over the last axis. CUDA has no deterministic one for floats, so the CPU computes it if it has to be."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim=-1, dtype=dtype).to(values.device)
    return values.cumsum(dim=-1, dtype=dtype)


def _limited(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities of the tokens that may be drawn; the others become 0. The likeliest always may."""
    kept = probabilities
    if 0 < sampling.top_k < kept.shape[-1]:
        least = kept.topk(sampling.top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < least, 0.0)
        kept = kept / kept.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        kept = _nucleus(kept, sampling.top_p)
    if sampling.min_p > 0:
        kept = kept.masked_fill(kept < sampling.min_p * kept.amax(dim=-1, keepdim=True), 0.0)
    return kept


class _Penalties:
    """Penalties on the tokens that each row has read or written, which nothing in other rows changes."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocabulary: int, device: torch.device
    ) -> None:
        self._sampling = sampling
        self._read = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
        self._written = torch.zeros_like(self._read)
        for row, prompt in enumerate(prompts):
            self._read[row, torch.tensor(sorted(set(prompt)), device=device)] = True

    def apply(self, logits: Tensor) -> Tensor:
        logits, by = logits.float(), self._sampling.repetition_penalty
        known = (self._read | self._written)[:, : logits.shape[-1]]
        logits = torch.where(known, torch.where(logits > 0, logits / by, logits * by), logits)
        return logits - self._sampling.presence_penalty * self._written[:, : logits.shape[-1]]

    def add(self, tokens: Tensor) -> None:
        """Count the tokens that were chosen: (row, 1)."""
        self._written.scatter_(1, tokens, True)

    def keep(self, rows: Tensor) -> None:
        self._read, self._written = self._read[rows], self._written[rows]


class _StopTexts:
    """Ends a row with the token that completes one of the stop texts in what it has written."""

    def __init__(self, stop: Sequence[str], tokenizer: Tokenizer) -> None:
        self._stop, self._tokenizer = stop, tokenizer
        self._tail = 4 * max(map(len, stop)) + 4  # a character may take four tokens
        self._ids: dict[int, list[int]] = {}

    def reached(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Whether each of `rows` has reached a stop text with its new token: (row,)."""
        found = []
        for row, token in zip(rows.tolist(), tokens[:, 0].tolist(), strict=True):
            ids = self._ids.setdefault(row, [])
            ids.append(token)
            text = self._tokenizer.decode(ids[-self._tail :], skip_special_tokens=False)
            found.append(any(stop in text for stop in self._stop))
        return torch.tensor(found, device=rows.device)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The probabilities of the smallest set of tokens that together has `top_p`, at least one token; the others become 0."""
    ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = _running_sum(ordered, ordered.dtype) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(1, indices, outside), 0.0)


def room_for(model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[int]:
    """The largest number of tokens that may follow each prompt, by `sampling` and by the context.

    Raises InputError for prompts that cannot be fed and for a missing seed, ContextError for a prompt that fills the context.
    """
    if len(seeds) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed for each prompt")
    if sampling.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {sampling.max_new_tokens}; at least 1 is needed")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i} has no tokens; a model needs at least one to start from")
        if len(prompt) >= model.context_length:
            raise ContextError(
                f"prompt {i} has {len(prompt)} tokens and the context holds {model.context_length}; "
                "shorten it so that at least one token can follow"
            )
    check_vocabulary(prompts, model.vocabulary)
    return [min(sampling.max_new_tokens, model.context_length - len(prompt)) for prompt in prompts]


class _Decoding:
    """The state of the loop. `rows` are the sequences that still run; every tensor with a batch axis has these rows."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        seeds: Sequence[int],
        past: Past | None,
    ) -> None:
        device = model.device
        self.longest = max(limits)
        self._sampling = sampling
        self._width = max(map(len, prompts))
        self._padding = [self._width - len(prompt) for prompt in prompts]
        self.rows = torch.arange(len(prompts), device=device)
        self._written, mask = left_padded(prompts, device)
        self._newest: list[Tensor] = []  # (row, 1) each, not yet part of `_written`
        self.feed = self._written[:, past.columns if past else 0 :]
        # Without padding nothing is masked, and kernels are faster without a mask.
        self._mask = torch.cat([mask, mask.new_ones(len(prompts), self.longest)], dim=1) if any(self._padding) else None
        self._limits = torch.tensor(limits, device=device)
        self._shortest = min(limits)
        # In numpy a shorter draw is a prefix of a longer one, so the limit does not change the draws.
        draws = np.stack([np.random.default_rng(seed).random(self.longest) for seed in seeds])
        self._uniform = torch.from_numpy(draws).to(_precise(device)).to(device)
        self._stops = torch.tensor(sorted(model.stop_ids), device=device)
        self._cache: object = past.cache if past else growing_cache(model.hf.config)
        self._stopped: set[int] = set()
        self._penalties = _Penalties(sampling, prompts, model.vocabulary, device) if sampling.penalises else None
        self._stop_texts = _StopTexts(sampling.stop, model.tokenizer_backend) if sampling.stop else None
        self._read: _Tape[Site] = _Tape()
        self._chosen: _Tape[str] = _Tape()

    def advance(self, index: int, run: Pass, processors: Sequence[LogitsProcessor]) -> None:
        """Feed the tokens in `feed`, choose the next ones, and drop the sequences that end with them."""
        mask = None if self._mask is None else self._mask[:, : self._width + index]
        out = run(self.feed, mask=mask, cache=self._cache, use_cache=True, last_logits_only=True)
        self._cache = out.cache
        self._read.append(self.rows, out.activations)
        with torch.no_grad():
            logits = out.logits[:, -1].to(self.rows.device)
            for processor in processors:
                if not getattr(processor, "idle", False):
                    logits = processor(cast(torch.LongTensor, self._all_written()), logits)
            if self._penalties is not None:
                logits = self._penalties.apply(logits)
            token, logprob, entropy = sample(logits, self._sampling, self._uniform[:, index])
        self.feed = token[:, None]
        if processors:
            self._newest.append(self.feed)
        self._chosen.append(self.rows, {"ids": self.feed, "logprobs": logprob[:, None], "entropies": entropy[:, None]})
        if self._penalties is not None:
            self._penalties.add(self.feed)
        stopped = (self.feed == self._stops).any(dim=1)
        if self._stop_texts is not None:
            stopped = stopped | self._stop_texts.reached(self.rows, self.feed)
        ended = stopped if index + 1 < self._shortest else stopped | (self._limits == index + 1)
        if ended.any():
            self._stopped.update(self.rows[stopped].tolist())
            self._keep(~ended)

    def _all_written(self) -> Tensor:
        """What was read and written (row, token), put together only if somebody asks: that costs as much as a probe."""
        if self._newest:
            self._written = torch.cat([self._written, *self._newest], dim=1)
            self._newest.clear()
        return self._written

    def _keep(self, going: Tensor) -> None:
        kept = going.nonzero()[:, 0]
        self.rows, self.feed, self._written = self.rows[kept], self.feed[kept], self._all_written()[kept]
        self._limits, self._uniform = self._limits[kept], self._uniform[kept]
        if self._penalties is not None:
            self._penalties.keep(kept)
        if self._mask is not None:
            self._mask = self._mask[kept]
        if len(kept):
            # Indices on the CPU, because the layers of a dispatched model are on several devices.
            self._cache.batch_select_indices(kept.cpu())  # type: ignore[attr-defined]  # a transformers Cache by now

    def completions(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        completions = []
        for row, (prompt, padding) in enumerate(zip(prompts, self._padding, strict=True)):
            chosen = {name: values.cpu().numpy() for name, values in self._chosen.sequence(row).items()}
            if not np.isfinite(chosen["logprobs"]).all():
                raise InputError(
                    f"the logits of prompt {row} are not finite; lower the strength of the edit if there is one, "
                    "otherwise load the model in bfloat16 or float32"
                )
            completions.append(
                Completion(
                    token_ids=np.concatenate([np.asarray(prompt, dtype=np.int64), chosen["ids"]]),
                    n_prompt_tokens=len(prompt),
                    finish_reason="stop" if row in self._stopped else "length",
                    logprobs=chosen["logprobs"],
                    entropies=chosen["entropies"],
                    activations={site: rows[padding:] for site, rows in self._read.sequence(row).items()},
                )
            )
        return completions


_Name = TypeVar("_Name")


class _Tape(Generic[_Name]):
    """What each pass returned, (batch, token, …) by name, in stretches during which the rows of the batch did not change."""

    def __init__(self) -> None:
        self._stretches: list[tuple[list[int], dict[_Name, list[Tensor]]]] = []
        self._rows: Tensor | None = None

    def append(self, rows: Tensor, given: Mapping[_Name, Tensor]) -> None:
        if self._rows is not rows:
            self._close()
            self._rows = rows
            self._stretches.append((rows.tolist(), {name: [] for name in given}))
        for name, values in given.items():
            self._stretches[-1][1][name].append(values)

    def _close(self) -> None:
        """Join the passes of the last stretch, so that few large tensors are kept."""
        if self._stretches:
            passes = self._stretches[-1][1]
            for name, parts in passes.items():
                if len(parts) > 1:
                    passes[name] = [torch.cat(parts, dim=1)]

    def sequence(self, row: int) -> dict[_Name, Tensor]:
        """Everything that was recorded of one sequence, (token, …) by name."""
        self._close()
        mine = [(rows.index(row), passes) for rows, passes in self._stretches if row in rows]
        return {name: torch.cat([passes[name][0][at] for at, passes in mine]) for name in mine[0][1]}
