"""What thought anchors were found: the finding, the sentences that matter most, and how far they match known dependencies."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.results import Result
from reasonscope.analysis.wording import (
    BY_CHANCE,
    FEW_QUOTES,
    MOST_ROWS,
    Summarise,
    labelled_sentence,
    left_out,
    measured,
    null_at,
    quoted,
    sentence_pairs,
    short,
    span,
    strongest,
    value_at,
)
from reasonscope.data.summary import Summary, in_hundredths
from reasonscope.data.trace import Trace

# What sentences are ranked by, the first that the results have, with its unit: how far a sentence moves the answers.
_RANKED = {"resampling_kl": " nats", "counterfactual_kl": " nats", "resampling_accuracy": " of accuracy"}


def _anchors_summary(results: Sequence[Result], traces: Sequence[Trace]) -> Summary:
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
        finding=_anchors_finding(found, metric, best, above, traces),
        columns=("trace", "sentence", "kind", f"effect,{_RANKED[metric]}", "chance", "accuracy", "chance"),
        rows=[_anchor_row(one, metric, i, traces) for one, i in best],
        quotes=[
            (quoted(one.numbers["texts"][i]), labelled_sentence(one, i, traces))
            for one, i in best[:FEW_QUOTES]
            if one.at(metric=metric)[i] > 0
        ],
        notes=[
            "Effect: how far keeping a sentence moves the answers. Accuracy: what that changes it by.",
            *_anchor_notes(found),
            *_replacement_note(measured(results, "replacement"), traces),
            *left_out(len(best), len(places), "sentences"),
        ],
    )


def _ranked_by(found: Sequence[Result]) -> str:
    """The first metric that sentences can be ranked by."""
    have = [name for name in _RANKED if all(name in one.axis("metric").labels for one in found)]
    return next((name for name in have if any(np.isfinite(one.at(metric=name)).any() for one in found)), have[-1])


def _anchors_finding(
    found: Sequence[Result], metric: str, best: Sequence[Any], above: Sequence[bool], traces: Sequence[Trace]
) -> str:
    if not best:
        return "The importances do not say how far a sentence moves the answer."
    one, i = best[0]
    strength = short(float(one.at(metric=metric)[i])) + _RANKED[metric]
    first = f"The answer depends most on {labelled_sentence(one, i, traces)} ({strength}"
    if one.null is None:
        return f"{first}, as published; no null was published)."
    if float(one.at(metric=metric)[i]) == 0:
        return "No sentence moves the answer: the rollouts from before every sentence answer alike."
    if not any(above):
        return f"No sentence moves the answer more than chance; the most is {strength} (by chance {span(*_chance(one, metric, i))})."
    return (
        f"{first}; by chance {span(*_chance(one, metric, i))}), and {sum(above)} of {len(above)} sentences move it more than chance "
        f"(about {BY_CHANCE * len(above):.1f} would)."
    )


def _at(result: Result, metric: str, i: int) -> tuple[int, int]:
    return result.axis("metric").labels.index(metric), i


def _chance(result: Result, metric: str, i: int) -> tuple[float, float]:
    return null_at(result, _at(result, metric, i))


def _anchor_row(result: Result, metric: str, i: int, traces: Sequence[Trace]) -> list[str]:
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
    for one in judged[:FEW_QUOTES]:
        told = one.numbers["dependencies"]
        notes.append(
            f"The effects of sentences find the known dependencies of {one.provenance['trace']} with AUROC "
            f"{in_hundredths(told['auroc'])} (by chance {span(*told['auroc_null'], share=True)}; by nearness alone "
            f"{in_hundredths(told['distance_auroc'])})."
        )
    return notes


def _replacement_note(found: Sequence[Result], traces: Sequence[Trace]) -> list[str]:
    pair = next(strongest(sentence_pairs(found), 1), None)
    if pair is None:
        return []
    one, target, source = pair
    return [
        f"Replacing {labelled_sentence(one, source, traces)} changes sentence {target} most: {short(float(one.values[target, source]))} "
        f"nats (another sentence in its place: {span(*null_at(one, (target, source)))})."
    ]


SUMMARIES: Mapping[str, Summarise] = {
    "anchors": _anchors_summary,
}
