"""What the analyses of sentences found: thought anchors, suppression, reflection, and signals side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study, trace_sentences
from reasonscope.analysis.runs.summaries.wording import (
    MOST_ROWS,
    groups_of,
    left_out,
    mean_of,
    measured,
    n_traces,
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
from reasonscope.data.summary import Summary, in_hundredths

# What sentences are ranked by, the first that the results have, with its unit: how far a sentence moves the answers.
_RANKED = {"resampling_kl": " nats", "counterfactual_kl": " nats", "resampling_accuracy": " of accuracy"}
_QUOTED = 3
_BY_CHANCE = 0.025  # of values that are as good as chance, above a 95 % range of many draws


def anchors_summary(results: Sequence[Result], study: Study[Any]) -> Summary:
    """Which sentences the answer depends on."""
    found = measured(results, "anchors")
    metric = _ranked_by(found)
    places = [
        (value, (one, i))
        for one in found
        for i, value in enumerate(one.at(metric=metric).tolist())
        if np.isfinite(value)
    ]
    best = list(strongest(places, MOST_ROWS))
    above = [value > _chance(one, metric, i)[1] for value, (one, i) in places]
    return Summary(
        finding=_anchors_finding(found, metric, best, above, study),
        columns=("trace", "sentence", "kind", f"effect,{_RANKED[metric]}", "chance", "accuracy", "chance"),
        rows=[_anchor_row(one, metric, i, study) for one, i in best],
        quotes=[
            (quoted(one.numbers["texts"][i]), _named(one, i, study))
            for one, i in best[:_QUOTED]
            if one.at(metric=metric)[i] > 0
        ],
        notes=[
            "Effect: how far keeping a sentence moves the answers. Accuracy: what that changes it by.",
            *_anchor_notes(found),
            *_replacement_note(measured(results, "replacement"), study),
            *left_out(len(best), len(places), "sentences"),
        ],
    )


def _ranked_by(found: Sequence[Result]) -> str:
    """The first metric that sentences can be ranked by."""
    have = [name for name in _RANKED if all(name in one.axis("metric").labels for one in found)]
    return next((name for name in have if any(np.isfinite(one.at(metric=name)).any() for one in found)), have[-1])


def _anchors_finding(
    found: Sequence[Result], metric: str, best: Sequence[Any], above: Sequence[bool], study: Study[Any]
) -> str:
    if not best:
        return "The importances do not say how far a sentence moves the answer."
    one, i = best[0]
    strength = short(float(one.at(metric=metric)[i])) + _RANKED[metric]
    first = f"The answer depends most on {_named(one, i, study)} ({strength}"
    if one.null is None:
        return f"{first}, as published; no null was published)."
    if float(one.at(metric=metric)[i]) == 0:
        return "No sentence moves the answer: the rollouts from before every sentence answer alike."
    if not any(above):
        return f"No sentence moves the answer more than chance; the most is {strength} (by chance {span(*_chance(one, metric, i))})."
    return (
        f"{first}; by chance {span(*_chance(one, metric, i))}), and {sum(above)} of {len(above)} sentences move it more than chance "
        f"(about {_BY_CHANCE * len(above):.1f} would)."
    )


def _named(result: Result, i: int, study: Study[Any]) -> str:
    """A sentence by its label: published sentences keep their published numbers."""
    return sentence_named(result.axes[-1].labels[i], result, study.traces)


def _at(result: Result, metric: str, i: int) -> tuple[int, int]:
    return result.axis("metric").labels.index(metric), i


def _chance(result: Result, metric: str, i: int) -> tuple[float, float]:
    return null_at(result, _at(result, metric, i))


def _anchor_row(result: Result, metric: str, i: int, study: Study[Any]) -> list[str]:
    change = "resampling_accuracy"
    return [
        str(result.provenance["trace"]),
        result.axes[-1].labels[i],
        result.numbers["tags"][i].replace("_", " "),
        short(value_at(result, _at(result, metric, i))),
        span(*_chance(result, metric, i)),
        in_hundredths(value_at(result, _at(result, change, i)), signed=True),
        span(*_chance(result, change, i), share=True),
    ]


def _anchor_notes(found: Sequence[Result]) -> list[str]:
    notes = []
    rollouts = [one.numbers["rollouts"] for one in found if "rollouts" in one.numbers]
    if rollouts:
        answered = sum(one.numbers["answered"] for one in found if "answered" in one.numbers)
        notes.append(f"{sum(rollouts)} rollouts, of which {answered} gave an answer.")
    judged = [one for one in found if one.numbers.get("dependencies")]
    for one in judged[:_QUOTED]:
        told = one.numbers["dependencies"]
        notes.append(
            f"The effects of sentences find the known dependencies of {one.provenance['trace']} with AUROC "
            f"{in_hundredths(told['auroc'])} (by chance {span(*told['auroc_null'], share=True)}; by nearness alone "
            f"{in_hundredths(told['distance_auroc'])})."
        )
    return notes


def _replacement_note(found: Sequence[Result], study: Study[Any]) -> list[str]:
    pair = next(strongest(_pairs(found), 1), None)
    if pair is None:
        return []
    one, target, source = pair
    return [
        f"Replacing {_named(one, source, study)} changes sentence {target} most: {short(float(one.values[target, source]))} "
        f"nats (another sentence in its place: {span(*null_at(one, (target, source)))})."
    ]


def _pairs(found: Sequence[Result]) -> list[tuple[float, tuple[Result, int, int]]]:
    """Every pair (target, source) that was measured, with its value."""
    return [
        (float(one.values[target, source]), (one, int(target), int(source)))
        for one in found
        for target, source in zip(*np.nonzero(np.isfinite(one.values)), strict=True)
    ]


def suppression_summary(results: Sequence[Result], study: Study[Any]) -> Summary:
    """What each sentence owes to earlier ones."""
    found = measured(results, "suppression")
    pairs = _pairs(found)
    best = list(strongest(pairs, MOST_ROWS))
    above = sum(value > null_at(one, (target, source))[1] for value, (one, target, source) in pairs)
    texts = {id(one): [s.text for s in trace_sentences(trace_of(one, study.traces))] for one in found}
    one, target, source = best[0]
    share, chance = in_hundredths(above / len(pairs)), in_hundredths(_BY_CHANCE)
    return Summary(
        finding=f"{above} of {len(pairs)} pairs of sentences ({share}; {chance} by chance) depend on each other more than on as many "
        f"random tokens, most of all sentence {target} on {_named(one, source, study)}.",
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
            for one, target, source in best[:_QUOTED]
        ],
        notes=[
            "The effect in log nats is above the sentence's mean over all earlier ones.",
            *left_out(len(best), len(pairs), "pairs"),
        ],
    )


def reflection_summary(results: Sequence[Result], study: Study[Any]) -> Summary:
    """What the thinking does after its first answer."""
    found = measured(results, "reflection")
    groups = groups_of(found, study.traces)
    after = over_traces([one.numbers["reflection"] for one in found], groups)
    counts = np.sum([one.values for one in found], axis=0).astype(int)
    verbs = zip(("confirms", "corrects", "breaks", "changes"), counts, strict=True)
    changes = ", ".join(f"{verb} it {_times(n)}" for verb, n in verbs if n)
    return Summary(
        finding=f"After its first answer the thinking goes on for {in_hundredths(after)} of its length{mean_of(len(found))}"
        f"{_then(changes)}.",
        columns=("trace", "first at", "goes on for", "right: first, last", "confirms", "corrects", "breaks", "changes"),
        rows=[_reflection_row(one, study) for one in found[:MOST_ROWS]],
        quotes=[_first_answer(one, study) for one in found[:_QUOTED]],
        notes=[
            f"First answer right: {_right(found, 'first_correct')}; last answer right: {_right(found, 'last_correct')}.",
            "In brackets: the same answers in random order. “First at” is a sentence.",
            *_unused(found, groups),
            *left_out(MOST_ROWS, len(found), "traces"),
        ],
    )


def _then(changes: str) -> str:
    return f"; it {changes}" if changes else ", and states no other answer"


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


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


def _reflection_row(result: Result, study: Study[Any]) -> list[str]:
    told = result.numbers
    kinds = [f"{int(value)} ({span(*null_at(result, (i,)))})" for i, value in enumerate(result.values)]
    right = ", ".join({True: "yes", False: "no", None: "–"}[told[name]] for name in ("first_correct", "last_correct"))
    return [str(result.provenance["trace"]), str(told["first"]), in_hundredths(told["reflection"]), right, *kinds]


def _first_answer(result: Result, study: Study[Any]) -> tuple[str, str]:
    sentences = trace_sentences(trace_of(result, study.traces))
    return quoted(sentences[result.numbers["first"]].text), f"first answer of {result.provenance['trace']}"


def agreement_summary(results: Sequence[Result], study: Study[Any]) -> Summary:
    """Which sentences matter by every signal."""
    found = measured(results, "agreement")
    ranks = [(value, (one, i)) for one in found for i, value in enumerate(one.arrays["mean_rank"].tolist())]
    best = list(strongest(ranks, MOST_ROWS))
    one, i = best[0]
    above = sum(len(each.numbers["top"]) for each in found)
    signals, chance = len(one.axis("signal")), span(*null_at(one, (0, 0)), share=True)
    return Summary(
        finding=f"{_named(one, i, study).capitalize()} matters most by {signals} signals: its mean rank is {_rank(one, i)} (by chance "
        f"{chance}); {above} of {len(ranks)} sentences are above that range."
        if above
        else f"No sentence matters more than chance by all signals: the highest mean rank over {signals} signals is {_rank(one, i)}, of "
        f"{_named(one, i, study)} (by chance {chance}).",
        columns=("signals", "rank correlation", "beyond their place", "p (Holm)"),
        rows=[row for each in found[:1] for row in _agreement_rows(each)],
        quotes=[
            (quoted(each.numbers["texts"][k]), f"{_named(each, k, study)}, mean rank {_rank(each, k)}")
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
        notes.append(f"The table is of {found[0].provenance['trace']}, the first of {n_traces(len(found))}.")
    return notes


def _left_out(found: Sequence[Result]) -> dict[str, str]:
    """The signals that were saved but could not be compared, and why."""
    return {method: why for one in found for method, why in one.numbers.get("left_out", {}).items()}
