"""What the analyses of tokens found: MI peaks, entropy, alternatives, steering shifts, misaligned tokens, and confidence."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.results import Result
from reasonscope.analysis.statistics import mean_number
from reasonscope.analysis.wording import (
    MOST_QUOTES,
    MOST_ROWS,
    PERMUTED,
    Summarise,
    estimate_of,
    float_of,
    groups_of,
    in_context,
    left_out,
    mean_of,
    measured,
    null_at,
    over_traces,
    short,
    side_of,
    span,
    strongest,
    times,
    trace_of,
    value_at,
)
from reasonscope.data.arrays import Values
from reasonscope.data.intervals import Estimate
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.summary import Summary, in_hundredths, plural
from reasonscope.data.text.align import token_strings
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Trace

_ENRICHED = 0.05  # the largest q-value of a word that is quoted as enriched
_COMPARED = {"mean": "mean MI", "aom": "height of the peaks (AOM)", "share_peaks": "share of tokens at peaks"}


def _mi_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """The tokens at which the states depend most on the answer, and which words they are."""
    found = [result for result in measured(results, "mi") if result.axes[0].name == "site"]
    site, groups = found[0].axis("site").labels[-1], groups_of(found, traces)
    above = _pooled([one.numbers[site]["share_above_null"] for one in found], groups)
    peaks = _pooled([one.numbers[site]["share_peaks"] for one in found], groups)
    sites = found[0].axis("site").labels if len(found) == 1 else (site,)
    chance = np.mean([_by_chance(one.numbers[site].get("share_above_by_chance")) for one in found])
    rows = [_mi_row(one, at, traces, named=len(found) > 1) for one in found[:MOST_ROWS] for at in sites]
    table = [one for one in measured(results, "mi") if one.axes[0].name == "word"]
    words = [row for one in table for row in one.numbers["words"].values()]
    return Summary(
        finding=f"MI peaks are {in_hundredths(peaks)} of the tokens{_most_at(words)}; at {in_hundredths(above)} of the tokens the state "
        f"depends more on the trace's own answer than on {_others(found[0])} ({in_hundredths(float(chance))} by chance"
        f"{'' if len(found) == 1 else f'; mean of {len(found)} traces'}).",
        columns=(
            "trace" if len(found) > 1 else "site",
            "tokens",
            "mean MI",
            "at peaks",
            f"above {_others(found[0])}",
            "peak height (AOM)",
        ),
        rows=rows,
        quotes=[*_enriched(words), *(_peak_quotes(found[0], traces) if len(found) == 1 else [])],
        notes=[
            f"At {site}, compared with {_null(found[0])}. AOM: how far peaks are above the median, in interquartile ranges.",
            *([] if not words or _enriched(words) else ["No word is at peaks more often than chance (all q > 0.05)."]),
            *left_out(MOST_ROWS, len(found), "traces"),
        ],
    )


def _mi_row(result: Result, site: str, traces: Sequence[Trace], *, named: bool) -> list[str]:
    told = {name: estimate_of(number) for name, number in result.numbers[site].items()}
    return [
        trace_of(result, traces).id if named else site,
        str(len(result.axis("token"))),
        short(told["mean"]),
        in_hundredths(told["share_peaks"]),
        in_hundredths(told["share_above_null"]),
        short(told["aom"]),
    ]


def _by_chance(number: Mapping[str, Any] | None) -> float:
    """What chance gives; NaN for a result of a version that did not say."""
    return float("nan") if number is None else float(number["value"])


def _most_at(words: Sequence[dict[str, Any]]) -> str:
    best = [row for row in words if row["q_value"] <= _ENRICHED][:2]
    if not best:
        return ""
    named = " and ".join(_word_quoted(row["word"]) for row in best)
    times = " and ".join(f"{row['enrichment']:.1f}" for row in best)
    return f", most often at {named} ({times} times as often as chance)"


def _enriched(words: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (
            _word_quoted(row["word"]),
            f"{row['at_peaks']} of {row['count']} at peaks, {row['enrichment']:.1f} × chance, q = {short(row['q_value'])}",
        )
        for row in [row for row in words if row["q_value"] <= _ENRICHED][:MOST_QUOTES]
    ]


def _peak_quotes(result: Result, traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The highest peaks of a trace in their context."""
    trace, line = trace_of(result, traces), result.values[-1]
    places = [int(label) for label in result.axis("token").labels]
    peaks = np.asarray(result.arrays["peaks"], dtype=bool)[-1]
    chosen = strongest([(line[i], i) for i in np.flatnonzero(peaks)], 3)
    return [
        (
            in_context(trace, places[i]),
            f"MI {short(float(line[i]))} ({_others(result)} {span(*null_at(result, (-1, i)))})",
        )
        for i in chosen
    ]


