"""The one decoding loop, the same for every backend: sampling, stopping, and capture or edits while the model writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import ContextError, InputError, SiteError
from reasonscope.data.trace import FinishReason, Sampling
from reasonscope.probes.backends.base import Edit
from reasonscope.probes.batching import check_vocabulary, left_padded
from reasonscope.probes.cache import growing_cache
from reasonscope.probes.model import Model
from reasonscope.probes.sites import Site


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
    _check(model, prompts, sampling, seeds, read)
    if not prompts:
        return []
    decoding = _Decoding(model, prompts, sampling, seeds, past)
    for index in range(int(decoding.limits.max())):
        if on_step is not None:
            on_step(DecodingStep(index=index, rows=decoding.rows, ids=decoding.feed))
        decoding.advance(index, read, write, processors)
        if not len(decoding.rows):
            break
    return decoding.completions(prompts)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a token in each row of `logits` (batch, vocab) by `uniform` (batch,) in [0, 1): (token, log-probability, entropy).

    The draw inverts the cumulative distribution over the vocabulary, so that a row's choice depends on its own number alone.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    logprobs = scaled.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        kept = probabilities if sampling.top_p >= 1 else _nucleus(probabilities, sampling.top_p)
        cumulative = kept.cumsum(dim=-1, dtype=_precise(logits.device))
        token = torch.searchsorted(cumulative, uniform[:, None].to(cumulative) * cumulative[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0], entropy


def _precise(device: torch.device) -> torch.dtype:
    """float64 where there is one: over a vocabulary of 150,000 a float32 sum is off by more than rare tokens weigh."""
    return torch.float32 if device.type == "mps" else torch.float64


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens that holds `top_p` of the probability, always at least the first; the others at 0."""
    ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(1, indices, outside), 0.0)


def _check(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], read: Sequence[Site]
) -> None:
    if len(seeds) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed for each prompt")
    for site in read:
        if site.point == "attn_probs":
            raise SiteError(f"{site} cannot be read while decoding (its columns grow); replay the finished sequence")
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


class _Decoding:
    """The state of the loop. `rows` are the sequences still running; all tensors of batch size but the results follow them."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        past: Past | None,
    ) -> None:
        device = model.device
        limits = [min(sampling.max_new_tokens, model.context_length - len(prompt)) for prompt in prompts]
        width, longest, n = max(map(len, prompts)), max(limits), len(prompts)
        self._model, self._sampling = model, sampling
        self.limits = torch.tensor(limits, device=device)
        self.rows = torch.arange(n, device=device)
        self.feed, mask = left_padded(prompts, device)
        self._prompts = self.feed
        self.feed = self.feed[:, past.columns if past else 0 :]
        self._mask = torch.cat([mask, mask.new_ones(n, longest)], dim=1)
        self._width = width
        # numpy's stream has the property that a shorter draw is a prefix of a longer one.
        draws = np.stack([np.random.default_rng(seed).random(longest) for seed in seeds])
        self._uniform = torch.from_numpy(draws).to(_precise(device)).to(device)
        self._stops = torch.tensor(sorted(model.stop_ids), device=device)
        self._cache: object = past.cache if past else growing_cache(model.hf.config)
        self._ids = torch.zeros(n, longest, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(n, longest, device=device)
        self._entropies = torch.zeros(n, longest, device=device)
        self._lengths = torch.zeros(n, dtype=torch.long, device=device)
        self._stopped = torch.zeros(n, dtype=torch.bool, device=device)
        self._tape = _Tape()

    def advance(
        self,
        index: int,
        read: Sequence[Site],
        write: Mapping[Site, Edit] | None,
        processors: Sequence[LogitsProcessor],
    ) -> None:
        """Feed what stands in `feed`, choose the next tokens, and drop the sequences that end with them."""
        out = self._model.backend.forward(
            self.feed,
            mask=self._mask[self.rows, : self._width + index],
            cache=self._cache,
            use_cache=True,
            last_logits_only=True,
            read=read,
            write=write,
        )
        self._cache = out.cache
        self._tape.append(self.rows, out.activations)
        rows = self.rows
        with torch.no_grad():
            logits = self._processed(out.logits[:, -1].to(rows.device), index, processors)
            token, logprob, entropy = sample(logits, self._sampling, self._uniform[rows, index])
        self._ids[rows, index], self._logprobs[rows, index], self._entropies[rows, index] = token, logprob, entropy
        stopped = torch.isin(token, self._stops)
        ended = stopped | (self.limits[rows] == index + 1)
        self._lengths[rows] = index + 1
        self._stopped[rows] = stopped
        self.feed = token[:, None]
        if ended.any():
            self._keep(~ended)

    def _processed(self, logits: Tensor, index: int, processors: Sequence[LogitsProcessor]) -> Tensor:
        if processors:
            written = torch.cat([self._prompts[self.rows], self._ids[self.rows, :index]], dim=1)
            for processor in processors:
                logits = processor(cast(torch.LongTensor, written), logits)
        return logits

    def _keep(self, going: Tensor) -> None:
        kept = going.nonzero()[:, 0]
        self.rows, self.feed = self.rows[kept], self.feed[kept]
        if len(kept):
            # Indices of the host: the layers of a dispatched model lie on several devices.
            self._cache.batch_select_indices(kept.cpu())  # type: ignore[attr-defined]  # a transformers Cache by now

    def completions(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        lengths, stopped = self._lengths.tolist(), self._stopped.tolist()
        ids, logprobs, entropies = (t.cpu().numpy() for t in (self._ids, self._logprobs, self._entropies))
        completions = []
        for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            if not np.isfinite(logprobs[row, :n]).all():
                raise InputError(
                    f"the logits of prompt {row} are not numbers; where an edit wrote, lower its strength, "
                    "otherwise load the model in bfloat16 or float32"
                )
            padding = max(map(len, prompts)) - len(prompt)
            completions.append(
                Completion(
                    token_ids=np.concatenate([np.asarray(prompt, dtype=np.int64), ids[row, :n]]),
                    n_prompt_tokens=len(prompt),
                    finish_reason="stop" if stopped[row] else "length",
                    logprobs=logprobs[row, :n],
                    entropies=entropies[row, :n],
                    activations=self._tape.sequence(row, padding),
                )
            )
        return completions


class _Tape:
    """What was read, in stretches between which the rows of the batch did not change."""

    def __init__(self) -> None:
        self._stretches: list[tuple[list[int], dict[Site, list[Tensor]]]] = []
        self._rows: Tensor | None = None

    def append(self, rows: Tensor, activations: Mapping[Site, Tensor]) -> None:
        if self._rows is not rows:
            self._close()
            self._rows = rows
            self._stretches.append((rows.tolist(), {site: [] for site in activations}))
        for site, activation in activations.items():
            self._stretches[-1][1][site].append(activation)

    def _close(self) -> None:
        """Join the passes of the last stretch, so that what is kept are few large tensors."""
        if self._stretches:
            passes = self._stretches[-1][1]
            for site, parts in passes.items():
                passes[site] = [torch.cat(parts, dim=1)]

    def sequence(self, row: int, padding: int) -> dict[Site, Tensor]:
        """Everything read of one sequence, (token, …) by site, without its `padding`."""
        self._close()
        mine = [(rows.index(row), passes) for rows, passes in self._stretches if row in rows]
        return {site: torch.cat([passes[site][0][at] for at, passes in mine])[padding:] for site in mine[0][1]}
