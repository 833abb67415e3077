"""The one decoding loop, the same for every backend: sampling, stopping, and capture or edits while the model writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
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
    """A prompt and what the model wrote behind it.

    `token_ids` (token,) int64: prompt, then the generated ones with the stop token, if any. `logprobs` and `entropies`
    (generated token,) float32 in nats, of the distribution at the generating temperature (1 where that is 0) behind the
    processors, before top_p cuts it. `activations`: by site, prompt + generated − 1 rows in the model's dtype (the last token is
    never fed back).
    """

    token_ids: NDArray[np.int64]
    n_prompt_tokens: int
    finish_reason: FinishReason
    logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32]
    activations: Mapping[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values of the first `columns` of a left-padded batch, computed before: a transformers `Cache` of its rows."""

    cache: object
    columns: int


@dataclass(frozen=True, kw_only=True)
class DecodingStep:
    """A pass that is about to run: `index` 0 feeds the prompts, the later ones a token each.

    `rows` (batch,) says which of the prompts each row of the batch belongs to: rows that have ended are dropped, so an
    edit that keeps state by sequence has to listen here. `ids` (batch, token) are fed, left-padded where `index` is 0.
    """

    index: int
    rows: Tensor
    ids: Tensor


class BatchProgress:
    """Follows `generate` batch by batch, so that `work` moves with every token: rows that have ended, and the share of all steps.

    How many steps a batch takes is guessed from those that are over; until then `longest` bounds it.
    """

    def __init__(self, work: Work, n_rows: int, longest: int) -> None:
        self._work, self._n_rows, self._longest = work, n_rows, longest
        self._rows_done = self._size = self._n_steps = 0
        self._lengths: list[int] = []

    def on_step(self, step: DecodingStep) -> None:
        """Listen to a step, as the `on_step` of `generate`."""
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
    """Complete each of `prompts` (token ids); `seeds`, one a prompt, decide its draws whatever stands beside it.

    `processors` change the logits (batch, vocab) in turn before the temperature divides them, as in Hugging Face's own
    `generate`: each is given the tokens so far (batch, token), left-padded, of the sequences that still run.

    `past` holds the first columns of the left-padded prompts: they are not fed again (nor read, nor edited).

    A sequence ends at a stop token of the model, after `sampling.max_new_tokens`, or where the context is full (finish
    reason "length" for both). Raises ContextError for a prompt that leaves no room, InputError for what cannot be fed or
    for logits that are not numbers, SiteError for reading `attn_probs` (replay the sequences instead).
    """
    for site in read:
        if site.point == "attn_probs":
            raise SiteError(f"{site} cannot be read while decoding (its columns grow); replay the finished sequence")
    limits = room_for(model, prompts, sampling, seeds)
    if not prompts:
        return []
    decoding = _Decoding(model, prompts, limits, sampling, seeds, past)
    with threads_for_pass(decoding.rows, model.d_model), model.backend.passes(read=read, write=write) as run:
        for index in range(decoding.longest):
            if on_step is not None:
                on_step(DecodingStep(index=index, rows=decoding.rows, ids=decoding.feed))
            n_running = len(decoding.rows)
            decoding.advance(index, run, processors)
            count_tokens(n_running)
            if not len(decoding.rows):
                break
    return decoding.completions(prompts)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a token in each row of `logits` (batch, vocab) by `uniform` (batch,) in [0, 1): (token, log-probability, entropy).

    The draw inverts the cumulative distribution over the vocabulary, so that a row's choice depends on its own number alone.
    """
    scaled = logits.float() / sampling.temperature if sampling.temperature else logits.float()
    logprobs = scaled.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        kept = probabilities if sampling.top_p >= 1 else _nucleus(probabilities, sampling.top_p)
        cumulative = _running_sum(kept, _precise(logits.device))
        token = torch.searchsorted(cumulative, uniform[:, None].to(cumulative) * cumulative[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0], entropy


def _precise(device: torch.device) -> torch.dtype:
    """float64 where there is one: over a vocabulary of 150,000 a float32 sum is off by more than rare tokens weigh."""
    return torch.float32 if device.type == "mps" else torch.float64


def _running_sum(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the last axis. CUDA has no deterministic one of floats: where it has to be, the host does it."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim=-1, dtype=dtype).to(values.device)
    return values.cumsum(dim=-1, dtype=dtype)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens that holds `top_p` of the probability, always at least the first; the others at 0."""
    ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = _running_sum(ordered, ordered.dtype) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(1, indices, outside), 0.0)