def _mi_compare_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Whether the reasoner's states depend more on the answer than its base model's."""
    found = next(iter(measured(results, "mi_compare")))
    labels, n = found.axes[0].labels, found.numbers["traces"]
    first = next(i for i, value in enumerate(found.values) if np.isfinite(value))
    change = value_at(found, (first,))
    direction = "higher" if change.value > 0 else "lower"
    low, high = null_at(found, (first,))
    return Summary(
        finding=f"The reasoner's {_COMPARED[labels[first]]} is {short(_size(change))} {direction} than its base model's on the "
        f"same {plural(n[labels[first]], 'trace')}, {side_of(change.value, low, high)} the range of exchanged models ({span(low, high)}).",
        columns=("number", "reasoner less base", "models exchanged", "traces"),
        rows=[
            [_COMPARED[label], short(value_at(found, (i,))), span(*null_at(found, (i,))), str(n[label])]
            for i, label in enumerate(labels)
        ],
        notes=[found.reason + "."] if found.reason else [],
    )


def _size(change: Estimate) -> Estimate:
    """The change without its sign, for a sentence that says which way it goes."""
    if change.value >= 0:
        return change
    return Estimate(value=-change.value, low=-change.high, high=-change.low)


def _entropy_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Where the model was unsure."""
    found = measured(results, "entropy")
    groups = groups_of(found, traces)
    thinking = _pooled([one.numbers["thinking"] for one in found], groups, shares=False, least=0)
    answer = over_traces([float_of(one.numbers["answer"]) for one in found], groups, shares=False, least=0)
    words = _forking_words(found, traces)
    at = f"; it forks most at {' and '.join(word for word, _ in words[:2])}" if words else ""
    return Summary(
        finding=f"The thinking is written at a mean entropy of {short(thinking)} nats per token and the answer at "
        f"{short(answer)}{mean_of(len(found))}{at}.",
        columns=("trace", "thinking, nats", "answer, nats", "forks above, nats", "above 0.672 nats"),
        rows=[
            [
                trace_of(one, traces).id,
                short(estimate_of(one.numbers["thinking"])),
                short(float_of(one.numbers["answer"])),
                short(one.numbers["threshold"]),
                in_hundredths(float(np.mean(one.arrays["forking_fixed"]))),
            ]
            for one in found[:MOST_ROWS]
        ],
        quotes=[*words, *(_forks(found[0], traces) if len(found) == 1 else [])],
        notes=[
            "A token forks if its entropy is in the top fifth of its trace. Entropies are at the temperature of generation.",
            *left_out(MOST_ROWS, len(found), "traces"),
        ],
    )


