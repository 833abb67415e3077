"""What thinking does after its first answer: confirming, correcting, breaking (First Try Matters, arXiv 2510.08308),
and failed steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from reasonscope.analysis.results import Axis, Result, undefined
from reasonscope.analysis.statistics import null_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import permutation_p
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.answers import equivalent, stated_answer
from reasonscope.data.trace import Sentence, Trace

METHOD = "reflection"
KINDS = ("confirming", "correcting", "breaking", "changing")
_REVIEW_TAGS = ("self_checking", "uncertainty_management")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A sentence that states an answer to the whole problem: its index, the answer, and whether it is right (None:
    no gold answer)."""

    sentence: int
    answer: str
    correct: bool | None


Detector = Callable[[Sentence], str | None]


def _stated_answer(sentence: Sentence) -> str | None:
    """The answer that a sentence states explicitly ("the answer is", a box), else None.

    Departure: the paper asks a large model for every line with a candidate. This rule costs nothing and misses
    candidates that are not named as such; pass another `Detector` if you have a better one.
    """
    return stated_answer(sentence.text)


def find_candidates(
    sentences: Sequence[Sentence], gold: str | None, detect: Detector = _stated_answer
) -> list[Candidate]:
    """Every statement of an answer, in the order of the sentences."""
    found = [(sentence.index, detect(sentence)) for sentence in sentences]
    return [
        Candidate(sentence=index, answer=answer, correct=None if gold is None else equivalent(answer, gold))
        for index, answer in found
        if answer
    ]


def transitions(candidates: Sequence[Candidate]) -> list[str]:
    """What each candidate does to the one before it.

    Confirming (the same answer), correcting (wrong to right), breaking (right to wrong), or changing (one wrong answer
    for another, or no gold answer to judge by).
    """
    return _between(_said(candidates))


def _said(candidates: Sequence[Candidate]) -> list[tuple[int, bool | None]]:
    """Which answer each candidate gives, as the number of the first one that gives it, and whether it is right;
    comparing is slow."""
    firsts: list[int] = []
    for i, candidate in enumerate(candidates):
        same = (k for k in sorted(set(firsts)) if equivalent(candidate.answer, candidates[k].answer))
        firsts.append(next(same, i))
    return [(first, candidate.correct) for first, candidate in zip(firsts, candidates, strict=True)]


def _between(said: Sequence[tuple[int, bool | None]]) -> list[str]:
    found = []
    for (before, was_right), (after, is_right) in pairwise(said):
        if after == before:
            found.append("confirming")
        elif is_right and was_right is False:
            found.append("correcting")
        elif was_right and is_right is False:
            found.append("breaking")
        else:
            found.append("changing")
    return found


def reflection_of_trace(
    trace: Trace,
    sentences: Sequence[Sentence],
    *,
    detect: Detector = _stated_answer,
    n_permutations: int = 200,
    seed: int = 0,
) -> Result:
    """How often the thinking confirms, corrects, breaks or changes its answer (First Try Matters, arXiv 2510.08308).

    Args:
        trace: The trace.
        sentences: Its sentences.
        detect: Finds the answer that a sentence states, or None.
        n_permutations: Random orders for the null.
        seed: Random seed.

    Returns:
        Axis (kind,): counts. The null puts the trace's own candidates into random order. `numbers`: `first` (the
        sentence of the first candidate), `reflection` (the share of the thinking after it, in tokens, or in characters
        for a trace without tokens), whether the first and the last are right, and `review`, the share of characters in
        sentences that check or doubt. Undefined, with the reason, if no sentence states an answer.

    Departures: the paper asks a large model for every line with a candidate; see `_stated_answer`.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        result = rs.analysis.reflection_of_trace(trace, rs.sentences(trace))
        dict(zip(result.axis("kind").labels, result.values))
    """
    provenance = {"trace": trace.id, "seed": seed, **cut_provenance(sentences)}
    candidates = find_candidates(sentences, trace.problem.answer, detect)
    if not candidates:
        reason = "no sentence of the thinking states an answer" if sentences else f"no thinking ({trace.state})"
        return undefined(
            method=METHOD, quantity="transitions between answers", unit="count", reason=reason, provenance=provenance
        )
    rng = np.random.default_rng(seed)
    said = _said(candidates)
    shuffled = [_counts([said[j] for j in rng.permutation(len(said))]) for _ in range(n_permutations)]
    first = sentences[candidates[0].sentence]
    return Result(
        method=METHOD,
        quantity="transitions between answers",
        unit="count",
        axes=(Axis.of("kind", KINDS),),
        values=np.array(_counts(said), dtype=np.float64),
        null=null_band(shuffled, "the same answers in random order"),
        arrays={"candidates": np.array([candidate.sentence for candidate in candidates])},
        numbers={
            "first": candidates[0].sentence,
            "first_correct": candidates[0].correct,
            "last_correct": candidates[-1].correct,
            "reflection": _share_behind(trace, first),
            "review": review_ratio(sentences),
            "answers": [candidate.answer for candidate in candidates],
        },
        provenance=provenance,
    )


