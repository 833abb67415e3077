"""Receiver heads of a model over traces, and the sentences of a trace that they look at, each beside what chance gives."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.attention.sentence_attention import (
    ReadSentences,
    SentenceAttention,
    sentence_attention,
    uniform_attention,
)
from reasonscope.analysis.attention.vertical_scores import (
    PROXIMITY,
    kurtosis,
    nan_mean,
    receiver_score,
    split_half_reliability,
    top_heads,
    vertical_scores,
)
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import bootstrap_band, null_band
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.trace import Sentence, Trace
from reasonscope.probes.architecture.heads import Head, random_heads
from reasonscope.probes.models.model import Model

_UNIFORM = "uniform attention over all earlier tokens, in closed form"
_ALIKE = "a head whose vertical scores are all alike has no kurtosis"


def receiver_heads(
    model: Model,
    traces: Sequence[Trace],
    *,
    top: int | None = None,
    proximity: int = PROXIMITY,
    depth_control: bool = True,
    seed: int = 0,
) -> Result:
    """How unevenly each head's attention falls on sentences: kurtosis of its vertical scores, the mean over traces; axes (layer, head).

    Null: a head that looks at all before it alike, on the same sentences; such a head is peaked too where depth is not controlled.
    Interval: bootstrap over traces. `numbers`: the `top` heads (layer 0 left out: before any reasoning), and the split-half reliability
    of the heads' kurtosis over traces. `arrays`: `sink` (layer, head), mean attention on token 0, and `per_trace` (trace, layer, head).

    Departures from arXiv 2506.19143's code: depth control on, layer 0 out of the choice, a sentence that holds token 0 left out.
    Traces of too few sentences for a kurtosis are left out and counted; a state where none is left. Raises InputError, ContextError.
    """
    options: dict[str, Any] = {"proximity": proximity, "depth_control": depth_control}
    return receivers_of([head_kurtosis(model, trace, **options) for trace in traces], top=top, seed=seed)


def head_kurtosis(
    model: Model,
    trace: Trace,
    *,
    proximity: int = PROXIMITY,
    depth_control: bool = True,
    sentences: Sequence[Sentence] | None = None,
) -> Result:
    """Kurtosis of each head's vertical scores over the sentences of one trace, axes (layer, head).

    Null: a head that looks at all before it alike, on the same sentences. `arrays`: `sink` (layer, head), mean attention on token 0. A
    state for a trace of too few sentences. Raises InputError, ContextError.
    """
    common: dict[str, Any] = {"method": "head_kurtosis", "quantity": "kurtosis of vertical scores", "unit": "1"}
    provenance: dict[str, Any] = {"trace": trace.id, "proximity": proximity, "depth_control": depth_control}
    known = ReadSentences.of(trace, sentences)
    provenance |= cut_provenance(known.sentences)
    read = _read(model, trace, known)
    if read is None or len(read.spans) < proximity + 3:
        n = 0 if read is None else len(read.spans)
        reason = f"{n} sentences ({trace.state} thinking); a kurtosis needs {proximity + 3}"
        return undefined(**common, reason=reason, provenance=provenance)
    options: dict[str, Any] = {
        "proximity": proximity,
        "depth_control": depth_control,
        "exclude": sink_sentences(read),
    }
    values = kurtosis(vertical_scores(read.matrix, **options))
    flat = float(kurtosis(vertical_scores(uniform_attention(read.spans, read.n_tokens), **options)))
    return Result(
        **common,
        axes=(Axis.of("layer", model.n_layers), Axis.of("head", model.n_heads)),
        values=values,
        null=Band.of(flat, flat, values.shape, _UNIFORM),
        reason="" if np.isfinite(values).all() else _ALIKE,
        arrays={"sink": read.sink},
        provenance=provenance,
    )


def receivers_of(found: Sequence[Result], *, top: int | None = None, seed: int = 0) -> Result:
    """`receiver_heads` from the `head_kurtosis` of each trace, all taken with the same options."""
    told = found[0].provenance if found else {}
    provenance = {
        "traces": [one.provenance["trace"] for one in found],
        "proximity": told.get("proximity"),
        "depth_control": told.get("depth_control"),
    }
    common: dict[str, Any] = {"method": "receivers", "quantity": "kurtosis of vertical scores", "unit": "1"}
    measured = [one for one in found if one.measured]
    if not measured:
        reason = (
            f"none of {len(found)} traces thinks in enough sentences, {PROXIMITY + 3} or more, which a kurtosis needs"
        )
        return undefined(**common, reason=reason, provenance=provenance)
    per_trace = np.stack([one.values for one in measured])
    values = nan_mean(per_trace, axis=0)
    chance = float(nan_mean(np.array([one.null.high.flat[0] for one in measured if one.null is not None]), axis=0))
    return Result(
        **common,
        axes=measured[0].axes,
        values=values,
        null=Band.of(chance, chance, values.shape, _UNIFORM),
        interval=bootstrap_band(lambda rows: nan_mean(per_trace[rows], axis=0), len(per_trace), seed=seed),
        reason="" if np.isfinite(values).all() else _ALIKE,
        arrays={"per_trace": per_trace, "sink": np.mean([one.arrays["sink"] for one in measured], axis=0)},
        numbers={
            "heads": [str(head) for head in top_heads(values, top, from_layer=1)],
            "split_half_reliability": split_half_reliability(per_trace, seed=seed),
            "n_traces": len(per_trace),
            "n_left_out": len(found) - len(per_trace),
        },
        provenance={**provenance, "seed": seed},
    )


def receiver_scores(
    model: Model,
    trace: Trace,
    heads: Sequence[Head],
    *,
    proximity: int = PROXIMITY,
    depth_control: bool = True,
    sentences: Sequence[Sentence] | None = None,
    n_controls: int = 20,
    seed: int = 0,
) -> Result:
    """How much `heads` look at each sentence of a trace: mean vertical score, axes (sentence,).

    Null: the score by `n_controls` different sets of as many other heads (`random_heads`: all sets there are, if fewer), 95 %.
    `arrays`: `matrix` (sentence, sentence), mean attention between sentences in these heads. The last `proximity` sentences have no
    score. A state for a trace of fewer sentences. Raises InputError, ContextError.
    """
    common: dict[str, Any] = {
        "method": "receiver_scores",
        "quantity": "mean vertical score over receiver heads",
        "unit": "1",
    }
    provenance: dict[str, Any] = {
        "trace": trace.id,
        "heads": [str(head) for head in heads],
        "depth_control": depth_control,
        "seed": seed,
    }
    known = ReadSentences.of(trace, sentences)
    provenance |= cut_provenance(known.sentences)
    read = _read(model, trace, known)
    if read is None or len(read.spans) <= proximity:
        n = 0 if read is None else len(read.spans)
        reason = f"{n} sentences ({trace.state} thinking): a score needs a target {proximity} sentences further on"
        return undefined(**common, reason=reason, axis="sentence", provenance=provenance)
    vertical = vertical_scores(
        read.matrix, proximity=proximity, depth_control=depth_control, exclude=sink_sentences(read)
    )
    values = known.spread(receiver_score(vertical, heads))
    others = random_heads(heads, n_layers=model.n_layers, n_heads=model.n_heads, n_controls=n_controls, seed=seed)
    drawn = [known.spread(receiver_score(vertical, other)) for other in others]
    scored = np.isfinite(values)
    return Result(
        **common,
        axes=(Axis.of("sentence", len(values)),),
        values=values,
        null=null_band(np.where(scored, drawn, np.nan), "different sets of other heads"),
        reason=f"nothing stands {proximity} sentences behind the last ones, and a sentence without tokens has no score",
        arrays={"matrix": known.spread(np.mean([read.matrix[head.layer, head.index] for head in heads], axis=0), 2)},
        provenance=provenance,
    )


def sink_sentences(read: SentenceAttention) -> tuple[int, ...]:
    """Sentences that hold token 0, where attention goes that has nothing to look for."""
    return tuple(index for index, span in enumerate(read.spans) if 0 in span)


def _read(model: Model, trace: Trace, known: ReadSentences) -> SentenceAttention | None:
    if not known.places:
        return None
    return sentence_attention(model, trace.token_ids[: known.spans[-1].stop].tolist(), known.spans)
