"""What the analyses of whole traces found: trajectories, reflection, rules that choose among samples, and signals side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.results import Result
from reasonscope.analysis.wording import (
    FEW_QUOTES,
    MOST_ROWS,
    Summarise,
    estimate_of,
    groups_of,
    labelled_sentence,
    left_out,
    mean_of,
    measured,
    null_at,
    over_traces,
    quoted,
    short,
    span,
    strongest,
    times,
    trace_of,
    value_at,
)
from reasonscope.data.intervals import Estimate
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.summary import Summary, in_hundredths, in_words, plural
from reasonscope.data.trace import Trace

_SIGNIFICANT = 0.05


def _reflection_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """What the thinking does after its first answer."""
    found = measured(results, "reflection")
    groups = groups_of(found, traces)
    after = over_traces([one.numbers["reflection"] for one in found], groups)
    counts = np.sum([one.values for one in found], axis=0).astype(int)
    verbs = zip(("confirms", "corrects", "breaks", "changes"), counts, strict=True)
    changes = ", ".join(f"{verb} it {times(n)}" for verb, n in verbs if n)
    return Summary(
        finding=f"After its first answer the thinking goes on for {in_hundredths(after)} of its length{mean_of(len(found))}"
        f"{_then(changes)}.",
        columns=("trace", "first at", "goes on for", "right: first, last", "confirms", "corrects", "breaks", "changes"),
        rows=[_reflection_row(one, traces) for one in found[:MOST_ROWS]],
        quotes=[_first_answer(one, traces) for one in found[:FEW_QUOTES]],
        notes=[
            f"First answer right: {_right(found, 'first_correct')}; last answer right: {_right(found, 'last_correct')}.",
            "In brackets: the same answers in random order. “First at” is a sentence.",
            *_unused(found, groups),
            *left_out(MOST_ROWS, len(found), "traces"),
        ],
    )


def _then(changes: str) -> str:
    return f"; it {changes}" if changes else ", and states no other answer"


def _right(found: Sequence[Result], name: str) -> str:
    judged = [one.numbers[name] for one in found if one.numbers[name] is not None]
    return f"{sum(judged)} of {len(judged)}" if judged else "not known"


def _unused(found: Sequence[Result], groups: Sequence[str]) -> list[str]:
    shares = [one.numbers.get("failed_step_fraction") for one in found]
    known = [(share, group) for share, group in zip(shares, groups, strict=True) if share is not None]
    if not known:
        return []
    mean = over_traces([share for share, _ in known], [group for _, group in known])
    return [
        f"The last sentence does not depend on a share of {in_hundredths(mean)} of the sentences, not even through others."
    ]


def _reflection_row(result: Result, traces: Sequence[Trace]) -> list[str]:
    told = result.numbers
    kinds = [f"{int(value)} ({span(*null_at(result, (i,)))})" for i, value in enumerate(result.values)]
    right = ", ".join({True: "yes", False: "no", None: "–"}[told[name]] for name in ("first_correct", "last_correct"))
    return [str(result.provenance["trace"]), str(told["first"]), in_hundredths(told["reflection"]), right, *kinds]


def _first_answer(result: Result, traces: Sequence[Trace]) -> tuple[str, str]:
    sentences = trace_sentences(trace_of(result, traces))
    return quoted(sentences[result.numbers["first"]].text), f"first answer of {result.provenance['trace']}"


def _agreement_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Which sentences matter by every signal."""
    found = measured(results, "agreement")
    ranks = [(value, (one, i)) for one in found for i, value in enumerate(one.arrays["mean_rank"].tolist())]
    best = list(strongest(ranks, MOST_ROWS))
    one, i = best[0]
    above = sum(len(each.numbers["top"]) for each in found)
    signals, chance = len(one.axis("signal")), span(*null_at(one, (0, 0)), share=True)
    return Summary(
        finding=f"{labelled_sentence(one, i, traces).capitalize()} matters most by {signals} signals: its mean rank is {_rank(one, i)} "
        f"(by chance {chance}); {above} of {len(ranks)} sentences are above that range."
        if above
        else f"No sentence matters more than chance by all signals: the highest mean rank over {signals} signals is {_rank(one, i)}, of "
        f"{labelled_sentence(one, i, traces)} (by chance {chance}).",
        columns=("signals", "rank correlation", "beyond their place", "p (Holm)"),
        rows=[row for each in found[:1] for row in _agreement_rows(each)],
        quotes=[
            (quoted(each.numbers["texts"][k]), f"{labelled_sentence(each, k, traces)}, mean rank {_rank(each, k)}")
            for each, k in best[:5]
        ],
        notes=_agreement_notes(found),
    )


def _rank(result: Result, i: int) -> str:
    return in_hundredths(float(result.arrays["mean_rank"][i]))


def _agreement_rows(result: Result) -> list[list[str]]:
    pairs = [
        (-1.0 if pair["holm"] is None else -pair["holm"], (name, pair))
        for name, pair in result.numbers["agreement"].items()
    ]
    return [
        [name, in_hundredths(pair["spearman"]), short(pair["beyond_place"]), short(pair["holm"])]
        for name, pair in strongest(pairs, MOST_ROWS)
    ]


