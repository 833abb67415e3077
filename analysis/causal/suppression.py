"""Attention suppression: how far next-token distributions move if no token may attend to a sentence (Thought
Anchors)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reasonscope.analysis.attention.blocks import AttentionCall, attending
from reasonscope.analysis.attention.rows.block import ScoreRule
from reasonscope.analysis.attention.rows.functionals import check_spans
from reasonscope.analysis.attention.sentence_attention import ReadSentences
from reasonscope.analysis.attention.vertical import nan_mean
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.data.arrays import Values
from reasonscope.data.progress import tracked, working
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.trace import Sentence, Span, Trace
from reasonscope.probes.generation.padding import check_sequence
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.unembedding import Unembedding, kl_from_hidden

_TEMPERATURE = 0.6
_WASTE = 0.1  # at most this share of a pass's tokens may be unnecessary for a source
_FLOOR = 1e-9  # added to a divergence before its logarithm, as published
_TOGETHER = 32  # sources and tokens that are compared with the untouched distributions at a time
_HELD = 2**28  # bytes of hidden states that are kept until they are compared


def suppression_matrix(
    model: Model,
    trace: Trace,
    *,
    sentences: Sequence[Sentence] | None = None,
    temperature: float = _TEMPERATURE,
    n_controls: int = 1,
    batch: int = 8,
    seed: int = 0,
) -> Result:
    """How much each sentence of the thinking depends on each earlier one (attention suppression, arXiv 2506.19143,
    section 5).

    All queries are kept from attending to a source's tokens, in every layer and head.

    Args:
        model: A native model.
        trace: The trace, with tokens.
        sentences: Its sentences; by default those of `cut_trace`.
        temperature: Temperature of the distributions.
        n_controls: The null draws so many sets of tokens per source.
        batch: Sources per pass.
        seed: Random seed.

    Returns:
        Axes (target, source): the mean over the target's tokens of log KL (nats) between the distributions that predict
        them, untouched and suppressed, minus the target's mean over its sources. `arrays`: `kl`, the mean divergence in
        nats, and `log_kl` before normalisation. The null suppresses as many random single tokens of the thinking before
        each source, never the source's own; a source with too few tokens before it has no control. One band over all
        pairs. NaN, with the reason, for target ≤ source and for fewer than two sentences.

    Raises:
        InputError: If the trace cannot be fed.
        ContextError: If it exceeds the model's context.

    Departures: distributions are complete (the released code takes the 100 likeliest tokens, so that its matrix maps
    which tokens left that list); a target is judged where its own tokens are predicted (there, one token later); a
    token that may attend to nothing sees itself.

    Example:
        results = rs.analyse("suppression", "runs/mine")
        results[0].values  # (target, source)
        results[0].arrays["kl"]
    """
    known = ReadSentences.of(trace, sentences)
    found = known.spans
    common: dict[str, Any] = {
        "method": "suppression",
        "quantity": "log divergence minus the target's mean",
        "unit": "log nats",
    }
    provenance = {"trace": trace.id, "temperature": temperature, "seed": seed, **cut_provenance(known.sentences)}
    if len(found) < 2:
        reason = f"{len(found)} sentences ({trace.state} thinking): a source needs a later target"
        return undefined(**common, reason=reason, provenance=provenance)
    ids = trace.token_ids[: found[-1].stop].tolist()
    effect = suppression_effect(model, ids, found, temperature=temperature, batch=batch)
    rng = np.random.default_rng(seed)
    drawn = [
        _control(model, ids, found, effect.untouched, rng, temperature, batch)
        for _ in tracked(range(n_controls), "suppressing random tokens", "sets")
    ]
    values, chance = known.spread(normalised(effect.log_kl), 2), np.array([normalised(draw) for draw in drawn])
    axis = [f"{i}" for i in range(len(known.sentences))]
    null = None
    if np.isfinite(chance).any():
        low, high = np.nanquantile(chance, [0.025, 0.975])
        null = Band.of(
            low,
            high,
            values.shape,
            f"{n_controls} × as many random single tokens before each source, 95 % of all pairs",
        )
    return Result(
        **common,
        axes=(Axis.of("target", axis), Axis.of("source", axis)),
        values=values,
        null=null,
        null_missing=""
        if null
        else "n_controls is 0, or no sentence has as many tokens of the thinking before it as it has itself",
        reason="a target has no effect of itself or of what comes later; the first has a single source and no mean to differ from; "
        "a sentence without tokens of its own has no effect",
        arrays={"kl": known.spread(effect.kl, 2), "log_kl": known.spread(effect.log_kl, 2)},
        numbers={"n_sentences": len(found), "n_tokens": len(ids)},
        provenance=provenance,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _SuppressionEffect:
    """Means over the tokens of each target of the divergence (`kl`, nats) and of its logarithm (`log_kl`), both
    (target, source).

    `untouched` is the pass that they are measured from, in which further tokens can be suppressed.
    """

    kl: Values
    log_kl: Values
    untouched: "Untouched"


def suppression_effect(
    model: Model, ids: Sequence[int], spans: Sequence[Span], *, temperature: float = _TEMPERATURE, batch: int = 8
) -> _SuppressionEffect:
    """The matrices of `suppression_matrix` for any `spans` of tokens; NaN for target ≤ source."""
    check_spans(spans, len(ids))
    untouched = Untouched.of(model, ids)
    members = _members(spans[:-1], len(ids))  # the last has no later target
    judged = [span.stop - 1 for span in spans[:-1]]
    divergences = untouched.divergences(members, temperature=temperature, batch=batch, judged=judged)
    return _by_target(divergences, spans, untouched)


def normalised(log_kl: Values) -> Values:
    """Minus each target's mean over its earlier sources: a target that moves easily does so for every source."""
    return np.asarray(log_kl - nan_mean(log_kl, axis=-1)[:, None])


