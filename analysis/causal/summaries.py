"""What interventions found: suppression, heads that write the refusal probe, and emergent heads."""

from collections.abc import Mapping, Sequence

import numpy as np

from reasonscope.analysis.results import Result
from reasonscope.analysis.statistics import chance_above
from reasonscope.analysis.wording import (
    BY_CHANCE,
    FEW_QUOTES,
    MOST_ROWS,
    Summarise,
    float_of,
    head_named,
    labelled_sentence,
    left_out,
    measured,
    null_at,
    quoted,
    sentence_pairs,
    short,
    side_of,
    span,
    strongest,
    trace_of,
    value_at,
)
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.summary import Summary, in_hundredths, plural
from reasonscope.data.trace import Trace

_EXCHANGES = 200  # of base and reasoner, that the range is drawn from


_EXTREMES = 5  # heads of each sign in a table


_COMPLETE = (0.8, 1.2)  # of an attribution with enough steps


_OUTCOMES = {"harmful refused": "harmful requests refused", "benign refused": "benign requests refused"}


def _cliff_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Which heads write the refusal probe, and what the model does without those that lower it."""
    (writes,) = measured(results, "probe_write")
    ablated = measured(results, "cliff")
    n, unit = len(writes.provenance["traces"]), writes.unit
    down = [(-value, at) for at, value in np.ndenumerate(writes.values)]
    order = [*strongest(down, _EXTREMES), *reversed(list(strongest([(-value, at) for value, at in down], _EXTREMES)))]
    lowest = order[0]
    written = (
        f"Head {head_named(lowest)} lowers the refusal probe most at the end of the thinking ({short(value_at(writes, lowest))} {unit}, "
        f"{plural(n, 'trace')}), {side_of(float(writes.values[lowest]), *null_at(writes, lowest))} the range of random directions "
        f"({span(*null_at(writes, lowest))})"
    )
    heads = [
        [
            head_named(at),
            short(value_at(writes, at)),
            span(*null_at(writes, at)),
            short(float(writes.arrays["total"][at])),
        ]
        for at in order
    ]
    correlation = writes.numbers["rank_correlation_direct_total"]
    notes = [
        f"Direct and total effects of all heads correlate at {in_hundredths(float_of(correlation))} (rank correlation)."
    ]
    if not ablated:
        columns = ("head", f"direct effect, {unit}", "random directions", f"total effect, {unit}")
        return Summary(finding=f"{written}.", columns=columns, rows=heads, notes=notes)
    return _ablated_summary(ablated[0], heads, written, notes, unit)


def _sets(n: int) -> str:
    """`3 sets (left by chance in 2 of 4 cases)`: how little the range of so few says."""
    left = round(2 * chance_above(n) * (n + 1))
    return f"{n} set{'s' * (n > 1)} (left by chance in {left} of {n + 1} cases)"


def _ablated_summary(
    found: Result, heads: Sequence[Sequence[str]], written: str, notes: Sequence[str], unit: str
) -> Summary:
    names, told = found.axis("metric").labels, found.numbers
    chosen = ", ".join(told["heads"])
    before, after, chance = value_at(found, (0, 0)), value_at(found, (1, 0)), null_at(found, (1, 0))
    return Summary(
        finding=f"Without the heads that lower refusal most ({chosen}) the model refuses {in_hundredths(after)} of harmful requests "
        f"instead of {in_hundredths(before)}, {side_of(after.value, *chance)} the range of {_sets(told['n_controls'])} of as many other "
        f"heads ({span(*chance, share=True)}).",
        columns=("outcome", "all heads", "without them", "without other heads", "beyond every random set"),
        rows=[
            [
                _OUTCOMES.get(name, name),
                in_hundredths(value_at(found, (0, i))),
                in_hundredths(value_at(found, (1, i))),
                span(*null_at(found, (1, i)), share=True),
                "yes" if told["beyond_every_draw"][name] else "no",
            ]
            for i, name in enumerate(names)
        ],
        quotes=[
            (f"{effect} {unit} (random directions {chance})", f"head {head}") for head, effect, chance, _ in heads[:3]
        ],
        notes=[f"{written}.", f"Chosen on {told['n_fallen']} harmful requests that were complied with.", *notes],
    )


def _emergent_heads_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Which heads carry more in the reasoner than in its base model."""
    (found,) = measured(results, "emergent_heads")
    assert found.null is not None
    gains = [(float(value), at) for at, value in np.ndenumerate(found.values)]
    order = [*strongest(gains, _EXTREMES), *reversed(list(strongest([(-v, at) for v, at in gains], _EXTREMES)))]
    outside = int(((found.values > found.null.high) | (found.values < found.null.low)).sum())
    first, about = order[0], found.provenance
    by_chance = 2 * chance_above(_EXCHANGES) * found.values.size
    return Summary(
        finding=f"From {about['base']} to {about['reasoner']} head {head_named(first)} gained most: its importance changed by "
        f"{short(float(found.values[first]))} of the sum of both, {side_of(float(found.values[first]), *null_at(found, first))} the "
        f"range of exchanged models ({span(*null_at(found, first))}); {outside} of {found.values.size} heads are outside theirs "
        f"(about {by_chance:.0f} by chance).",
        columns=("head", "relative change", "models exchanged", "base model", "reasoner"),
        rows=[
            [
                head_named(at),
                short(float(found.values[at])),
                span(*null_at(found, at)),
                short(float(found.arrays["base"][at])),
                short(float(found.arrays["reasoner"][at])),
            ]
            for at in order
        ],
        notes=_completeness(found),
    )


def _completeness(found: Result) -> list[str]:
    each = np.array(found.numbers["completeness"], dtype=np.float64).ravel()
    total = span(float(each.min()), float(each.max()))
    said = f"{found.numbers['n_pairs']} pairs of openings; the attributions add up to {total} of the effect"
    low, high = _COMPLETE
    return [f"{said}: take the numbers with care."] if (each < low).any() or (each > high).any() else [f"{said}."]


def _suppression_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """What each sentence owes to earlier ones."""
    found = measured(results, "suppression")
    pairs = sentence_pairs(found)
    best = list(strongest(pairs, MOST_ROWS))
    above = sum(value > null_at(one, (target, source))[1] for value, (one, target, source) in pairs)
    texts = {id(one): [s.text for s in trace_sentences(trace_of(one, traces))] for one in found}
    one, target, source = best[0]
    share, chance = in_hundredths(above / len(pairs)), in_hundredths(BY_CHANCE)
    return Summary(
        finding=f"{above} of {len(pairs)} pairs of sentences ({share}; {chance} by chance) depend on each other more than on as many "
        f"random tokens, most of all sentence {target} on {labelled_sentence(one, source, traces)}.",
        columns=("trace", "sentence", "owes to", "effect, log nats", "random tokens", "effect, nats"),
        rows=[
            [
                str(one.provenance["trace"]),
                str(target),
                str(source),
                short(float(one.values[target, source])),
                span(*null_at(one, (target, source))),
                short(float(one.arrays["kl"][target, source])),
            ]
            for one, target, source in best
        ],
        quotes=[
            (f"{quoted(texts[id(one)][target])} owes to {quoted(texts[id(one)][source])}", f"{source} → {target}")
            for one, target, source in best[:FEW_QUOTES]
        ],
        notes=[
            "The effect in log nats is above the sentence's mean over all earlier ones.",
            *left_out(len(best), len(pairs), "pairs"),
        ],
    )


SUMMARIES: Mapping[str, Summarise] = {
    "suppression": _suppression_summary,
    "cliff": _cliff_summary,
    "emergent_heads": _emergent_heads_summary,
}
