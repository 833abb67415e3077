"""What rows of attention are reduced to: numbers for each head, gathered block by block. Its source travels to vLLM."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.analysis.attention.rows.block import AttentionBlock
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span

WINDOW = 10  # tokens, for WAAD
# Tokens after a key, for FAI; (0, None) is the paper's other setting: to the end.
HORIZON: tuple[int, int | None] = (10, 50)
_BY_ROW = ("span", "sink", "previous", "waad")


class RowFunctional(ABC):
    """A reader for `read_attention` that adds up what it needs of each head alone, so that heads may be read in several processes.

    Attributes:
        sums: What it gathered, by name, each (layer, head, …).
        told: Its arguments besides the numbers of layers and heads, in JSON.
    """

    sums: dict[str, Tensor]
    told: dict[str, Any]

    @abstractmethod
    def __call__(self, block: AttentionBlock) -> None:
        """Add the rows of a block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadRhythm:
    """The behaviour of every head over one sequence, for the tokens of `rows`; all arrays are (layer, head, token).

    Attributes:
        rows: The tokens.
        span: Mean distance attended to, in tokens.
        sink: Attention on token 0.
        previous: Attention on the token before.
        waad: Windowed average attention distance. Like `fai` it is linear in the attention, so that of a set of heads
            is their mean.
        fai: Future attention influence.
    """

    rows: Span
    span: Values
    sink: Values
    previous: Values
    waad: Values
    fai: Values