@dataclass(frozen=True, kw_only=True, eq=False)
class Untouched:
    """One pass over a sequence: its final hidden states (token, d_model), and the keys and values of every layer, to
    continue from."""

    model: Model
    ids: Tensor
    hidden: Tensor
    keys: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, model: Model, ids: Sequence[int]) -> "Untouched":
        """The pass of `model` over `ids`. Raises InputError or ContextError if they cannot be fed."""
        check_sequence(model, ids)
        fed, kept = torch.tensor(list(ids), device=model.device), {}

        def attend(call: AttentionCall) -> Tensor:
            kept[call.layer] = (call.key[0], call.value[0])
            return _attended(call, call.key, call.value, _mask(call.rule, 0, call.key.shape[2], call.query))

        hidden = _final_states(model, fed[None], 0, attend)[0]
        return cls(model=model, ids=fed, hidden=hidden, keys=tuple(kept[layer] for layer in sorted(kept)))

    def divergences(
        self, suppressed: Tensor, *, temperature: float, batch: int, judged: Sequence[int] | None = None
    ) -> Values:
        """KL (source, token) in nats of each token's next-token distribution if no token may attend to the tokens of
        `suppressed` (source, token) bool. Tokens before the first of these are unchanged and not run again: 0. With
        `judged`, the first token of each source whose divergence is asked for, earlier ones are 0 as well."""
        first = suppressed.int().argmax(dim=1)
        asked = first if judged is None else torch.as_tensor(judged)
        found = torch.zeros(suppressed.shape, dtype=torch.float64)
        starts = _starts(suppressed, first, asked)
        changed: dict[int, Tensor] = {}
        with working("suppressing", total=len(suppressed), unit="sentences") as work:
            for rows in _alike(starts, suppressed.shape[1], batch):
                states = self._behind(starts[rows[0]], suppressed[rows])
                changed |= zip(rows, states, strict=True)
                if sum(one.nbytes for one in changed.values()) > _HELD:
                    self._compare(changed, asked, temperature, found)
                    changed.clear()
                work.advance(len(rows))
            self._compare(changed, asked, temperature, found)
        return found.masked_fill_(torch.arange(suppressed.shape[1]) < asked[:, None], 0.0).numpy()

    def _compare(self, changed: Mapping[int, Tensor], asked: Tensor, temperature: float, found: Tensor) -> None:
        """Put the divergences of the last states of some sources, (token, d_model) by source, into `found`. The
        distribution of an untouched token is computed once for many sources."""
        unembedding, n = Unembedding.of(self.model), len(self.hidden)
        for start in range(int(asked.min()), n, _TOGETHER):
            here = Span(start, min(start + _TOGETHER, n))
            rows = [row for row in changed if asked[row] < here.stop]
            for i in range(0, len(rows), _TOGETHER):
                some = rows[i : i + _TOGETHER]
                states = torch.stack([self._within(changed[row], here) for row in some])
                with torch.no_grad():
                    kl = kl_from_hidden(unembedding, self.hidden[here.slice], states, temperature=temperature)
                found[some, here.slice] = kl.double().cpu()

    def _within(self, changed: Tensor, here: Span) -> Tensor:
        """The states of the tokens `here`; those before the last ones, which are `changed`, are untouched."""
        first = len(self.hidden) - len(changed)
        before = self.hidden[here.start : min(first, here.stop)]
        return torch.cat([before, changed[max(0, here.start - first) : max(0, here.stop - first)]])

    def _behind(self, start: int, suppressed: Tensor) -> Tensor:
        """The final hidden states (source, token from `start`, d_model), with the keys and values of the tokens
        before `start`."""
        hidden, masks = suppressed.to(self.ids.device), {}

        def attend(call: AttentionCall) -> Tensor:
            before = (x[:, :start].expand(len(hidden), -1, -1, -1) for x in self.keys[call.layer])
            key, value = (torch.cat(pair, dim=2) for pair in zip(before, (call.key, call.value), strict=True))
            if call.rule.window not in masks:
                masks[call.rule.window] = _mask(call.rule, start, key.shape[2], call.query, hidden)
            return _attended(call, key, value, masks[call.rule.window])

        fed = self.ids[start:].expand(len(hidden), -1)
        return _final_states(self.model, fed, start, attend)


