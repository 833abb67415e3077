"""What a plan of ablations and patches says, in words."""

from collections.abc import Mapping

import numpy as np

from reasonscope.analysis.figures.ablations import LEAST_SHARE
from reasonscope.analysis.results import Result
from reasonscope.data.summary import Summary, in_hundredths, shortest_range
from reasonscope.steering.ablation.effects import AblationEffect
from reasonscope.steering.ablation.regeneration import RegenerationEffect
from reasonscope.steering.ablation.summaries import ablation_summary, regeneration_summary, split_summary

_SHOWN = 5  # places of a patch


def study_summaries(
    effects: Mapping[str, AblationEffect],
    regenerated: Mapping[str, RegenerationEffect],
    unwritten: Mapping[str, str],
    patched: Mapping[str, Result],
) -> list[Summary]:
    """The effects, parts of the traces, what was written again, and each patch."""
    found = [ablation_summary(effects), split_summary(effects)] if effects else []
    found += [
        regeneration_summary(regenerated, not_measured=unwritten),
        *(_patch_summary(name, one) for name, one in patched.items()),
    ]
    return [one for one in found if one is not None]


def _patch_summary(name: str, result: Result) -> Summary:
    """The places at which patching gives most of the clean text's answer back, beside the states of unrelated texts at the same place."""
    recovered, axis = result.values[0], result.axes[-1]
    if not np.isfinite(recovered).any():
        return Summary(finding=f"{name}: nothing to recover, because {result.reason}.")
    order = np.argsort(-np.nan_to_num(recovered, nan=-np.inf), axis=None, kind="stable")[:_SHOWN]
    places = [(int(i) // len(axis), int(i) % len(axis)) for i in order]
    rows = [_row(result, layer, place) for layer, place in places]
    best = rows[0]
    clean, corrupted = (result.numbers[key]["logit difference"] for key in ("clean", "corrupted"))
    control = f"; states of unrelated texts there recover {best[4]}" if result.null is not None else ""
    return Summary(
        finding=f"{name}: layer {best[0]}, {axis.name} {best[1]} alone recovers {best[2]} of the logit difference{control}.",
        columns=("layer", axis.name, "recovered logit difference", "recovered probability", "unrelated texts"),
        rows=rows,
        notes=[
            f"Between {result.numbers['right']!r} and {result.numbers['wrong']!r}: logit difference {clean:.3g} in the clean text, "
            f"{corrupted:.3g} in the corrupted one. {_beyond(result)}"
        ],
    )


def _row(result: Result, layer: int, place: int) -> tuple[str, ...]:
    label = result.axes[-1].labels[place]
    pieces = result.numbers.get("pieces")
    named = f"{label} {pieces[place]!r}" if pieces else label
    chance = "–"
    if result.null is not None:
        ends = (float(band[0, layer, place]) for band in (result.null.low, result.null.high))
        chance = shortest_range([in_hundredths(end) for end in ends])
    shares = (in_hundredths(float(result.values[i, layer, place])) for i in range(2))
    return str(layer), named, *shares, chance


def _beyond(result: Result) -> str:
    """How many places recover more than the states of unrelated texts do."""
    values = result.values[0]
    n = int(np.isfinite(values).sum())
    if result.null is None:
        return f"{n} places, without a control."
    beyond = int((values > np.maximum(result.null.high[0], LEAST_SHARE)).sum())
    return f"{beyond} of {n} places recover at least .01 and more than the {result.null.what}."
