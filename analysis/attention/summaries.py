"""What the analyses of heads found: receiver heads, head profiles and attention maps."""

from collections.abc import Mapping, Sequence

import numpy as np

from reasonscope.analysis.results import Result
from reasonscope.analysis.wording import (
    MOST_QUOTES,
    MOST_ROWS,
    Summarise,
    estimate_of,
    groups_of,
    head_named,
    mean_of,
    measured,
    null_at,
    over_traces,
    quoted,
    sentence_named,
    short,
    span,
    strongest,
    trace_of,
    value_at,
)
from reasonscope.data.arrays import Values
from reasonscope.data.intervals import Estimate
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.summary import Summary, in_hundredths, plural
from reasonscope.data.trace import Trace

_METRICS = {
    "span": "looks furthest back, tokens",
    "sink": "looks at the first token",
    "previous": "looks at the token before",
    "induction": "looks at what followed last time",
    "waad": "looks back, up to 10 tokens",
    "fai": "is looked at 10 to 50 tokens later",
}
_REGIONS = ("the prompt", "earlier sentences", "its own sentence")
_FAR = 4  # sentences: every sentence looks at the last few


def _receivers_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Which heads look at few sentences only, and at which."""
    (found,) = measured(results, "receivers")
    heads, told = found.numbers["heads"], found.numbers
    rows = [_receiver_row(found, head) for head in heads[:MOST_ROWS]]
    return Summary(
        finding=f"The heads that look at few sentences only are {', '.join(heads[:3])}; the kurtosis of {heads[0]} is {rows[0][1]} "
        f"(uniform attention: {rows[0][2]}; {plural(told['n_traces'], 'trace')})."
        if heads
        else "No head after layer 0 has a kurtosis, so none can be called a receiver head.",
        columns=("receiver head", "kurtosis", "uniform attention", "attention on the first token"),
        rows=rows,
        quotes=_received(measured(results, "receiver_scores"), traces),
        notes=[
            *_reliability(told["split_half_reliability"]),
            *([f"With too few sentences: {plural(told['n_left_out'], 'trace')}."] if told["n_left_out"] else []),
        ],
    )


def _reliability(found: float | None) -> list[str]:
    if found is None or np.isnan(found):
        return []
    return [
        f"Two halves of the traces agree on the kurtosis of heads at {in_hundredths(found)} (split-half reliability)."
    ]


def _receiver_row(found: Result, head: str) -> list[str]:
    at = _place(head)
    return [
        head,
        short(value_at(found, at)),
        short(null_at(found, at)[0]),
        in_hundredths(float(found.arrays["sink"][at])),
    ]


def _place(head: str) -> tuple[int, int]:
    """Layer and index of `2.1`."""
    layer, index = head.split(".")
    return int(layer), int(index)


def _received(found: Sequence[Result], traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The sentences that receiver heads look at most, of all traces."""
    scores = [(_above(one, i), (one, i)) for one in found for i in range(len(one.values))]
    quotes = []
    for one, i in strongest(scores, MOST_QUOTES):
        text = trace_sentences(trace_of(one, traces))[i].text
        chance = span(*null_at(one, (i,)))
        quotes.append(
            (
                quoted(text),
                f"{sentence_named(i, one, traces)}, looked at {short(float(one.values[i]))} (other heads {chance})",
            )
        )
    return quotes


def _above(result: Result, i: int) -> float:
    return float(result.values[i]) - null_at(result, (i,))[1]


def _heads_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """What heads look at, and what is predicted without them."""
    profiles = measured(results, "heads")
    return Summary(
        finding=_heads_finding(results, profiles, traces),
        columns=("what a head does", "head", "most", "spread evenly"),
        rows=[_profile_row(profiles, metric, traces) for metric in profiles[0].axis("metric").labels],
        quotes=_closing(measured(results, "close_attention"), traces),
        notes=[
            *_checked_notes(measured(results, "head_attribution")),
            *_recurrence_notes(measured(results, "recurrence"), traces),
        ],
    )


def _heads_finding(results: Sequence[Result], profiles: Sequence[Result], traces: Sequence[Trace]) -> str:
    effects = measured(results, "head_effects")
    if estimated := measured(results, "head_attribution"):
        return _attribution_finding(estimated, traces)
    if not effects:
        furthest = _profile_row(profiles, "span", traces)
        return f"Head {furthest[1]} looks furthest back, {furthest[2]} tokens; attention spread evenly would look back {furthest[3]}."
    first = _highest(np.mean([one.values for one in effects], axis=0))
    effect, chance = _over(effects, first, traces), _mean_null(effects, first)
    return (
        f"Head {head_named(first)} matters most for what is written: without it the next tokens change by {short(effect)} nats of KL"
        f"{mean_of(len(effects))}; moving its output as far in random directions changes them by {span(*chance)}."
    )


def _attribution_finding(found: Sequence[Result], traces: Sequence[Trace]) -> str:
    first = _highest(np.abs(np.mean([one.values for one in found], axis=0)))
    effect, chance = _over(found, first, traces), _mean_null(found, first)
    does, moves = "supports what is written most", "loses"
    if effect.value < 0:
        does, moves = "works against what is written most", "gains"
        effect = Estimate(value=-effect.value, low=-effect.high, high=-effect.low)
    return (
        f"Head {head_named(first)} {does}: without it a written token {moves} {short(effect)} nats of log-probability"
        f"{mean_of(len(found))}, by a first-order estimate; random directions as long change it by {span(*chance)}."
    )