def _counts(said: Sequence[tuple[int, bool | None]]) -> list[int]:
    found = _between(said)
    return [found.count(kind) for kind in KINDS]


def _share_behind(trace: Trace, first: Sentence) -> float:
    if trace.n_thinking_tokens:
        return float((trace.thinking_positions >= first.tokens.stop).mean())
    spans = trace.thinking_spans
    after = sum(max(0, span.stop - max(span.start, first.chars.stop)) for span in spans)
    return after / max(sum(map(len, spans)), 1)


def review_ratio(sentences: Sequence[Sentence], tags: Sequence[str] = _REVIEW_TAGS) -> float:
    """Share of the characters that are in reviewing sentences (What Characterizes Effective Reasoning?, arXiv
    2509.19284).

    Departure: the labels are the tags of the sentences, whoever set them; the paper asks a large model. NaN without
    sentences.
    """
    lengths = np.array([len(sentence.text) for sentence in sentences], dtype=np.float64)
    reviewing = np.array([sentence.tag in tags for sentence in sentences], dtype=bool)
    return float(lengths[reviewing].sum() / lengths.sum()) if lengths.sum() else float("nan")


def failed_step_fraction(failed: Sequence[bool]) -> float:
    """Failed steps among all of a labelled graph of steps (FSF, arXiv 2509.19284). Raises InputError for a graph
    without steps."""
    if not len(failed):
        raise InputError("a graph without steps has no share of failed steps")
    return float(np.mean(failed))


def unused_steps(depends_on: Sequence[Sequence[int]], final: int = -1) -> NDArray[np.bool_]:
    """The steps on which the final one does not depend, directly or through others (step,): a proxy for abandoned ones
    without labels.

    `depends_on[i]` are earlier steps. Raises InputError if one is not earlier.
    """
    n = len(depends_on)
    used = np.zeros(n, dtype=bool)
    used[final] = True
    for step in range(n - 1, -1, -1):
        for source in depends_on[step]:
            if not 0 <= source < step:
                raise InputError(f"step {step} depends on {source}; a step can only depend on earlier ones")
            used[source] |= used[step]
    return ~used


@dataclass(frozen=True, kw_only=True)
class _WithinCorrelation:
    """Rank correlation within problems: `value`, its `p_value` (two-sided) and the `null` (draw,) from shuffling
    within problems."""

    value: float
    p_value: float
    null: Values
    n: int


def within_question_correlation(
    x: Sequence[float], y: Sequence[float], problems: Sequence[str], *, n_resamples: int = 1000, seed: int = 0
) -> _WithinCorrelation:
    """Correlation of a measure with another (such as correctness) among traces of the SAME problem: ranks, minus each
    problem's mean.

    Across problems, harder ones have longer thinking, more failures and fewer right answers, whatever the cause. Raises
    InputError if no problem has two traces that differ in both measures.
    """
    labels = np.unique(np.asarray(problems), return_inverse=True)[1]
    groups = [np.flatnonzero(labels == group) for group in range(labels.max() + 1)]
    sides = [np.zeros(len(labels)), np.zeros(len(labels))]
    for side, values in zip(sides, (np.asarray(x, float), np.asarray(y, float)), strict=True):
        for rows in groups:
            ranks = rankdata(values[rows])
            side[rows] = ranks - ranks.mean()
    norm = float(np.linalg.norm(sides[0]) * np.linalg.norm(sides[1]))
    if not norm:
        raise InputError("no problem has traces that differ in both measures; record more samples of each problem")
    rng = np.random.default_rng(seed)
    null = np.empty(n_resamples)
    for i in range(n_resamples):
        mixed = sides[1].copy()
        for rows in groups:
            mixed[rows] = rng.permutation(mixed[rows])
        null[i] = sides[0] @ mixed / norm
    value = float(sides[0] @ sides[1] / norm)
    p_value = float(permutation_p(value, null, "two-sided"))
    return _WithinCorrelation(value=value, p_value=p_value, null=null, n=len(labels))
