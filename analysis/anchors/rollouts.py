"""Counterfactual anchors of a trace: rewrite its thinking from before each sentence, and see how the answer changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.analysis.anchors.importance import (
    METRICS,
    Convention,
    Rollout,
    importance_ends,
    importance_table,
    null_values,
    resampled_sentences,
    sentence_effects,
)
from reasonscope.analysis.anchors.similarity import Embedder, tfidf
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import null_band
from reasonscope.data.arrays import Values
from reasonscope.data.progress import working
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.answers import equivalent, extract_answer
from reasonscope.data.text.sentence_splitter import split_sentences
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Sampling, Sentence, Trace
from reasonscope.probes.generation.branches import Branch, Writer
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.generation.forced_answers import Decoder, ForcedAnswers
from reasonscope.probes.generation.rollout import trace_seed

_ROUNDING = 1e-6  # equal sentences have a cosine of 1 up to rounding, and for a confident model the median is 1
METHOD, UNIT = "anchors", "1 (accuracy), nats (kl)"
_QUANTITY = "importance of a sentence for the answer"
_INTERVAL = (
    "over rollouts, 95%: Wilson's of shares, Agresti and Caffo's of differences; none of nats and of distinct sentences"
)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What was written from one cut: the sentences of the rest of its thinking, its answer (None: none), and its
    number of tokens."""

    sentences: tuple[str, ...]
    answer: str | None
    n_tokens: int


def resample(
    writer: Writer,
    trace: Trace,
    sentences: Sequence[Sentence],
    decode: Decoder,
    sampling: Sampling,
    *,
    allotment: Allotment | None = None,
    thinking: Thinking | None = None,
) -> dict[int, list[Continuation]]:
    """Continue a trace from before each sentence, and last from after the last one (Thought Anchors, arXiv 2506.19143,
    section 3).

    Args:
        writer: Writes the continuations: a `PrefixWriter` of the model, or a server of it.
        trace: The trace, with tokens.
        sentences: Its sentences.
        decode: Token ids to text.
        sampling: How to sample.
        allotment: How many rollouts each sentence gets; each of its rounds is one call of the writer.
        thinking: How thinking is found in the continuations; between `<think>` tags by default.

    Returns:
        Continuations by cut: cut i keeps sentences 0 … i − 1. All cuts share the trace's keys and values.

    Raises:
        InputError: For a trace without tokens.

    Departures: cuts are made in the token ids of the trace, so that line breaks stay and a sentence that occurs twice
    is not removed twice, as in the published code.

    Example:
        results = rs.analyse("anchors", "runs/mine", rollouts=20)  # resamples, embeds and judges
        results[0].at(metric="resampling_kl")  # (sentence,)
        results[0].arrays["n"]
    """
    plan = allotment or Allotment()
    cuts = [sentence.tokens.start for sentence in sentences] + [sentences[-1].tokens.stop]
    found: dict[int, list[Continuation]] = {i: [] for i in range(len(cuts))}
    gold = trace.problem.answer or trace.final_answer
    with working("rolling out", total=len(cuts), unit="sentences") as work:
        while True:
            todo = {i: plan.wanted(_hits(rows, gold), len(rows)) for i, rows in found.items()}
            work.done = sum(not n for n in todo.values())
            places = [(i, len(found[i]) + k) for i, n in todo.items() for k in range(n)]
            if not places:
                return found
            branches = [
                Branch(cut=cuts[i], seed=trace_seed(sampling.seed, f"{trace.id}/resample/{i}/{k}")) for i, k in places
            ]
            for (i, _), done in zip(places, writer(trace.token_ids.tolist(), branches, sampling), strict=True):
                found[i].append(continuation(done, decode, thinking or Thinking()))


def _hits(rows: Sequence[Continuation], gold: str | None) -> int:
    return sum(gold is not None and equivalent(row.answer, gold) for row in rows)