def _checked_notes(found: Sequence[Result]) -> list[str]:
    """How the estimate of the strongest heads compares with taking them out."""
    checked = [row for one in found[:1] for row in one.numbers["checked"]]
    if not checked:
        return []
    pairs = ", ".join(f"{row['head']} {short(row['estimate'])} and {short(row['exact'])}" for row in checked)
    return [f"Estimated, and measured by taking the head out: {pairs}. --exact takes out every head."]


def _profile_row(found: Sequence[Result], metric: str, traces: Sequence[Trace]) -> list[str]:
    k = found[0].axis("metric").labels.index(metric)
    at = (k, *_highest(np.mean([one.values[k] for one in found], axis=0)))
    value, unit = _over(found, at, traces), found[0].unit_of(metric)
    say = in_hundredths if unit.startswith("share") else short
    null = _mean_null(found, at)
    return [_METRICS[metric], head_named(at[1:]), say(value), span(*null, share=unit.startswith("share"))]


def _over(found: Sequence[Result], at: tuple[int, ...], traces: Sequence[Trace]) -> Estimate:
    """One value over the traces; that of a single trace with its own interval."""
    if len(found) == 1:
        return value_at(found[0], at)
    return over_traces([one.values[at] for one in found], groups_of(found, traces), shares=False)


def _mean_null(found: Sequence[Result], at: tuple[int, ...]) -> tuple[float, float]:
    low, high = np.mean([null_at(one, at) for one in found], axis=0)
    return float(low), float(high)


def _highest(values: Values) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.nanargmax(values), values.shape))


def _closing(found: Sequence[Result], traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The sentences that the end of the thinking looks at most."""
    scores = [(value / null_at(one, (i,))[0], (one, i)) for one in found for i, value in enumerate(one.values.tolist())]
    quotes = []
    for one, i in strongest(scores, 3):
        times = float(one.values[i]) / null_at(one, (i,))[0]
        quotes.append(
            (
                quoted(one.numbers["texts"][i]),
                f"the end of the thinking looks at {sentence_named(i, one, traces)} {times:.1f} times as much as evenly",
            )
        )
    return quotes


def _recurrence_notes(found: Sequence[Result], traces: Sequence[Trace]) -> list[str]:
    if not found:
        return []
    layers = range(len(found[0].axes[0]))
    shares = [[estimate_of(one.numbers["by_layer"][layer]["recurring"]).value for one in found] for layer in layers]
    null = [[one.numbers["by_layer_null"][layer]["recurring"] for one in found] for layer in layers]
    best = int(np.argmax(np.mean(shares, axis=1)))
    share = over_traces(shares[best], groups_of(found, traces))
    if len(found) == 1:
        share = estimate_of(found[0].numbers["by_layer"][best]["recurring"])
    return [
        f"In layer {best} a share of {in_hundredths(share)} of the tokens is looked at again after a pause, the most of all layers "
        f"({in_hundredths(float(np.mean(null[best])))} if attention is shuffled)."
    ]


def _attention_map_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
    """Where heads look: by region, and at which sentences."""
    found = measured(results, "attention_map")
    regions = found[0].axis("region").labels
    shares = [over_traces([one.values[i].mean() for one in found], groups_of(found, traces)) for i in range(3)]
    alike = [_mean_null(found, (i, 0, 0))[0] for i in range(3)]
    said = [f"{in_hundredths(share)} on {_REGIONS[i]} ({in_hundredths(alike[i])})" for i, share in enumerate(shares)]
    return Summary(
        finding=f"Of its attention the mean head spends {said[0]}, {said[1]} and {said[2]}{mean_of(len(found))}; in brackets, "
        "attention spread evenly over all tokens.",
        columns=("region", "mean head", "spread evenly", "head that looks there most", "its share"),
        rows=[
            [
                region,
                in_hundredths(shares[i]),
                in_hundredths(alike[i]),
                head_named(at := _highest(np.mean([one.values[i] for one in found], axis=0))),
                in_hundredths(_over(found, (i, *at), traces)),
            ]
            for i, region in enumerate(regions)
        ],
        quotes=_looked_at(found, traces),
    )


def _looked_at(found: Sequence[Result], traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The sentences that are looked at most from afar, in the mean head."""
    scores = []
    for one in found:
        matrix = np.asarray(one.arrays["matrix"], dtype=np.float64).mean(axis=(0, 1))
        scores += [(float(matrix[i + _FAR :, i].mean()), (one, i)) for i in range(len(matrix) - _FAR)]
    quotes = []
    for one, i in strongest(scores, 3):
        text = trace_sentences(trace_of(one, traces))[i].text
        quotes.append(
            (
                quoted(text),
                f"{sentence_named(i, one, traces)} is looked at most from {_FAR} or more sentences later",
            )
        )
    return quotes


SUMMARIES: Mapping[str, Summarise] = {
    "receivers": _receivers_summary,
    "heads": _heads_summary,
    "attention_map": _attention_map_summary,
}
