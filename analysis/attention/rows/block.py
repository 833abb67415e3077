"""Attention of a block of queries, from their queries and keys. Its source travels to vLLM, so it imports as little as it can."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonscope.data.trace import Span

BLOCK = 128  # queries


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """How a layer turns products of queries and keys into attention.

    `scaling` of the products; `softcap` · tanh(x / `softcap`) unless None; `window` of keys that a query sees (itself
    the last; None: all before it); `sink` (head,) the logit that takes attention away from every key (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None
    sink: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Attention of the queries `rows` on the keys `keys`, `probabilities` (head, row, key); on any other key it is
    0."""

    layer: int
    rows: Span
    keys: Span
    probabilities: Tensor


AttentionVisitor = Callable[[AttentionBlock], None]


def attention_blocks(
    query: Tensor, key: Tensor, rule: ScoreRule, *, layer: int = 0, block: int = BLOCK
) -> Iterator[AttentionBlock]:
    """Causal attention of `query` (head, query, d_head) on `key` (kv_head, key, d_head), `block` queries at a time.

    Heads share keys in groups, as in grouped-query attention; the queries are the last of the keys' tokens.
    """
    kv_heads, n_keys, _ = key.shape
    n_queries, offset = query.shape[1], n_keys - query.shape[1]
    for start in range(0, n_queries, block):
        stop = min(start + block, n_queries)
        rows = Span(offset + start, offset + stop)
        keys = Span(0 if rule.window is None else max(0, rows.start - rule.window + 1), rows.stop)
        grouped = query[:, start:stop].reshape(kv_heads, -1, query.shape[-1])
        scores = (grouped @ key[:, keys.slice].mT).view(len(query), stop - start, len(keys))
        yield AttentionBlock(layer=layer, rows=rows, keys=keys, probabilities=_softmax(scores, rows, keys, rule))


def _softmax(scores: Tensor, rows: Span, keys: Span, rule: ScoreRule) -> Tensor:
    scores = (scores if scores.dtype == torch.float64 else scores.float()).mul_(rule.scaling)
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    _hide(scores, rows, keys, rule.window)
    if rule.sink is None:
        return scores.softmax(dim=-1)
    sink = rule.sink.to(scores).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


def _hide(scores: Tensor, rows: Span, keys: Span, window: int | None) -> None:
    """Set to −∞ what a query may not see; without a window only the last keys have such entries."""
    seen = keys if window is not None else Span(rows.start, keys.stop)
    query = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
    key = torch.arange(seen.start, seen.stop, device=scores.device)
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    scores[..., -len(seen) :].masked_fill_(hidden, -torch.inf)
