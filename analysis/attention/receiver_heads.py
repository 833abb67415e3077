"""Receiver heads of a model over traces, and the sentences of a trace that they attend to, each with its null."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.attention.rows.functionals import SentenceAttention
from reasonscope.analysis.attention.rows.served import ServedModel
from reasonscope.analysis.attention.sentence_attention import ReadSentences, sentence_attention, uniform_attention
from reasonscope.analysis.attention.vertical import (
    PROXIMITY,
    kurtosis,
    nan_mean,
    split_half_reliability,
    top_heads,
    vertical_scores,
)
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import bootstrap_band, null_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.trace import Sentence, Trace
from reasonscope.probes.architecture.heads import Head, all_heads, random_heads
from reasonscope.probes.models.model import Model

_UNIFORM = "uniform attention over all earlier tokens, in closed form"
_ALIKE = "a head whose vertical scores are all equal has no kurtosis"


def receiver_heads(
    model: Model | ServedModel,
    traces: Sequence[Trace],
    *,
    top: int | None = None,
    proximity: int = PROXIMITY,
    depth_control: bool = True,
    seed: int = 0,
) -> Result:
    """Each head's kurtosis of vertical scores, averaged over traces (Thought Anchors, arXiv 2506.19143); axes (layer, head).

    Null: a head that attends equally to everything before it. `numbers` has the `top` heads and their split-half reliability,
    `arrays` the mean attention on token 0 (`sink`) and the kurtosis `per_trace`. Departures from the published code: depth
    control is on, layer 0 and a sentence that holds token 0 are left out.
    """
    options: dict[str, Any] = {"proximity": proximity, "depth_control": depth_control}
    return receivers_of([head_kurtosis(model, trace, **options) for trace in traces], top=top, seed=seed)


def head_kurtosis(
    model: Model | ServedModel,
    trace: Trace,
    *,
    proximity: int = PROXIMITY,
    depth_control: bool = True,
    sentences: Sequence[Sentence] | None = None,
) -> Result:
    """Kurtosis of each head's vertical scores over the sentences of one trace, axes (layer, head).

    Null: a head that attends equally to everything before it, on the same sentences. `arrays`: `sink` (layer, head),
    mean attention on token 0. Undefined for a trace with too few sentences. Raises InputError, ContextError.
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
        "exclude": _sink_sentences(read),
    }
    values = kurtosis(vertical_scores(read.matrix, **options))
    flat = float(kurtosis(vertical_scores(uniform_attention(read.spans, read.n_tokens), **options)))
    return Result(
        **common,
        axes=(Axis.of("layer", model.n_layers), Axis.of("head", model.n_heads)),
        values=values,
        null=Band.of(flat, flat, values.shape, _UNIFORM),
        reason="" if np.isfinite(values).all() else model.layout.without_heads or _ALIKE,
        arrays={"sink": read.sink},
        provenance=provenance,
    )


