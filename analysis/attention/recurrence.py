"""Tokens that are attended to again after a pause, and how long the longest pause is (LazyEviction, arXiv
2506.15969)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.rows.block import AttentionBlock
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import bootstrap_band
from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Span, Trace
from reasonscope.probes.models.model import Model

_ALPHA = 0.01  # share of a layer's mean attention; the paper's threshold depends on its models


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recurrence:
    """When each key is attended to, by layer: both (layer, key), in tokens.

    `last`: the last query that attended to it (its TS). `interval`: the longest time between two such queries (its
    MRI), the first being its own query, or, for a token before the rows that are read, the one before the first row. 1
    or less: never after a pause.
    """

    last: NDArray[np.int64]
    interval: NDArray[np.int64]


class _RecurrenceReader:
    """A reader for `read_attention`: a query attends to a key if the mean over heads is above `alpha`; memory is two
    numbers per key.

    With `shuffle` each query's attention is permuted among the keys that it sees: equally peaked, at meaningless
    positions. Only the tokens `among` look: all of `rows` if not given.
    """

    def __init__(
        self,
        rows: Span,
        n_layers: int,
        *,
        alpha: float = _ALPHA,
        shuffle: torch.Generator | None = None,
        among: NDArray[np.int64] | None = None,
    ) -> None:
        if not len(rows) or not 0 <= alpha < 1:
            raise InputError(
                f"{len(rows)} rows and a threshold of {alpha}: give at least one row, and a threshold from 0 to below 1"
            )
        self._rows, self._alpha, self._shuffle = rows, alpha, shuffle
        self._looks = torch.zeros(rows.stop, dtype=torch.bool)
        self._looks[torch.arange(rows.start, rows.stop) if among is None else torch.from_numpy(among)] = True
        self._last = torch.arange(rows.stop).clamp(min=rows.start - 1).repeat(n_layers, 1)
        self._interval = torch.zeros(n_layers, rows.stop, dtype=torch.int64)

    def __call__(self, block: AttentionBlock) -> None:
        start, stop = max(block.rows.start, self._rows.start), min(block.rows.stop, self._rows.stop)
        if start >= stop:
            return
        keys = Span(block.keys.start, min(block.keys.stop, stop))
        mean = block.probabilities.mean(dim=0)[start - block.rows.start : stop - block.rows.start, : len(keys)].cpu()
        if self._shuffle is not None:
            mean = _shuffled(mean, Span(start, stop), keys, self._shuffle)
        attends = (mean > self._alpha) & self._looks[start:stop, None]
        key, row = attends.T.nonzero().unbind(1)  # key by key, and each key's queries in order
        if not len(key):
            return
        query, key = row + start, key + keys.start
        last, interval = self._last[block.layer], self._interval[block.layer]
        before = torch.cat([query[:1], query[:-1]])
        first = torch.cat([torch.tensor([True]), key[1:] != key[:-1]])
        before[first] = last[key[first]]
        interval.scatter_reduce_(0, key, query - before, "amax")
        last.scatter_reduce_(0, key, query, "amax")

    def result(self) -> _Recurrence:
        """What was collected over all rows."""
        return _Recurrence(last=self._last.numpy(), interval=self._interval.numpy())


def recurrence(
    model: Model, trace: Trace, sentences: Sequence[Sentence] = (), *, alpha: float = _ALPHA, seed: int = 0
) -> Result:
    """The longest pause before each token of the thinking is attended to again: axes (layer, token), in tokens (arXiv
    2506.15969, section 3).

    A token is attended to if a layer's mean attention over heads is above `alpha`; a token that no later token attends
    to has 0. Null: the same after permuting each query's attention among the keys that it sees, 95 % of a layer's
    tokens. `arrays`: `last` (layer, token), the last query that attended. `numbers`: by layer the share of tokens that
    come back after a pause (interval above 1) and the 80th percentile of their intervals, each with its interval over
    the trace's `sentences` (at least two), and both for the null. Undefined, with the reason, for a trace without
    thinking. Raises InputError, ContextError.

    Departures: `alpha` is a share of the mean over heads of one layer, by layer; the paper tracks each cache's own
    heads while it decodes.
    """
    common: dict[str, Any] = {
        "method": "recurrence",
        "quantity": "longest time between two queries that attend",
        "unit": "tokens",
    }
    provenance = {"trace": trace.id, "alpha": alpha, "seed": seed, **cut_provenance(sentences)}
    rows = trace.tokens.thinking
    if not len(rows):
        return undefined(**common, reason=f"{trace.state} thinking, so no row to read", provenance=provenance)
    generator = torch.Generator().manual_seed(seed)
    places = trace.thinking_positions
    readers = [
        _RecurrenceReader(rows, model.n_layers, alpha=alpha, shuffle=how, among=places) for how in (None, generator)
    ]

    def read(block: AttentionBlock) -> None:
        for reader in readers:
            reader(block)

    read_attention(model, trace.token_ids[: rows.stop].tolist(), read)
    seen, chance = (reader.result() for reader in readers)
    values, null = (one.interval[:, places].astype(np.float64) for one in (seen, chance))
    values[sorted(set(range(model.n_layers)) - set(model.layout.layers_with("attn_out")))] = np.nan
    low, high = np.quantile(null, [0.025, 0.975], axis=1, keepdims=True)
    owner = sentence_of_each(sentences, rows.stop)[places]
    return Result(
        **common,
        axes=(Axis.of("layer", model.n_layers), Axis.of("token", list(map(str, places.tolist())))),
        values=values,
        reason=model.layout.without_heads,
        null=Band.of(low, high, values.shape, "each query's attention permuted, 95 % of a layer's tokens"),
        arrays={"last": seen.last[:, places]},
        numbers={"alpha": alpha, "by_layer": _estimated(values, owner, seed), "by_layer_null": _by_layer(null)},
        provenance=provenance,
    )


def _estimated(intervals: Values, owner: NDArray[np.int64], seed: int) -> list[dict[str, Any]]:
    """`_by_layer`, each number as `value` and `ci`; `owner` (token,) is the sentence of each token."""

    def told(at: Rows) -> Values:
        return np.array([list(row.values()) for row in _by_layer(intervals[:, at])], dtype=np.float64)

    band = bootstrap_band(told, intervals.shape[1], groups=owner, unit="sentences", seed=seed)
    ends = np.stack([band.low, band.high], axis=-1).tolist()
    return [
        {name: {"value": value, "ci": ci} for (name, value), ci in zip(row.items(), line, strict=True)}
        for row, line in zip(_by_layer(intervals), ends, strict=True)
    ]


def _by_layer(intervals: Values) -> list[dict[str, float | None]]:
    """The numbers of each layer of `intervals` (layer, token)."""
    found: list[dict[str, float | None]] = []
    for line in intervals:
        again = line[line > 1]
        percentile = float(np.quantile(again, 0.8)) if len(again) else None
        found.append({"recurring": len(again) / len(line), "percentile_80": percentile})
    return found


def _shuffled(mean: Tensor, rows: Span, keys: Span, generator: torch.Generator) -> Tensor:
    """Each row's values in random order over the keys up to its own."""
    query = torch.arange(rows.start, rows.stop)[:, None]
    seen = torch.arange(keys.start, keys.stop) <= query
    order = torch.rand(mean.shape, generator=generator).masked_fill(~seen, 2.0).argsort(dim=1)
    return mean.gather(1, order) * seen
