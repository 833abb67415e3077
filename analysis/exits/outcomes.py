"""What an exit rule does to traces at a threshold, and the thresholds that tell them apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reasonscope.analysis.exits.signals import ExitSignals
from reasonscope.data.arrays import Values
from reasonscope.steering.exits.rules import ExitRule


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """What happens to each trace: whether its answer is right, (trace,), and the tokens of thinking and of tries that it took."""

    right: Values
    tokens: Values


def outcomes_at(signals: Sequence[ExitSignals], stops: Sequence[int | None], rule: ExitRule | None = None) -> Outcomes:
    """What happens if the thinking of each trace ends at a cut, or runs to its end (None); a rule pays for its tries up to there."""
    right, tokens = np.zeros(len(signals)), np.zeros(len(signals))
    for i, (one, at) in enumerate(zip(signals, stops, strict=True)):
        right[i] = one.finished if at is None else one.right[at]
        tokens[i] = one.total if at is None else one.spent[at]
        if rule is not None and rule.tries is not None:
            paid = rule.tries(one)[: None if at is None else at + 1]
            tokens[i] += one.trial[: len(paid)][paid].sum()
    return Outcomes(right=right, tokens=tokens)


def thresholds(rule: ExitRule, signals: Sequence[ExitSignals], *, most: int = 60) -> list[float]:
    """Thresholds that tell these traces apart, ascending, with infinity (never stop) as the last; at most `most` and one."""
    values = np.concatenate([rule.statistic(one) for one in signals]) if signals else np.zeros(0)
    values = np.unique(values[np.isfinite(values)])
    if len(values) > most:
        values = np.unique(np.quantile(values, np.linspace(0, 1, most), method="nearest"))
    return [*values.tolist(), float("inf")]