def receivers_of(found: Sequence[Result], *, top: int | None = None, seed: int = 0) -> Result:
    """Combine the head kurtosis of several traces into the receiver heads of the model (Thought Anchors, arXiv
    2506.19143, section 4).

    Args:
        found: The `head_kurtosis` of each trace, all with the same options.
        top: How many receiver heads to name; by default 20, but at most a sixth of all heads.
        seed: Random seed.

    Returns:
        Axes (layer, head): mean kurtosis over traces, with a bootstrap interval over traces. `numbers`: the `top` heads
        and the split-half reliability. `arrays`: `sink` (layer, head) and `per_trace` (trace, layer, head). Undefined,
        with the reason, if no trace has enough sentences.

    Departures: depth control is on, layer 0 is excluded, and a sentence that holds token 0 is left out.

    Example:
        rs.analyse("heads", "runs/mine")
        found = list(rs.open_run("runs/mine").results("head_kurtosis"))
        rs.analysis.receivers_of(found).numbers["top"]
    """
    told = found[0].provenance if found else {}
    provenance = {
        "traces": [one.provenance["trace"] for one in found],
        "proximity": told.get("proximity"),
        "depth_control": told.get("depth_control"),
    }
    common: dict[str, Any] = {"method": "receivers", "quantity": "kurtosis of vertical scores", "unit": "1"}
    measured = [one for one in found if one.measured]
    if not measured:
        reason = f"none of {len(found)} traces has enough sentences in its thinking: a kurtosis needs {PROXIMITY + 3}"
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
        reason="" if np.isfinite(values).all() else next((one.reason for one in measured if one.reason), _ALIKE),
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
    model: Model | ServedModel,
    trace: Trace,
    heads: Sequence[Head],
    *,
    proximity: int = PROXIMITY,
    depth_control: bool = True,
    sentences: Sequence[Sentence] | None = None,
    n_controls: int = 20,
    seed: int = 0,
) -> Result:
    """How much receiver heads attend to each sentence of a trace: the mean vertical score (Thought Anchors, arXiv
    2506.19143, section 4).

    Args:
        model: A native model, or one in vLLM (`served_model`).
        trace: The trace, with tokens.
        heads: The receiver heads.
        proximity: Only targets at least so many sentences later count.
        depth_control: Rank a target's attention among its sources, so that late targets weigh as much as early ones.
        sentences: Its sentences; by default those of `cut_trace`.
        n_controls: Random sets of other heads for the null; all sets if there are fewer.
        seed: Random seed.

    Returns:
        Axes (sentence,). The null is 95 % of the scores by different sets of as many other heads (`random_heads`).
        `arrays`: `matrix` (sentence, sentence), mean attention between sentences in these heads. The last `proximity`
        sentences have no score. Undefined, with the reason, for a trace with fewer sentences.

    Raises:
        InputError: If the trace cannot be fed, or no heads are given.
        ContextError: If it exceeds the model's context.

    Departures: depth control is on by default, and a sentence that holds token 0 is left out.

    Example:
        heads = [rs.Head(layer=2, index=1)]
        result = rs.analysis.receiver_scores(model, trace, heads)
        result.values.argsort()[-5:]
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
        reason = f"{n} sentences ({trace.state} thinking): a score needs a target {proximity} sentences later"
        return undefined(**common, reason=reason, axis="sentence", provenance=provenance)
    vertical = vertical_scores(
        read.matrix, proximity=proximity, depth_control=depth_control, exclude=_sink_sentences(read)
    )
    values = known.spread(_receiver_score(vertical, heads))
    others = random_heads(heads, all_heads(model.layout), n_controls=n_controls, seed=seed)
    drawn = [known.spread(_receiver_score(vertical, other)) for other in others]
    scored = np.isfinite(values)
    return Result(
        **common,
        axes=(Axis.of("sentence", len(values)),),
        values=values,
        null=null_band(np.where(scored, drawn, np.nan), "different sets of other heads"),
        reason=f"the last {proximity} sentences have no target, and a sentence without tokens has no score",
        arrays={"matrix": known.spread(np.mean([read.matrix[head.layer, head.index] for head in heads], axis=0), 2)},
        provenance=provenance,
    )


def _receiver_score(vertical: Values, heads: Sequence[Head]) -> Values:
    """Mean vertical score (sentence,) of `vertical` (layer, head, sentence) over `heads`."""
    if not heads:
        raise InputError("no receiver head to score sentences by; give at least one")
    return np.asarray(np.mean([vertical[head.layer, head.index] for head in heads], axis=0))


def _sink_sentences(read: SentenceAttention) -> tuple[int, ...]:
    """Sentences that hold token 0, which draws attention regardless of content."""
    return tuple(index for index, span in enumerate(read.spans) if 0 in span)


def _read(model: Model | ServedModel, trace: Trace, known: ReadSentences) -> SentenceAttention | None:
    if not known.places:
        return None
    return sentence_attention(model, trace.token_ids[: known.spans[-1].stop].tolist(), known.spans)
