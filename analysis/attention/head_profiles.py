"""What each head attends to: how far back, sinks, the previous token, what followed last time (arXiv 2510.13554 and
others)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.rows.functionals import HORIZON, WINDOW, HeadRhythm, Rhythm, SecondTime
from reasonscope.analysis.attention.rows.served import ServedModel
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import mean_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Span, Trace
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.models.model import Model

SHARE = 0.3  # of all heads count as the most local, and as many as the most global
METRICS = ("span", "sink", "previous", "induction", "waad", "fai")
UNITS = ("tokens", "share of attention", "share of attention", "share of attention", "tokens", "share of attention")


def head_rhythm(
    model: Model | ServedModel,
    ids: Sequence[int],
    rows: Span,
    *,
    window: int = WINDOW,
    horizon: tuple[int, int | None] = HORIZON,
    among: NDArray[np.int64] | None = None,
) -> HeadRhythm:
    """The rhythm of every head of `model` reading `ids`, in the rows of the response: Attention Illuminates LLM
    Reasoning, section 3.

    WAAD_t = Σ_s A[t, s]·min(t − s, `window`); FAI_s = mean of A[t, s] over t from s + nearest to s + furthest of
    `horizon`, within the response (0 if the response ends before). Only the tokens `among` look: all of `rows` if not
    given. Raises InputError, ContextError.
    """
    reader = Rhythm(rows, model.n_layers, model.n_heads, window=window, horizon=horizon, among=among)
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


def _induction_scores(model: Model | ServedModel, *, length: int = 50, repeats: int = 4, seed: int = 0) -> Values:
    """Attention (layer, head, position) on the token that followed this one's last occurrence, in random tokens written
    twice.

    The positions are those of the second half of `repeats` sequences of 2 · `length` tokens; chance is about 1 / (1.5 ·
    `length`).
    """
    rng = np.random.default_rng(seed)
    length = min(length, model.context_length // 2)
    found = []
    for _ in range(repeats):
        half = rng.integers(model.vocabulary, size=length).tolist()
        reader = SecondTime(length, model.n_layers, model.n_heads)
        read_attention(model, half * 2, reader)
        found.append(reader.result())
    return np.concatenate(found, axis=-1)


def head_table(
    model: Model | ServedModel, trace: Trace, sentences: Sequence[Sentence] = (), *, seed: int = 0
) -> Result:
    """What every head attends to (Attention Illuminates LLM Reasoning, arXiv 2510.13554, section 3, and induction).

    Args:
        model: A native model, or one in vLLM (`served_model`).
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


def _uniform_induction(model: Model | ServedModel, length: int = 50) -> float:
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