def room_for(model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[int]:
    """How many tokens are to follow each prompt at most: what `sampling` allows, or the context.

    Raises InputError for what cannot be fed and for a seed that is missing, ContextError for a prompt that leaves no room.
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
    """The state of the loop. `rows` are the sequences still running; what has the size of the batch follows them."""

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
        self.feed = self._written[:, past.columns if past else 0 :]
        # Nothing is masked where nothing is padding: kernels need no mask then.
        self._mask = torch.cat([mask, mask.new_ones(len(prompts), self.longest)], dim=1) if any(self._padding) else None
        self._limits = torch.tensor(limits, device=device)
        self._shortest = min(limits)
        # numpy's stream has the property that a shorter draw is a prefix of a longer one.
        draws = np.stack([np.random.default_rng(seed).random(self.longest) for seed in seeds])
        self._uniform = torch.from_numpy(draws).to(_precise(device)).to(device)
        self._stops = torch.tensor(sorted(model.stop_ids), device=device)
        self._cache: object = past.cache if past else growing_cache(model.hf.config)
        self._stopped: set[int] = set()
        self._read: _Tape[Site] = _Tape()
        self._chosen: _Tape[str] = _Tape()

    def advance(self, index: int, run: Pass, processors: Sequence[LogitsProcessor]) -> None:
        """Feed what stands in `feed`, choose the next tokens, and drop the sequences that end with them."""
        mask = None if self._mask is None else self._mask[:, : self._width + index]
        out = run(self.feed, mask=mask, cache=self._cache, use_cache=True, last_logits_only=True)
        self._cache = out.cache
        self._read.append(self.rows, out.activations)
        with torch.no_grad():
            logits = out.logits[:, -1].to(self.rows.device)
            for processor in processors:
                logits = processor(cast(torch.LongTensor, self._written), logits)
            token, logprob, entropy = sample(logits, self._sampling, self._uniform[:, index])
        self.feed = token[:, None]
        if processors:
            self._written = torch.cat([self._written, self.feed], dim=1)
        self._chosen.append(self.rows, {"ids": self.feed, "logprobs": logprob[:, None], "entropies": entropy[:, None]})
        stopped = (self.feed == self._stops).any(dim=1)
        ended = stopped if index + 1 < self._shortest else stopped | (self._limits == index + 1)
        if ended.any():
            self._stopped.update(self.rows[stopped].tolist())
            self._keep(~ended)

    def _keep(self, going: Tensor) -> None:
        kept = going.nonzero()[:, 0]
        self.rows, self.feed, self._written = self.rows[kept], self.feed[kept], self._written[kept]
        self._limits, self._uniform = self._limits[kept], self._uniform[kept]
        if self._mask is not None:
            self._mask = self._mask[kept]
        if len(kept):
            # Indices of the host: the layers of a dispatched model lie on several devices.
            self._cache.batch_select_indices(kept.cpu())  # type: ignore[attr-defined]  # a transformers Cache by now

    def completions(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        completions = []
        for row, (prompt, padding) in enumerate(zip(prompts, self._padding, strict=True)):
            chosen = {name: values.cpu().numpy() for name, values in self._chosen.sequence(row).items()}
            if not np.isfinite(chosen["logprobs"]).all():
                raise InputError(
                    f"the logits of prompt {row} are not numbers; where an edit wrote, lower its strength, "
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
    """What every pass gave, (batch, token, …) by name, in stretches between which the rows of the batch did not change."""

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
        """Join the passes of the last stretch, so that what is kept are few large tensors."""
        if self._stretches:
            passes = self._stretches[-1][1]
            for name, parts in passes.items():
                if len(parts) > 1:
                    passes[name] = [torch.cat(parts, dim=1)]

    def sequence(self, row: int) -> dict[_Name, Tensor]:
        """Everything given of one sequence, (token, …) by name."""
        self._close()
        mine = [(rows.index(row), passes) for rows, passes in self._stretches if row in rows]
        return {name: torch.cat([passes[name][0][at] for at, passes in mine]) for name in mine[0][1]}