def continuation(done: Completion, decode: Decoder, thinking: Thinking) -> Continuation:
    """The completion cut at the end of its thinking; if that was cut off it never answered."""
    text, found = thinking.continued(decode(done.token_ids[done.n_prompt_tokens :].tolist()), finish=done.finish_reason)
    thoughts, answer = [text[block.slice] for block in found.blocks], text[found.regions.answer.slice]
    return Continuation(
        sentences=tuple(thought[span.slice] for thought in thoughts for span in split_sentences(thought)),
        answer=None if found.state == "truncated" else found.final or extract_answer(answer),
        n_tokens=len(done.token_ids) - done.n_prompt_tokens,
    )


def anchors_of_trace(
    trace: Trace,
    sentences: Sequence[Sentence],
    continuations: Mapping[int, Sequence[Continuation]],
    *,
    forced: ForcedAnswers | None = None,
    embed: Embedder | None = None,
    convention: Convention | None = None,
    threshold: float | None = None,
    n_permutations: int = 200,
    seed: int = 0,
) -> Result:
    """How much the answer depends on each sentence, by every importance of Thought Anchors (arXiv 2506.19143, section
    3).

    Args:
        trace: The trace.
        sentences: Its sentences.
        continuations: By cut, from `resample`.
        forced: Forced answers at the cuts, for the `forced_…` metrics.
        embed: Turns texts into unit vectors; by default TF-IDF on these sentences.
        convention: How numbers are counted.
        threshold: A resampled sentence below this cosine counts as different; by default the median over all pairs,
            which is how the paper came to .8 for its sentence model.
        n_permutations: Draws for the null.
        seed: Random seed.

    Returns:
        Axes (metric, sentence); see `importances`. The null mixes the answers of neighbouring cuts; the intervals are
        those of `importance_ends`. `arrays`: `effects` (target, source), how much keeping one sentence makes another
        appear; `n` (cut,) rollouts. `numbers`: `resampled`, what was written instead of each sentence. Undefined, with
        the reason, if no rollout gives an answer.

    Departures: Laplace smoothing and one sign for all differences (`Convention`), and the threshold.

    Example:
        results = rs.analyse("anchors", "runs/mine")
        results[0].at(metric="counterfactual_kl")  # (sentence,)
        results[0].numbers["resampled"]
    """
    n = len(sentences)
    provenance = {"trace": trace.id, "seed": seed, "rollouts": sum(map(len, continuations.values()))}
    provenance |= cut_provenance(sentences)
    answered = [row for rows in continuations.values() for row in rows if row.answer]
    if n < 2 or not answered:
        reason = "the thinking has fewer than two sentences" if n < 2 else "no rollout gave an answer"
        return undefined(method=METHOD, quantity=_QUANTITY, unit=UNIT, reason=reason, provenance=provenance)
    written = [s for rows in continuations.values() for row in rows for s in row.sentences]
    vectors = embed or tfidf([*(s.text for s in sentences), *written])
    known = _Known(sorted({*(s.text for s in sentences), *written}), vectors)
    own = known([s.text for s in sentences])
    rollouts = {i: _rollouts(rows, own, i, known, trace) for i, rows in continuations.items() if rows}
    cosines = [r.similarity for i, rows in rollouts.items() if i < n for r in rows if r.resampled]
    typical = float(np.median(cosines)) if cosines else 0.8
    limit = min(typical if threshold is None else threshold, 1 - _ROUNDING)
    how = replace(convention or Convention(), similarity_threshold=limit)
    values, null, interval, metrics = _numbers(rollouts, forced, trace, how, n, n_permutations, seed)
    effects = sentence_effects(
        own, {i: [known(row.sentences) for row in rows] for i, rows in continuations.items()}, limit
    )
    missing = np.isnan(values).any()
    return Result(
        method=METHOD,
        quantity=_QUANTITY,
        unit=UNIT,
        axes=(Axis.of("metric", metrics), Axis.of("sentence", n)),
        values=values,
        null=Band.of(
            null[0], null[1], values.shape, f"answers of neighbouring cuts mixed, 95% of {n_permutations} draws"
        ),
        interval=Band.of(interval[0], interval[1], values.shape, _INTERVAL),
        reason="one side of a comparison had no rollout that answered" if missing else "",
        arrays={"effects": effects, "n": np.array([len(continuations[i]) for i in sorted(continuations)])},
        numbers={
            "rollouts": len([row for rows in continuations.values() for row in rows]),
            "answered": len(answered),
            "tokens": sum(row.n_tokens for rows in continuations.values() for row in rows),
            "similarity_threshold": limit,
            "smoothing": how.smoothing,
            "tags": [s.tag for s in sentences],
            "texts": [s.text for s in sentences],
            "resampled": [resampled_sentences(s.text, rollouts.get(i, ())) for i, s in enumerate(sentences)],
        },
        provenance=provenance,
    )