class Rhythm(RowFunctional):
    """For every head, the fields of `HeadRhythm`."""

    def __init__(
        self,
        rows: Span,
        n_layers: int,
        n_heads: int,
        *,
        window: int = WINDOW,
        horizon: tuple[int, int | None] = HORIZON,
        among: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        if not len(rows):
            raise InputError("no row of attention to read; a trace needs tokens after its prompt")
        if window < 1 or horizon[0] < 0 or (horizon[1] is not None and horizon[1] < horizon[0]):
            raise InputError(
                f"window {window}, horizon {horizon}: the window must be at least 1, and 0 <= nearest <= furthest"
            )
        self._rows, self._window, self._horizon = rows, window, horizon
        self._looks = np.zeros(rows.stop, dtype=bool)
        self._looks[rows.slice if among is None else np.asarray(among, dtype=np.int64)] = True
        shape = n_layers, n_heads
        self.sums = {name: torch.zeros(*shape, len(rows), dtype=torch.float64) for name in _BY_ROW}
        self.sums["received"] = torch.zeros(*shape, rows.stop, dtype=torch.float64)
        looking = None if among is None else [int(place) for place in among]
        self.told = {"rows": [rows.start, rows.stop], "window": window, "horizon": horizon, "among": looking}

    def __call__(self, block: AttentionBlock) -> None:
        start = max(block.rows.start, self._rows.start)
        if start >= min(block.rows.stop, self._rows.stop):
            return
        rows = Span(start, min(block.rows.stop, self._rows.stop))
        attention = block.probabilities[:, rows.start - block.rows.start : rows.stop - block.rows.start]
        query = torch.arange(rows.start, rows.stop, device=attention.device)
        key = torch.arange(block.keys.start, block.keys.stop, device=attention.device)
        looked = attention @ torch.stack([torch.ones_like(key), key], dim=1).to(attention)
        mass, place = looked.double().unbind(-1)
        near = _diagonals(attention, rows, block.keys, self._window).double()
        weights = torch.arange(self._window, 0, -1, device=attention.device, dtype=torch.float64)
        found = {"span": mass * query - place, "previous": near[..., 1] if self._window > 1 else mass * 0}
        if block.keys.start == 0:
            found["sink"] = attention[..., 0].double()
        # A row sums to its mass, so Σ A·min(t − s, W) = W·mass − Σ over δ < W of (W − δ)·A[t, t − δ].
        found["waad"] = self._window * mass - (near * weights).sum(-1)
        at = slice(rows.start - self._rows.start, rows.stop - self._rows.start)
        for name, values in found.items():
            self.sums[name][block.layer, :, at] = values.cpu()
        far = query[:, None] - key
        nearest, furthest = self._horizon
        inside = (far >= nearest) if furthest is None else (far >= nearest) & (far <= furthest)
        inside &= torch.from_numpy(self._looks[rows.slice]).to(inside.device)[:, None]
        self.sums["received"][block.layer, :, block.keys.slice] += (attention * inside).sum(1).double().cpu()

    def result(self) -> HeadRhythm:
        key, stop = np.arange(self._rows.start, self._rows.stop), self._rows.stop
        nearest, furthest = self._horizon
        before = np.concatenate([[0], np.cumsum(self._looks)])  # the queries before each token
        after = np.full_like(key, stop) if furthest is None else np.minimum(key + furthest + 1, stop)
        seen = np.maximum(before[after] - before[np.minimum(key + nearest, stop)], 0)
        return HeadRhythm(
            rows=self._rows,
            **{name: self.sums[name].numpy() for name in _BY_ROW},
            fai=self.sums["received"][..., self._rows.start :].numpy() / np.maximum(seen, 1),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceAttention:
    """Attention between the sentences of one sequence.

    `matrix` (layer, head, sentence, sentence): mean attention of the tokens of the row's sentence on those of the
    column's; the causal zeros inside a sentence count. NaN for a sentence without tokens. `sink` (layer, head): mean
    share that token 0 takes from all rows.
    """

    spans: tuple[Span, ...]
    matrix: Values
    sink: Values
    n_tokens: int


class SentenceMeans(RowFunctional):
    """The means between `spans` of tokens: R · A · E without A.

    The rows of a block are summed by sentence first, so that only as many rows as the block has sentences are
    multiplied by E.
    """

    def __init__(self, spans: Sequence[Span], n_tokens: int, n_layers: int, n_heads: int) -> None:
        check_spans(spans, n_tokens)
        self._spans = tuple(spans)
        self._n_tokens = n_tokens
        self._columns = torch.zeros(n_tokens, len(spans) + 1)  # the last column: token 0, the usual sink
        for index, span in enumerate(spans):
            self._columns[span.slice, index] = 1.0
        self._columns[0, -1] = 1.0
        self.sums = {
            "means": torch.zeros(n_layers, n_heads, len(spans), len(spans) + 1, dtype=torch.float64),
            "sink": torch.zeros(n_layers, n_heads, dtype=torch.float64),
        }
        self.told = {"spans": [[span.start, span.stop] for span in spans], "n_tokens": n_tokens}

    def __call__(self, block: AttentionBlock) -> None:
        probabilities = block.probabilities
        columns = self._columns[block.keys.slice].to(probabilities)
        members = self._columns[block.rows.slice, :-1]
        n_edited = members.any(dim=0).nonzero()[:, 0]
        own = members[:, n_edited].T.to(probabilities) @ probabilities  # (head, sentence, key)
        self.sums["means"][block.layer][:, n_edited] += (own @ columns).cpu()
        if block.keys.start == 0:
            self.sums["sink"][block.layer] += probabilities[..., 0].sum(dim=-1).cpu()

    def result(self) -> SentenceAttention:
        """The means over all rows."""
        lengths = torch.tensor([len(span) for span in self._spans], dtype=torch.float64)
        means = self.sums["means"][..., :-1] / lengths[:, None] / lengths  # a sentence without tokens: 0 / 0 is NaN
        return SentenceAttention(
            spans=self._spans,
            matrix=means.numpy(),
            sink=(self.sums["sink"] / self._n_tokens).numpy(),
            n_tokens=self._n_tokens,
        )


class RowMeans(RowFunctional):
    """The mean attention of a few queries, `rows`, on every key up to the last of them."""

    def __init__(self, rows: Span, n_layers: int, n_heads: int) -> None:
        if not len(rows):
            raise InputError("no row of attention to read; name the tokens that attend")
        self._rows = rows
        self.sums = {"sums": torch.zeros(n_layers, n_heads, rows.stop, dtype=torch.float64)}
        self.told = {"rows": [rows.start, rows.stop]}

    def __call__(self, block: AttentionBlock) -> None:
        start, stop = max(block.rows.start, self._rows.start), min(block.rows.stop, self._rows.stop)
        if start >= stop:
            return
        keys = Span(block.keys.start, min(block.keys.stop, self._rows.stop))
        looked = block.probabilities[:, start - block.rows.start : stop - block.rows.start, : len(keys)]
        self.sums["sums"][block.layer, :, keys.slice] += looked.sum(dim=1).double().cpu()

    def result(self) -> Values:
        """Attention (layer, head, key)."""
        return np.asarray((self.sums["sums"] / len(self._rows)).numpy())


class SecondTime(RowFunctional):
    """Attention (layer, head, position) on the token that followed this one's last occurrence, in `length` tokens written twice."""

    def __init__(self, length: int, n_layers: int, n_heads: int) -> None:
        self._length = length
        self.sums = {"seen": torch.zeros(n_layers, n_heads, length, dtype=torch.float64)}
        self.told = {"length": length}

    def __call__(self, block: AttentionBlock) -> None:
        for row in range(max(block.rows.start, self._length), block.rows.stop):
            if (key := row - self._length + 1) >= block.keys.start:
                seen = block.probabilities[:, row - block.rows.start, key - block.keys.start]
                self.sums["seen"][block.layer, :, row - self._length] = seen.double().cpu()

    def result(self) -> Values:
        """The attention of the second half of the tokens."""
        return np.asarray(self.sums["seen"].numpy())


def check_spans(spans: Sequence[Span], n_tokens: int) -> None:
    """Raise InputError unless there are spans, inside the tokens, ascending and without overlaps."""
    if not spans:
        raise InputError("no sentences; give at least one span of tokens")
    ends = [0, *(span.stop for span in spans)]
    if any(span.start < end for span, end in zip(spans, ends, strict=False)) or ends[-1] > n_tokens:
        raise InputError(
            f"spans of {len(spans)} sentences over {n_tokens} tokens overlap, do not ascend or end outside; split the trace again"
        )


def _diagonals(attention: Tensor, rows: Span, keys: Span, width: int) -> Tensor:
    """Attention on the token itself and the `width` − 1 before it (head, row, distance), 0 before the first token."""
    query = torch.arange(rows.start, rows.stop, device=attention.device)[:, None]
    place = query - torch.arange(width, device=attention.device) - keys.start
    gathered = attention.gather(2, place.clamp(min=0).expand(len(attention), -1, -1))
    return gathered.masked_fill(place < 0, 0.0)


KINDS: Mapping[str, type[Any]] = {one.__name__: one for one in (Rhythm, SentenceMeans, RowMeans, SecondTime)}


def made(kind: str, told: Mapping[str, Any], n_layers: int, n_heads: int) -> RowFunctional:
    """The functional of a name, from its arguments in JSON."""
    given = dict(told)
    if "rows" in given:
        given["rows"] = Span(*given["rows"])
    if "spans" in given:
        given["spans"] = [Span(*span) for span in given["spans"]]
    if "horizon" in given:
        given["horizon"] = tuple(given["horizon"])
    found: RowFunctional = KINDS[kind](**given, n_layers=n_layers, n_heads=n_heads)
    return found
