"""What each head attends to: how far back, sinks, the previous token, what followed last time (arXiv 2510.13554 and
others)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.analysis.attention.blocks import AttentionBlock, read_attention
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import mean_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Span, Trace
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.models.model import Model

WINDOW = 10  # tokens, for WAAD
HORIZON: tuple[int, int | None] = (
    10,
    50,
)  # tokens after a key, for FAI; (0, None) is the paper's other setting: to the end
SHARE = 0.3  # of all heads count as the most local, and as many as the most global
METRICS = ("span", "sink", "previous", "induction", "waad", "fai")
UNITS = ("tokens", "share of attention", "share of attention", "share of attention", "tokens", "share of attention")


@dataclass(frozen=True, kw_only=True, eq=False)
class _HeadRhythm:
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


class _Rhythm:
    """A reader for `read_attention` that collects, for every head, the fields of `_HeadRhythm`."""

    def __init__(
        self,
        rows: Span,
        n_layers: int,
        n_heads: int,
        *,
        window: int = WINDOW,
        horizon: tuple[int, int | None] = HORIZON,
        among: NDArray[np.int64] | None = None,
    ) -> None:
        if not len(rows):
            raise InputError("no row of attention to read; a trace needs tokens after its prompt")
        if window < 1 or horizon[0] < 0 or (horizon[1] is not None and horizon[1] < horizon[0]):
            raise InputError(
                f"window {window}, horizon {horizon}: the window must be at least 1, and 0 <= nearest <= furthest"
            )
        self._rows, self._window, self._horizon = rows, window, horizon
        self._looks = np.zeros(rows.stop, dtype=bool)
        self._looks[rows.slice if among is None else among] = True
        shape = n_layers, n_heads
        kept = ("span", "sink", "previous", "waad")
        self._kept = {name: torch.zeros(*shape, len(rows), dtype=torch.float64) for name in kept}
        self._received = torch.zeros(*shape, rows.stop, dtype=torch.float64)

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
            self._kept[name][block.layer, :, at] = values.cpu()
        far = query[:, None] - key
        nearest, furthest = self._horizon
        inside = (far >= nearest) if furthest is None else (far >= nearest) & (far <= furthest)
        inside &= torch.from_numpy(self._looks[rows.slice]).to(inside.device)[:, None]
        self._received[block.layer, :, block.keys.slice] += (attention * inside).sum(1).double().cpu()

    def result(self) -> _HeadRhythm:
        key, stop = np.arange(self._rows.start, self._rows.stop), self._rows.stop
        nearest, furthest = self._horizon
        before = np.concatenate([[0], np.cumsum(self._looks)])  # the queries before each token
        after = np.full_like(key, stop) if furthest is None else np.minimum(key + furthest + 1, stop)
        seen = np.maximum(before[after] - before[np.minimum(key + nearest, stop)], 0)
        return _HeadRhythm(
            rows=self._rows,
            **{name: values.numpy() for name, values in self._kept.items()},
            fai=self._received[..., self._rows.start :].numpy() / np.maximum(seen, 1),
        )


def head_rhythm(
    model: Model,
    ids: Sequence[int],
    rows: Span,
    *,
    window: int = WINDOW,
    horizon: tuple[int, int | None] = HORIZON,
    among: NDArray[np.int64] | None = None,
) -> _HeadRhythm:
    """The rhythm of every head of `model` reading `ids`, in the rows of the response: Attention Illuminates LLM
    Reasoning, section 3.

    WAAD_t = Σ_s A[t, s]·min(t − s, `window`); FAI_s = mean of A[t, s] over t from s + nearest to s + furthest of
    `horizon`, within the response (0 if the response ends before). Only the tokens `among` look: all of `rows` if not
    given. Raises InputError, ContextError.
    """
    reader = _Rhythm(rows, model.n_layers, model.n_heads, window=window, horizon=horizon, among=among)
    read_attention(model, ids, reader)
    return reader.result()


def local_and_global(span: Values, share: float = SHARE) -> tuple[list[Head], list[Head]]:
    """The `share` of all heads with the shortest distance, and the share with the longest: `span` (layer, head)."""
    n_heads = int(np.isfinite(span).sum())  # blocks without attention have none
    n = int(share * n_heads)
    if n < 1:
        raise InputError(f"a share of {share} of {n_heads} heads rounds to 0; ask for more")
    order = np.argsort(span, axis=None, kind="stable")[:n_heads]
    heads = [Head(layer=int(i) // span.shape[1], index=int(i) % span.shape[1]) for i in order]
    return heads[:n], heads[::-1][:n]


def over(values: Values, heads: Sequence[Head]) -> Values:
    """Mean of `values` (layer, head, …) over `heads`."""
    return np.asarray(np.mean([values[head.layer, head.index] for head in heads], axis=0))


def _induction_scores(model: Model, *, length: int = 50, repeats: int = 4, seed: int = 0) -> Values:
    """Attention (layer, head, position) on the token that followed this one's last occurrence, in random tokens written
    twice.

    The positions are those of the second half of `repeats` sequences of 2 · `length` tokens; chance is about 1 / (1.5 ·
    `length`).
    """
    rng = np.random.default_rng(seed)
    length = min(length, model.context_length // 2)
    found = torch.zeros(model.n_layers, model.n_heads, repeats, length, dtype=torch.float64)

    def read(block: AttentionBlock) -> None:
        for row in range(max(block.rows.start, length), block.rows.stop):
            if (key := row - length + 1) >= block.keys.start:
                seen = block.probabilities[:, row - block.rows.start, key - block.keys.start]
                found[block.layer, :, repeat, row - length] = seen.double().cpu()

    for repeat in range(repeats):  # noqa: B007 - `read` writes there
        half = rng.integers(model.vocabulary, size=length).tolist()
        read_attention(model, half * 2, read)
    return found.flatten(2).numpy()


def head_table(model: Model, trace: Trace, sentences: Sequence[Sentence] = (), *, seed: int = 0) -> Result:
    """What every head attends to (Attention Illuminates LLM Reasoning, arXiv 2510.13554, section 3, and induction).

    Args:
        model: A native model.
        trace: The trace, with tokens.
        sentences: Its sentences, over which intervals are resampled (at least two).
        seed: Random seed.

    Returns:
        Axes (metric, layer, head): means over the thinking of the span (tokens), attention on token 0 and on the
        previous token, WAAD (tokens) and FAI, and induction over random tokens. The null is a head that attends equally
        to all tokens up to its own. `numbers` names the most local and the most global heads; `arrays` hold `waad` and
        `fai` (token,) over these sets, and `thinking`, their first and last token. Undefined, with the reason, for a
        trace without thinking.

    Raises:
        InputError: If the trace cannot be fed.
        ContextError: If it exceeds the model's context.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        result = rs.analysis.head_table(model, trace, rs.sentences(trace))
        result.at(metric="induction")  # (layer, head)
    """
    common: dict[str, Any] = {
        "method": "heads",
        "quantity": "what each head attends to",
        "unit": "tokens, or shares of attention",
    }
    provenance: dict[str, Any] = {"trace": trace.id, "seed": seed, "window": WINDOW, "horizon": HORIZON, "share": SHARE}
    provenance |= cut_provenance(sentences)
    rows = trace.tokens.thinking
    if not len(rows):
        return undefined(**common, reason=f"{trace.state} thinking, so no row to read", provenance=provenance)
    found = head_rhythm(model, trace.token_ids[: rows.stop].tolist(), rows, among=trace.thinking_positions)
    places = trace.thinking_positions
    owner = sentence_of_each(sentences, rows.stop)[places]
    induction = _induction_scores(model, seed=seed)
    of_trace = np.stack([found.span, found.sink, found.previous, found.waad, found.fai])[..., places - rows.start]
    values = _beside(of_trace.mean(axis=-1), induction.mean(axis=-1))
    sure = mean_band(of_trace, owner, seed=seed)
    by_place = mean_band(induction, np.arange(induction.shape[-1]), unit="places", seed=seed)
    query = places
    alike = 1 / (query + 1)
    uniform = [(query / 2).mean(), alike.mean(), alike.mean(), _uniform_induction(model), *_uniform_rhythm(query)]
    band = np.array(uniform)[:, None, None]
    local, wide = local_and_global(of_trace[METRICS.index("span")].mean(axis=-1))
    return Result(
        **common,
        axes=(Axis.of("metric", METRICS), Axis.of("layer", model.n_layers), Axis.of("head", model.n_heads)),
        values=values,
        reason=model.layout.without_heads,
        null=Band.of(band, band, values.shape, "a head that attends equally to all tokens up to its own"),
        interval=Band(
            low=_beside(sure.low, by_place.low),
            high=_beside(sure.high, by_place.high),
            what=f"{sure.what}; induction: {by_place.what}",
        ),
        arrays={
            "waad": over(_blank_between(found.waad, places - rows.start), local),
            "fai": over(_blank_between(found.fai, places - rows.start), wide),
            "thinking": np.array([rows.start, rows.stop]),
        },
        numbers={
            "units": dict(zip(METRICS, UNITS, strict=True)),
            "local": list(map(str, local)),
            "global": list(map(str, wide)),
        },
        provenance=provenance,
    )


def _blank_between(values: Values, places: NDArray[np.int64]) -> Values:
    """`values` (layer, head, token) at `places`, NaN at the others: the text between two blocks of thinking."""
    kept = np.full_like(values, np.nan)
    kept[..., places] = values[..., places]
    return kept


def _beside(of_trace: Values, induction: Values) -> Values:
    """The metrics of a trace (metric, layer, head), with induction (layer, head) at its place among METRICS."""
    return np.insert(of_trace, METRICS.index("induction"), induction, axis=0)


def _uniform_induction(model: Model, length: int = 50) -> float:
    length = min(length, model.context_length // 2)
    return float((1 / np.arange(length + 1, 2 * length + 1)).mean())


def _uniform_rhythm(query: NDArray[np.int64]) -> tuple[float, float]:
    """Mean WAAD and FAI of a head that attends equally to all tokens up to its own."""
    near = np.minimum(query, WINDOW)
    waad = (near * (near + 1) / 2 + WINDOW * (query - near)) / (query + 1)
    nearest, furthest = HORIZON
    first = np.searchsorted(query, query + nearest)
    last = np.searchsorted(query, query + (np.inf if furthest is None else furthest), side="right")
    later = [1 / (query[a:b] + 1) for a, b in zip(first, last, strict=True)]
    return float(waad.mean()), float(np.mean([shares.mean() if len(shares) else 0.0 for shares in later]))


def _diagonals(attention: Tensor, rows: Span, keys: Span, width: int) -> Tensor:
    """Attention on the token itself and the `width` − 1 before it (head, row, distance), 0 before the first token."""
    query = torch.arange(rows.start, rows.stop, device=attention.device)[:, None]
    place = query - torch.arange(width, device=attention.device) - keys.start
    gathered = attention.gather(2, place.clamp(min=0).expand(len(attention), -1, -1))
    return gathered.masked_fill(place < 0, 0.0)
