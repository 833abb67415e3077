"""Rules that end the thinking at a cut: each reads one number per cut, and stops at the first that reaches a threshold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.exits.signals import ExitSignals
from reasonscope.data.arrays import Values
from reasonscope.data.text.answers import equivalent

BUDGET = "fixed budget"


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """A rule.

    Attributes:
        name: Its name.
        unit: What its threshold counts.
        statistic: The number that it compares at each cut, (cut,); it never stops at NaN.
        tries: At which cuts it forces an answer to decide, (cut,), whose tokens it pays for; None if at none.
    """

    name: str
    unit: str
    statistic: Callable[[ExitSignals], Values]
    tries: Callable[[ExitSignals], NDArray[np.bool_]] | None = None

    def known(self, signals: Sequence[ExitSignals]) -> bool:
        """Whether these traces have what the rule reads."""
        return any(np.isfinite(self.statistic(one)).any() for one in signals)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """What happens to each trace: whether its answer is right, (trace,), and the tokens of thinking and of tries that it took."""

    right: Values
    tokens: Values


def stopping_cut(statistic: Values, threshold: float) -> int | None:
    """The first cut at which the number reaches the threshold; None if the thinking runs to its end."""
    reached = np.flatnonzero(statistic >= threshold)  # NaN never does
    return int(reached[0]) if len(reached) else None


def outcomes(rule: ExitRule, signals: Sequence[ExitSignals], threshold: float) -> Outcomes:
    """What the rule does to each trace at a threshold."""
    return outcomes_at(signals, [stopping_cut(rule.statistic(one), threshold) for one in signals], rule)


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


def _repeats(signals: ExitSignals) -> Values:
    """How many forced answers in a row, up to each cut, are the same; 0 without an answer."""
    counts: list[float] = []
    for i, answer in enumerate(signals.answers):
        before = signals.answers[i - 1] if i else None
        same = answer is not None and before is not None and equivalent(answer, before)
        counts.append(0.0 if answer is None else counts[-1] + 1 if same else 1.0)
    return np.array(counts)


def _at_transitions(signals: ExitSignals) -> Values:
    return np.where(signals.transition, signals.confidence, np.nan)


def _everywhere(signals: ExitSignals) -> NDArray[np.bool_]:
    return np.ones(len(signals.cuts), dtype=bool)


def _stated(signals: ExitSignals) -> Values:
    return signals.candidates.astype(np.float64)


RULES: tuple[ExitRule, ...] = (
    ExitRule(name="probe", unit="score", statistic=lambda one: one.score),
    ExitRule(  # DEER, arXiv 2504.15895
        name="confidence before a doubt",
        unit="probability",
        statistic=_at_transitions,
        tries=lambda one: one.transition,
    ),
    ExitRule(name="closing margin", unit="−nats", statistic=lambda one: -one.margin),  # ThinkBrake, arXiv 2510.00546
    ExitRule(name="stable answers", unit="answers", statistic=_repeats, tries=_everywhere),
    ExitRule(name="stated answers", unit="answers", statistic=_stated),  # First Try Matters, arXiv 2510.08308
)
FIXED_BUDGET = ExitRule(name=BUDGET, unit="tokens", statistic=lambda one: one.spent.astype(np.float64))