def _forking_words(found: Sequence[Result], traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The words of the highest mean entropy among forking tokens, over all traces."""
    entropies: dict[str, list[float]] = {}
    for one in found:
        trace = trace_of(one, traces)
        pieces = token_strings(trace.text, trace.offsets)
        for i in np.flatnonzero(one.arrays["forking"]):
            word = pieces[int(one.axes[0].labels[i])].strip()
            if word:
                entropies.setdefault(word, []).append(float(one.values[i]))
    least = 1 if len(found) == 1 else min(3, max(map(len, entropies.values()), default=0))
    kept = {word: float(np.mean(values)) for word, values in entropies.items() if len(values) >= least}
    best = sorted(kept, key=lambda word: -kept[word])[:MOST_QUOTES]
    return [(_word_quoted(word), f"{short(kept[word])} nats at forks, {times(len(entropies[word]))}") for word in best]


def _forks(result: Result, traces: Sequence[Trace]) -> list[tuple[str, str]]:
    trace = trace_of(result, traces)
    chosen = strongest([(value, i) for i, value in enumerate(result.values)], 3)
    return [
        (in_context(trace, int(result.axes[0].labels[i])), f"{short(float(result.values[i]))} nats") for i in chosen
    ]


def _misalignment_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """How much of the thinking the base model would have written otherwise."""
    found = measured(results, "misalignment")
    groups = groups_of(found, traces)
    base = _pooled([_misses(one, traces) for one in found], groups)
    own = over_traces([one.numbers["rate_of_reasoner"] for one in found], groups)
    words = [pair for one in found for pair in _words_and_misses(one, traces)]
    missed, total = Counter(word for word, miss in words if miss), Counter(word for word, _ in words)
    return Summary(
        finding=f"The base model would have written another token at {in_hundredths(base)} of the thinking's places"
        f"{mean_of(len(found))}; the reasoner itself would at {in_hundredths(own)}.",
        columns=("trace", "base model", "reasoner", "base, first tenth", "reasoner's range", "base, last tenth"),
        rows=[
            [
                trace_of(one, traces).id,
                in_hundredths(estimate_of(_misses(one, traces))),
                in_hundredths(one.numbers["rate_of_reasoner"]),
                in_hundredths(value_at(one, (0,))),
                span(*null_at(one, (0,)), share=True),
                in_hundredths(value_at(one, (-1,))),
            ]
            for one in found[:MOST_ROWS]
        ],
        quotes=[
            (_word_quoted(word), f"missed {n} of {total[word]} times") for word, n in missed.most_common(MOST_QUOTES)
        ],
        notes=[
            "Null: the reasoner on its own text, whose first choice is not always what was sampled.",
            *left_out(MOST_ROWS, len(found), "traces"),
        ],
    )


def _misses(result: Result, traces: Sequence[Trace]) -> dict[str, Any]:
    """The share of misses with its interval over the trace's sentences."""
    trace, misses = trace_of(result, traces), np.asarray(result.arrays["misses"])
    places = trace.written_thinking
    units = sentence_of_each(trace_sentences(trace), int(places[-1]) + 1)[places]
    return mean_number(misses, units)


def _words_and_misses(result: Result, traces: Sequence[Trace]) -> list[tuple[str, bool]]:
    """Each word of the thinking, and whether the base model would have written another."""
    trace, misses = trace_of(result, traces), np.asarray(result.arrays["misses"])
    every = token_strings(trace.text, trace.offsets)
    pieces = [every[place] for place in trace.written_thinking]
    return [(piece.strip(), bool(miss)) for piece, miss in zip(pieces, misses, strict=False) if piece.strip()]


def _alternatives_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """How likely the tokens that were written are, and what else could have been."""
    found = measured(results, "alternatives")
    groups = groups_of(found, traces)
    first = _pooled([one.numbers["first_choice"] for one in found], groups)
    unlikely = over_traces([_unlikely(one) for one in found], groups)
    return Summary(
        finding=f"The token that was written is the model's first choice at {in_hundredths(first)} of places"
        f"{mean_of(len(found))}; {in_hundredths(unlikely)} are among the least likely 2.5 % of what it would draw.",
        columns=("trace", "tokens", "first choice", "among its least likely", "mean log-probability, nats"),
        rows=[
            [
                trace_of(one, traces).id,
                str(len(one.values)),
                in_hundredths(estimate_of(one.numbers["first_choice"])),
                in_hundredths(_unlikely(one)),
                short(float(one.values.mean())),
            ]
            for one in found[:MOST_ROWS]
        ],
        quotes=_surprises(found, traces),
        notes=["At temperature 1, whatever the trace was sampled at.", *left_out(MOST_ROWS, len(found), "traces")],
    )


def _unlikely(result: Result) -> float:
    assert result.null is not None
    return float((result.values < result.null.low).mean())


def _surprises(found: Sequence[Result], traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The least likely tokens, and what the model would have written instead."""
    places = [(-value, (one, i)) for one in found for i, value in enumerate(one.values.tolist())]
    quotes = []
    for one, i in strongest(places, MOST_QUOTES):
        best = one.numbers["pieces"][str(int(one.arrays["ids"][i, 0]))]
        likely = float(np.exp(one.arrays["logprobs"][i, 0]))
        text = in_context(trace_of(one, traces), int(one.axes[0].labels[i]))
        said = f"p = {short(float(np.exp(one.values[i])))}; {_word_quoted(best)} has {short(likely)}"
        quotes.append((text, said))
    return quotes


def _word_quoted(text: str) -> str:
    """A token in quotation marks; white space is shown as such."""
    return f"“{text.strip() or text.encode('unicode_escape').decode()}”"


def _steering_shift_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """How steering changes the probability of what was written."""
    found = measured(results, "steering_shift")
    groups = groups_of(found, traces)
    change = _pooled([one.numbers["mean"] for one in found], groups, shares=False)
    outside = _pooled([one.numbers["share_outside_null"] for one in found], groups)
    random = _ends(np.mean([one.arrays["random"] for one in found], axis=0))
    about, draws = {**found[0].provenance, **found[0].numbers}, len(found[0].arrays["random"])
    return Summary(
        finding=f"{about['vector']} × {about['multiplier']:g} changes the log-probability of the written tokens by {short(change)} "
        f"nats each{mean_of(len(found))}; {draws} random vectors of the same norm by {span(*random)}.",
        columns=("trace", "change, nats", "random vectors", "tokens outside their range", "edited tokens"),
        rows=[
            [
                trace_of(one, traces).id,
                short(estimate_of(one.numbers["mean"])),
                span(*_ends(one.arrays["random"])),
                in_hundredths(estimate_of(one.numbers["share_outside_null"])),
                str(one.numbers["touched"]),
            ]
            for one in found[:MOST_ROWS]
        ],
        quotes=_shifted(found, traces),
        notes=[
            f"{in_hundredths(outside)} of the tokens are outside the range of {draws} random vectors "
            f"({in_hundredths(float_of(about.get('share_outside_by_chance')))} by chance).",
            *_learned_from(found),
            *left_out(MOST_ROWS, len(found), "traces"),
        ],
    )


def _pooled(
    numbers: Sequence[Mapping[str, Any]], groups: Sequence[str], *, shares: bool = True, least: float = -np.inf
) -> Estimate:
    """A number of each trace over all of them; that of a single trace keeps its own interval."""
    if len(numbers) == 1:
        return estimate_of(numbers[0])
    return over_traces([float_of(number["value"]) for number in numbers], groups, shares=shares, least=least)


def _ends(draws: Values) -> tuple[float, float]:
    """The lowest and the highest of a few draws."""
    return float(draws.min()), float(draws.max())


def _learned_from(found: Sequence[Result]) -> list[str]:
    """A vector may look better on what it was made from; random vectors were made from nothing."""
    known = [one.numbers.get("learned_from_the_problem") for one in found]
    if any(known):
        return [
            f"The vector was made from the problems of {sum(map(bool, known))} of these traces, among others: look at other traces too."
        ]
    return (
        ["The vector does not say which problems it was made from: these may be among them."] if None in known else []
    )


def _shifted(found: Sequence[Result], traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The tokens that steering makes most and least likely."""
    places = [(value, (one, i)) for one in found for i, value in enumerate(one.values.tolist())]
    ends = [*strongest(places, 2), *strongest([(-value, at) for value, at in places], 3)]
    return [
        (
            in_context(trace_of(one, traces), int(one.axes[0].labels[i])),
            f"{short(float(one.values[i]))} nats (random {span(*null_at(one, (i,)))})",
        )
        for one, i in ends
    ]


def _others(result: Result) -> str:
    """What an answer is compared with by its null, in two words."""
    return PERMUTED if _null(result).startswith(PERMUTED) else "other answers"


def _null(result: Result) -> str:
    return result.null.what if result.null is not None else result.null_missing


def _confidence_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """When the model knew its answer."""
    found = measured(results, "confidence")
    groups, cuts = groups_of(found, traces), found[0].axis("cut").labels
    shares = [_at_cut(found, groups, k) for k in range(len(cuts))]
    foreign = [float(np.mean([_foreign(one, k) for one in found])) for k in range(len(cuts))]
    kinds = [one.numbers["kind"] for one in found]
    return Summary(
        finding=f"Before any thinking a share of {in_hundredths(shares[0])} of the forced answers is the final one, after all of it "
        f"{in_hundredths(shares[-1])}{mean_of(len(found))}; {_chance(foreign)}.",
        columns=("thinking read", "forced answers that are final", "another problem's answer"),
        rows=[
            [cut, in_hundredths(share), in_hundredths(null)]
            for cut, share, null in zip(cuts, shares, foreign, strict=True)
        ],
        quotes=_answers(found[0]) if len(found) == 1 else [],
        notes=[
            f"Confidence rises with the thinking (progressive) in {kinds.count('progressive')} of {len(kinds)} traces, does not "
            f"(premature) in {kinds.count('premature')}, and is constant in {kinds.count(None)}."
        ],
    )


def _at_cut(found: Sequence[Result], groups: Sequence[str], k: int) -> Estimate:
    return value_at(found[0], (k,)) if len(found) == 1 else over_traces([one.values[k] for one in found], groups)


def _foreign(result: Result, k: int) -> float:
    return null_at(result, (k,))[1]


def _chance(foreign: Sequence[float]) -> str:
    if not np.isfinite(foreign).any():
        return "no other problem has an answer to compare with"
    return f"the answer of another problem comes up at {in_hundredths(float(np.nanmean(foreign)))}"


def _answers(result: Result) -> list[tuple[str, str]]:
    """What was answered at the first, a middle and the last cut."""
    cuts, answers = result.axis("cut").labels, result.numbers["answers"]
    return [
        (", ".join("none" if answer is None else str(answer) for answer in answers[k]), f"answers after {cuts[k]}")
        for k in (0, len(cuts) // 2, len(cuts) - 1)
    ]


SUMMARIES: Mapping[str, Summarise] = {
    "mi": _mi_summary,
    "mi_compare": _mi_compare_summary,
    "misalignment": _misalignment_summary,
    "entropy": _entropy_summary,
    "confidence": _confidence_summary,
    "alternatives": _alternatives_summary,
    "steering_shift": _steering_shift_summary,
}