def _agreement_notes(found: Sequence[Result]) -> list[str]:
    pairs = [pair for one in found for pair in one.numbers["agreement"].values()]
    agree = sum(pair["holm"] is not None and pair["holm"] <= 0.05 for pair in pairs)
    notes = [f"{agree} of {len(pairs)} pairs of signals agree beyond their place in the trace (Holm's p up to 0.05)."]
    notes += [f"Left out: {method}, {why}." for method, why in _left_out(found).items()]
    if len(found) > 1:
        notes.append(f"The table is of {found[0].provenance['trace']}, the first of {plural(len(found), 'trace')}.")
    return notes


def _left_out(found: Sequence[Result]) -> dict[str, str]:
    """The signals that were saved but could not be compared, and why."""
    return {method: why for one in found for method, why in one.numbers.get("left_out", {}).items()}


_ALIGNED = "aligned"


def _trajectory_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """How far and how straight the hidden state moves."""
    found = measured(results, "trajectory")
    groups = groups_of(found, traces)
    aligned = over_traces([one.numbers["mean_aligned"]["value"] for one in found], groups, shares=False)
    walk = over_traces([one.numbers["aligned_of_random_walk"] for one in found], groups, shares=False)
    straighter = sum(_straighter(one) for one in found)
    sites = found[0].axis("site").labels
    return Summary(
        finding=f"The hidden state moves {'straighter' if aligned.value > walk.value else 'less straight'} than a random walk: its "
        f"steps align with the whole way at {in_hundredths(aligned)}{mean_of(len(found))}; those of a walk of the same step lengths at "
        f"{in_hundredths(walk.value)}.",
        columns=("trace", "segments", "net change per step", "length of the way", "aligned", "aligned, random walk"),
        rows=[
            [
                str(one.provenance["trace"]),
                str(one.numbers["segments"]),
                short(estimate_of(one.numbers["mean_net"])),
                short(estimate_of(one.numbers["mean_cumulative"])),
                in_hundredths(one.numbers["mean_aligned"]["value"]),
                span(*_walk(one), share=True),
            ]
            for one in found[:MOST_ROWS]
        ],
        notes=[
            f"{straighter} of {len(found)} traces are straighter than the range of random walks.",
            f"Segments of {found[0].provenance['block']} tokens; the mean of {len(sites)} sites."
            if len(sites) > 1
            else f"Segments of {found[0].provenance['block']} tokens, at {sites[0]}.",
            *left_out(MOST_ROWS, len(found), "traces"),
        ],
    )


def _walk(result: Result) -> tuple[float, float]:
    """The range of a random walk's alignment, the mean over sites."""
    assert result.null is not None
    k = result.axis("signal").labels.index(_ALIGNED)
    return float(result.null.low[k].mean()), float(result.null.high[k].mean())


def _straighter(result: Result) -> bool:
    return bool(result.numbers["mean_aligned"]["value"] > _walk(result)[1])


def _selection_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Which rule to choose samples by."""
    (found,) = measured(results, "selection")
    rules, gain = found.axis("rule").labels, found.numbers.get("best") or _most_accurate(found)
    best = rules.index(gain["rule"])
    single, chosen = value_at(found, (0, 0)), value_at(found, (best, 0))
    cost, p = found.values[best, 1] / found.values[0, 1], in_words(gain["p_value"], 2)
    return Summary(
        finding=f"The best rule for {found.numbers['k']} samples is {rules[best]}: {in_hundredths(chosen)} of problems are right, at "
        f"{cost:.1f} times the tokens of a single sample, which is right for {in_hundredths(single)} (p = {p})."
        if gain["gain"] > 0 and gain["p_value"] <= _SIGNIFICANT
        else f"No rule for {found.numbers['k']} samples is clearly better than a single sample, which is right for {in_hundredths(single)} "
        f"of problems; {rules[best]} comes to {in_hundredths(chosen)} at {cost:.1f} times its tokens (p = {p}).",
        columns=("rule", "accuracy", "tokens", "tokens / single"),
        rows=[
            [
                rule,
                in_hundredths(value_at(found, (i, 0))),
                short(_tokens(found, i)),
                f"{found.values[i, 1] / found.values[0, 1]:.2f}",
            ]
            for i, rule in enumerate(rules)
        ],
        notes=[
            f"A share of {in_hundredths(found.numbers['any_right'])} of the problems has a right sample: no rule can do better.",
            "Null: a single sample, drawn at random. p: the best rule is chosen again if rules and single sample are exchanged problem by "
            "problem.",
        ],
    )


def _most_accurate(found: Result) -> dict[str, Any]:
    """For results of before the best rule had a p-value."""
    right = found.values[:, 0]
    best = 1 + int(right[1:].argmax())
    return {"rule": found.axis("rule").labels[best], "gain": float(right[best] - right[0]), "p_value": float("nan")}


def _tokens(found: Result, rule: int) -> Estimate:
    """The tokens of a rule; the interval of a few skewed lengths can reach below 0, which none can be."""
    tokens = value_at(found, (rule, 1))
    return Estimate(value=tokens.value, low=max(tokens.low, 0.0), high=tokens.high)


SUMMARIES: Mapping[str, Summarise] = {
    "selection": _selection_summary,
    "trajectory": _trajectory_summary,
    "reflection": _reflection_summary,
    "agreement": _agreement_summary,
}