class _Known:
    """Vectors of sentences, each embedded once however often it was written."""

    def __init__(self, texts: Sequence[str], embed: Embedder) -> None:
        self._rows = {text: i for i, text in enumerate(texts)}
        self._vectors = embed(list(texts))

    def __call__(self, texts: Sequence[str]) -> Values:
        chosen: Values = self._vectors[[self._rows[text] for text in texts]] if texts else self._vectors[:0]
        return chosen


def _rollouts(rows: Sequence[Continuation], own: Values, index: int, known: _Known, trace: Trace) -> list[Rollout]:
    gold = trace.problem.answer or trace.final_answer
    found = []
    for row in rows:
        first = row.sentences[0] if row.sentences else ""
        alike = float(own[index] @ known([first])[0]) if first and index < len(own) else 0.0
        correct = equivalent(row.answer, gold) if row.answer and gold else None
        found.append(Rollout(answer=row.answer, correct=correct, resampled=first, similarity=alike))
    return found


def _numbers(
    rollouts: Mapping[int, Sequence[Rollout]],
    forced: ForcedAnswers | None,
    trace: Trace,
    how: Convention,
    n: int,
    n_permutations: int,
    seed: int,
) -> tuple[Values, tuple[Values, Values], tuple[Values, Values], tuple[str, ...]]:
    """Values, null ends and interval ends (metric, sentence), resampled ones first, then forced ones, and the
    metrics' names."""
    sources = [("", rollouts)] + ([("forced", _forced_rollouts(forced, trace))] if forced is not None else [])
    tables, lows, highs, names = [], [], [], []
    for prefix, rows in sources:
        kept = [i for i, metric in enumerate(METRICS) if not prefix or metric.startswith("resampling")]
        ends = [_ends(null_values(rows, how, n_permutations=n_permutations, seed=seed)), importance_ends(rows, how)]
        tables.append(importance_table(rows, how)[kept, :n])
        lows.append([end[0][kept, :n] for end in ends])
        highs.append([end[1][kept, :n] for end in ends])
        names += [METRICS[i].replace("resampling", prefix) if prefix else METRICS[i] for i in kept]
    null_ends, interval_ends = (
        (np.concatenate([low[i] for low in lows]), np.concatenate([high[i] for high in highs])) for i in (0, 1)
    )
    return np.concatenate(tables), null_ends, interval_ends, tuple(names)


def _ends(drawn: Values) -> tuple[Values, Values]:
    """The ends of `null_band` of the draws (draw, metric, sentence); NaN if most draws have no number."""
    known = np.isfinite(drawn).mean(axis=0) >= 0.5
    band = null_band(np.where(known, drawn, np.nan), "")
    return band.low, band.high


def _forced_rollouts(forced: ForcedAnswers, trace: Trace) -> dict[int, list[Rollout]]:
    gold = trace.problem.answer or trace.final_answer
    return {
        i: [Rollout(answer=a, correct=equivalent(a, gold) if a and gold else None) for a in answers]
        for i, answers in enumerate(forced.answers)
    }
