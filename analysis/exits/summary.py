"""What early exits save, in words."""

from collections.abc import Sequence

import numpy as np

from reasonscope.analysis.exits.evaluation import ExitPoint, Thoughts
from reasonscope.analysis.exits.run import ExitStudy
from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import Summary, in_hundredths, in_percent, in_words
from reasonscope.steering.exits.rules import BUDGET

_LEVEL = 0.025  # one-sided; the rules share it, since the best of them is named
_COLUMNS = ("rule", "threshold", "tokens", "accuracy", "saved", "random", "n")


def exit_summary(
    study: ExitStudy, *, tolerance: float = 0.02, files: Sequence[str] = (), next_command: str = ""
) -> Summary:
    """The rules at one tolerance, beside the whole thinking, a fixed budget and random stops."""
    report = study.report
    accuracy, tokens = report.whole
    points = report.at(tolerance)
    looked_at = [point for point in points if point.rule != BUDGET and point.rule not in study.uncounted]
    n = str(report.n_judged)
    rows: list[tuple[str, ...]] = [("whole thinking", "–", in_words(tokens), in_hundredths(accuracy), "–", "–", n)]
    rows += [_row(point, n) for point in points]
    return Summary(
        finding=_finding(looked_at, tolerance),
        columns=_COLUMNS,
        rows=rows,
        notes=[
            f"Thresholds come from {report.n_calibrated} other traces, on which they cost at most {tolerance:g} of accuracy; "
            "tokens include those of forced answers.",
            "Saved: tokens, against the cheapest fixed budget that is at least as accurate on the same traces, chosen with hindsight.",
            f"The best of {len(looked_at)} rules is named, so it has to save in all but {_LEVEL:g} / {len(looked_at)} of the resamples.",
            "Random: accuracy if the same stops fall on other traces, mean and range of the draws.",
            *(
                f"“{name}” lacks the tokens of the answers that it forced, which are not known: {why}. The finding leaves it out."
                for name, why in study.uncounted.items()
            ),
            *_thoughts(report.thoughts),
            *(
                [f"The forced answers of {study.n_kept} of {study.n_traces} traces were kept from before."]
                if study.n_kept
                else []
            ),
            *([f"No probe: {study.without_probe}"] if study.without_probe else []),
        ],
        files=files,
        next_command=next_command,
    )


def _finding(points: Sequence[ExitPoint], tolerance: float) -> str:
    better = [
        point for point in points if len(points) * point.budget_saving_p <= _LEVEL and point.budget_saving.low > 0
    ]
    best = max(better or points, key=lambda point: point.budget_saving.value, default=None)
    if best is None:
        return "No rule has what it reads on these traces."
    saved = in_percent(best.budget_saving)
    if better:
        costs = _costs(best.change)
        return f"{_named(best.rule)} saves {saved} of the tokens against the best fixed budget of equal accuracy, and {costs}."
    if best.budget_saving.value <= 0:
        return (
            f"No rule saves tokens against the best fixed budget of equal accuracy, at a tolerance of {tolerance:g}: "
            f"the best, {_named(best.rule, inside=True)}, comes to {saved}."
        )
    return (
        f"No rule clearly saves tokens against the best fixed budget of equal accuracy, at a tolerance of {tolerance:g}: "
        f"the most is {saved} by {_named(best.rule, inside=True)}."
    )


def _costs(change: Estimate) -> str:
    """What stopping does to accuracy."""
    size = in_hundredths(change, signed=True)
    unclear = change.low <= 0 <= change.high
    return f"does not clearly change accuracy ({size})" if unclear else f"changes accuracy by {size}"


def _named(rule: str, *, inside: bool = False) -> str:
    """`Stopping by the probe`."""
    return f"{'stopping' if inside else 'Stopping'} by “{rule}”"


def _row(point: ExitPoint, n: str) -> tuple[str, ...]:
    low, mean, high = point.random
    known = np.isfinite(mean)
    chance = f"{in_hundredths(mean)} [{in_hundredths(low)}, {in_hundredths(high)}]" if known else "–"
    threshold = "never" if point.threshold == np.inf else in_words(point.threshold)
    return (
        point.rule,
        threshold,
        in_words(point.tokens),
        in_hundredths(point.accuracy),
        in_percent(point.budget_saving),
        chance,
        n,
    )


def _thoughts(found: Thoughts) -> list[str]:
    told = {
        "Thoughts that were right before the model went on to doubt, check or try another way": found.right_before_going_on,
        "Share of the thinking after the first right answer, if the trace ends right (overthinking)": found.overthinking,
        "The same if it ends wrong (underthinking)": found.underthinking,
    }
    return [f"{what}: {in_hundredths(share)}." for what, share in told.items() if share is not None]
