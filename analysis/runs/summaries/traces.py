"""What the analyses of whole traces found: trajectories, confidence along the thinking, and rules that choose among samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study
from reasonscope.analysis.runs.summaries.wording import (
    MOST_ROWS,
    estimate_of,
    groups_of,
    left_out,
    mean_of,
    measured,
    null_at,
    over_traces,
    short,
    span,
    value_at,
)
from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import Summary, in_hundredths

_ALIGNED = "aligned"


def trajectory_summary(results: Sequence[Result], study: Study[Any]) -> Summary:
    """How far and how straight the hidden state moves."""
    found = measured(results, "trajectory")
    groups = groups_of(found, study.traces)
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


def confidence_summary(results: Sequence[Result], study: Study[Any]) -> Summary:
    """When the model knew its answer."""
    found = measured(results, "confidence")
    groups, cuts = groups_of(found, study.traces), found[0].axis("cut").labels
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


def selection_summary(results: Sequence[Result], study: Study[Any]) -> Summary:
    """Which rule to choose samples by."""
    (found,) = measured(results, "selection")
    rules = found.axis("rule").labels
    best = max(range(1, len(rules)), key=lambda i: (found.values[i, 0], -found.values[i, 1]))
    single, chosen = value_at(found, (0, 0)), value_at(found, (best, 0))
    cost = found.values[best, 1] / found.values[0, 1]
    return Summary(
        finding=f"The best rule for {found.numbers['k']} samples is {rules[best]}: {in_hundredths(chosen)} of problems are right, at "
        f"{cost:.1f} times the tokens of a single sample, which is right for {in_hundredths(single)}."
        if chosen.value > single.value
        else f"No rule for {found.numbers['k']} samples is better than a single sample, which is right for {in_hundredths(single)} of "
        f"problems; {rules[best]} comes to {in_hundredths(chosen)} at {cost:.1f} times its tokens.",
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
            "Null: a single sample, drawn at random.",
        ],
    )


def _tokens(found: Result, rule: int) -> Estimate:
    """The tokens of a rule; the interval of a few skewed lengths can reach below 0, which none can be."""
    tokens = value_at(found, (rule, 1))
    return Estimate(value=tokens.value, low=max(tokens.low, 0.0), high=tokens.high)