def _starts(suppressed: Tensor, first: Tensor, asked: Tensor) -> list[int]:
    """The first token of each source that has to run again: one from its first suppressed token on that another token
    may attend to, or whose own divergence is asked for."""
    token = torch.arange(suppressed.shape[1])
    matters = (token >= first[:, None]) & (~suppressed | (token >= asked[:, None]))
    return [int(start) for start in matters.int().argmax(dim=1)]


def _alike(firsts: Sequence[int], n_tokens: int, batch: int) -> list[list[int]]:
    """Rows to run together, at most `batch`: all begin with the first of them, so none may begin much later."""
    groups: list[list[int]] = []
    for row in sorted(range(len(firsts)), key=firsts.__getitem__):
        start = firsts[groups[-1][0]] if groups else 0
        if groups and len(groups[-1]) < batch and firsts[row] - start <= _WASTE * (n_tokens - start):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _final_states(model: Model, fed: Tensor, start: int, attend: Callable[[AttentionCall], Tensor]) -> Tensor:
    """The states after the last norm (batch, token, d_model) of `fed`, whose first token is at `start`."""
    places = torch.arange(start, start + fed.shape[1], device=fed.device)[None]
    with torch.no_grad(), attending(model.hf, attend):
        states = model.hf.base_model(input_ids=fed, position_ids=places, use_cache=False).last_hidden_state
    assert isinstance(states, Tensor)
    return states


def _mask(rule: ScoreRule, start: int, n_keys: int, like: Tensor, suppressed: Tensor | None = None) -> Tensor:
    """The additive mask (batch, 1, query, key): 0 if a query from `start` on may attend, else −∞."""
    query = torch.arange(start, n_keys, device=like.device)[:, None]
    key = torch.arange(n_keys, device=like.device)
    seen = (key <= query) if rule.window is None else (key <= query) & (key > query - rule.window)
    seen = seen[None, None]
    if suppressed is not None:
        seen = seen & ~suppressed[:, None, None, :n_keys]
        seen = seen | (~seen.any(dim=-1, keepdim=True) & (key == query))
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


def _attended(call: AttentionCall, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(batch, head, query, d_head); by the fused kernel if the layer has neither softcap nor sink."""
    query, rule = call.query, call.rule
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if rule.softcap is None and rule.sink is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scaling)
    scores = (query @ key.mT) * rule.scaling
    scores = scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores + mask
    if rule.sink is not None:
        scores = torch.cat([scores, rule.sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(value) @ value


def _members(spans: Sequence[Span], n_tokens: int) -> Tensor:
    members = torch.zeros(len(spans), n_tokens, dtype=torch.bool)
    for index, span in enumerate(spans):
        members[index, span.slice] = True
    return members


def _by_target(divergences: Values, spans: Sequence[Span], untouched: Untouched) -> _SuppressionEffect:
    """Means over the positions that predict each target's tokens, one before each of them."""
    kl = np.full((len(spans), len(spans)), np.nan)
    log_kl = kl.copy()
    for i, target in enumerate(spans):
        predicting = divergences[:i, max(0, target.start - 1) : target.stop - 1]
        kl[i, :i] = predicting.mean(axis=1)
        log_kl[i, :i] = np.log(predicting + _FLOOR).mean(axis=1)
    return _SuppressionEffect(kl=kl, log_kl=log_kl, untouched=untouched)


def _control(
    model: Model,
    ids: Sequence[int],
    spans: Sequence[Span],
    untouched: Untouched,
    rng: np.random.Generator,
    temperature: float,
    batch: int,
) -> Values:
    """`log_kl` of as many random single tokens of the thinking before each source instead of it; NaN for a source with too few."""
    first = spans[0].start
    sets = torch.zeros(len(spans), len(ids), dtype=torch.bool)
    for index, span in enumerate(spans):
        if (before := span.start - first) >= len(span):
            sets[index, first + rng.choice(before, size=len(span), replace=False)] = True
    judged = [span.stop - 1 for span in spans]
    drawn = untouched.divergences(sets, temperature=temperature, batch=batch, judged=judged)
    found = _by_target(drawn, spans, untouched).log_kl
    found[:, ~sets.any(dim=1).numpy()] = np.nan
    return found
