"""What early exits save at equal accuracy: thresholds from one part of the problems, judged on the other, beside a fixed budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from reasonscope.analysis.exits.outcomes import Outcomes, outcomes_at, thresholds
from reasonscope.analysis.exits.signals import ExitSignals
from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, Resamples, difference_estimate, mean_estimate, permutation_p
from reasonscope.steering.exits.rules import FIXED_BUDGET, RULES, ExitRule, rule_named, stopping_place

TOLERANCES = (0.0, 0.02, 0.05, 0.1)


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """A rule at one threshold, judged.

    Attributes:
        rule: Its name.
        tolerance: The accuracy that the threshold was allowed to cost when it was chosen; None if nothing was chosen.
        threshold: The threshold; infinite if nothing may stop.
        stopped: Share of the traces that it stops.
        accuracy: Share of right answers.
        tokens: Mean tokens of thinking, with those of its tries.
        change: Accuracy minus that of the whole thinking, paired.
        saving: Share of the tokens of the whole thinking that it saves.
        budget_saving: Share of the tokens that it saves against the cheapest fixed budget that is at least as accurate, chosen with
            hindsight on the same traces.
        budget_saving_p: The share of resamples of the problems in which it saves nothing, the rule as it is counted as one of them. Divide
            .025 by the number of rules that are looked at before you call the best one better.
        budget_change: Accuracy minus that of this budget, paired.
        random: Lowest, mean and highest accuracy if the same shares of the thinking fall to other traces at random.
        random_tokens: Mean tokens of these.
    """

    rule: str
    tolerance: float | None
    threshold: float
    stopped: float
    accuracy: Estimate
    tokens: Estimate
    change: Estimate
    saving: Estimate
    budget_saving: Estimate
    budget_saving_p: float
    budget_change: Estimate
    random: tuple[float, float, float]
    random_tokens: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {name: v.to_dict() if isinstance(v, Estimate) else v for name, v in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Thoughts:
    """Whether thoughts knew the answer before the model went on; None if no trace tells.

    Attributes:
        right_before_going_on: Share of thoughts, each up to a doubt, a check or another way, whose forced answer is right.
        overthinking: Mean share of the thinking after the first right forced answer, over traces that end right.
        underthinking: The same over traces that end wrong, 0 for those without a right one (arXiv 2501.18585, equation 1).
    """

    right_before_going_on: Estimate | None
    overthinking: Estimate | None
    underthinking: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {name: None if v is None else v.to_dict() for name, v in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class ExitReport:
    """What each rule saves and costs.

    Attributes:
        whole: Accuracy and tokens of the whole thinking, judged.
        points: Every rule at every tolerance.
        budgets: Mean tokens and accuracy of every fixed budget, on the judged traces.
        thoughts: Whether thoughts were right before they went on, on all traces.
        n_calibrated: Traces that the thresholds come from.
        n_judged: Traces that they are judged on.
        n_groups: Groups of problems among these.
    """

    whole: tuple[Estimate, Estimate]
    points: tuple[ExitPoint, ...]
    budgets: tuple[tuple[float, float], ...]
    thoughts: Thoughts
    n_calibrated: int
    n_judged: int
    n_groups: int

    def at(self, tolerance: float) -> list[ExitPoint]:
        """The rules at one tolerance, with those that have none (thresholds that were given, and live runs).

        Raises InputError if no threshold was chosen at this tolerance.
        """
        chosen = sorted({point.tolerance for point in self.points if point.tolerance is not None})
        if tolerance not in chosen:
            known = ", ".join(f"{one:g}" for one in chosen)
            raise InputError(f"no threshold was chosen at a tolerance of {tolerance:g}; choose from {known}")
        return [point for point in self.points if point.tolerance in (tolerance, None)]

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        accuracy, tokens = self.whole
        return {
            "whole": {"accuracy": accuracy.to_dict(), "tokens": tokens.to_dict()},
            "rules": [point.to_dict() for point in self.points],
            "fixed_budgets": [{"tokens": tokens, "accuracy": accuracy} for tokens, accuracy in self.budgets],
            "thoughts": self.thoughts.to_dict(),
            "traces": {"calibrated": self.n_calibrated, "judged": self.n_judged, "groups": self.n_groups},
        }


def exit_report(
    calibrated: Sequence[ExitSignals],
    judged: Sequence[ExitSignals],
    *,
    rules: Sequence[ExitRule] = RULES,
    tolerances: Sequence[float] = TOLERANCES,
    live: Mapping[str, Outcomes] | None = None,
    at: Sequence[tuple[str, float]] = (),
    n_controls: int = 20,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ExitReport:
    """Choose each rule's threshold on some traces and judge it on others.

    A threshold is the cheapest whose accuracy on the calibrated traces is at most a tolerance below that of the whole thinking. Fixed
    budgets stop at the first cut after so many tokens, and are chosen in the same way; beside that, each rule is compared with the
    cheapest budget that is at least as accurate on the judged traces themselves, which favours the budget.

    Args:
        calibrated: Traces that thresholds come from.
        judged: Traces of other groups of problems.
        rules: The rules; those without their signal are left out.
        tolerances: Accuracies that a threshold may cost.
        live: What happened to the judged traces while a rule stopped the model, by name, in their order.
        at: Rules at thresholds that were not chosen here: (name, threshold).
        n_controls: Random assignments of a rule's stops to the traces.
        n_resamples: Resamples of the groups, for the intervals of savings.
        seed: Random seed.

    Returns:
        The report.

    Raises:
        InputError: If a group of problems is on both sides, or there are fewer than two on one of them.

    Example:
        report = exit_report(signals[:50], signals[50:])
        [(point.rule, point.budget_saving) for point in report.at(0.02)]
    """
    if both := {one.group for one in calibrated} & {one.group for one in judged}:
        raise InputError(f"the group {sorted(both)[0]!r} is calibrated on and judged; thresholds need other problems")
    if min(len({one.group for one in side}) for side in (calibrated, judged)) < 2:
        raise InputError("fewer than two groups of problems to calibrate or to judge on; record more problems")
    judge = _Judge(judged, n_controls=n_controls, n_resamples=n_resamples, seed=seed)
    points = []
    for rule in [rule for rule in (*rules, FIXED_BUDGET) if _known(rule, calibrated)]:
        for tolerance in tolerances:
            threshold = calibrate(rule, calibrated, tolerance)
            points.append(judge.point(rule, threshold, tolerance))
    points += [judge.point(rule_named(name), threshold, None, given=f" = {threshold:g}") for name, threshold in at]
    points += [judge.live(name, found) for name, found in (live or {}).items()]
    return ExitReport(
        whole=(judge.mean(judge.whole.right), judge.mean(judge.whole.tokens, shares=False)),
        points=tuple(points),
        budgets=tuple((float(one.tokens.mean()), float(one.right.mean())) for one in judge.budgets),
        thoughts=thoughts([*calibrated, *judged]),
        n_calibrated=len(calibrated),
        n_judged=len(judged),
        n_groups=len({one.group for one in judged}),
    )


def check_tolerance(tolerance: float) -> None:
    """Raise InputError unless a tolerance is a share of answers."""
    if not 0 <= tolerance <= 1:
        raise InputError(f"a tolerance of {tolerance:g}; give the accuracy that a threshold may cost, from 0 to 1")


def _known(rule: ExitRule, signals: Sequence[ExitSignals]) -> bool:
    """Whether these traces have what the rule reads."""
    return any(np.isfinite(rule.statistic(one)).any() for one in signals)


def _outcomes(rule: ExitRule, signals: Sequence[ExitSignals], threshold: float) -> Outcomes:
    """What the rule does to each trace at a threshold."""
    return outcomes_at(signals, [stopping_place(rule.statistic(one), threshold) for one in signals], rule)


def calibrate(rule: ExitRule, signals: Sequence[ExitSignals], tolerance: float) -> float:
    """The threshold with the fewest tokens whose accuracy is at most `tolerance` below that of the whole thinking."""
    least = np.mean([one.finished for one in signals]) - tolerance - 1e-9
    tried = [(_outcomes(rule, signals, threshold), threshold) for threshold in thresholds(rule, signals)]
    fit = [(found.tokens.mean(), threshold) for found, threshold in tried if found.right.mean() >= least]
    return float(min(fit)[1])  # infinity always fits


def thoughts(signals: Sequence[ExitSignals]) -> Thoughts:
    """Whether thoughts were right before the model went on."""
    before = [(bool(right), one.group) for one in signals for right in one.right[one.transition]]
    ended_right = [(_after_first_right(one), one.group) for one in signals if one.finished and len(one.cuts)]
    ended_wrong = [(_after_first_right(one), one.group) for one in signals if not one.finished and len(one.cuts)]
    return Thoughts(
        right_before_going_on=_mean(before), overthinking=_mean(ended_right), underthinking=_mean(ended_wrong)
    )


def _after_first_right(one: ExitSignals) -> float:
    """The share of the thinking after the first cut at which the forced answer is right; 0 if it never is."""
    at = np.flatnonzero(one.right)
    return float(1 - one.spent[at[0]] / one.total) if len(at) else 0.0


def _mean(rows: Sequence[tuple[float, str]]) -> Estimate | None:
    if len({group for _, group in rows}) < 2:
        return None
    return mean_estimate([value for value, _ in rows], groups=[group for _, group in rows])


class _Judge:
    """Compares outcomes on the judged traces with the whole thinking, with fixed budgets and with random stops."""

    def __init__(self, signals: Sequence[ExitSignals], *, n_controls: int, n_resamples: int, seed: int) -> None:
        self._signals, self._n_controls, self._seed = signals, n_controls, seed
        self._groups = [one.group for one in signals]
        self._resamples = Resamples(self._groups, n_resamples=n_resamples, seed=seed)
        self.whole = outcomes_at(signals, [None] * len(signals))
        self.budgets = [_outcomes(FIXED_BUDGET, signals, at) for at in thresholds(FIXED_BUDGET, signals)]

    def mean(self, values: Values, *, shares: bool = True) -> Estimate:
        return mean_estimate(values, groups=self._groups, shares=shares)

    def point(self, rule: ExitRule, threshold: float, tolerance: float | None, *, given: str = "") -> ExitPoint:
        stops = [stopping_place(rule.statistic(one), threshold) for one in self._signals]
        random = self._random(stops)
        right = [float(one.right.mean()) for one in random]
        return self._point(
            f"{rule.name}{given}",
            outcomes_at(self._signals, stops, rule),
            tolerance=tolerance,
            threshold=threshold,
            stopped=float(np.mean([at is not None for at in stops])),
            random=(min(right), float(np.mean(right)), max(right)),
            random_tokens=float(np.mean([one.tokens.mean() for one in random])),
        )

    def live(self, name: str, found: Outcomes) -> ExitPoint:
        """What was measured while the model wrote."""
        shorter = float(np.mean(found.tokens < self.whole.tokens))
        nan = float("nan")
        return self._point(
            name, found, tolerance=None, threshold=nan, stopped=shorter, random=(nan, nan, nan), random_tokens=nan
        )

    def _point(self, name: str, found: Outcomes, **about: Any) -> ExitPoint:
        cheapest = self._cheapest(found)
        budget = self.budgets[int(cheapest[0])]
        tokens, whole = self._means(found.tokens), self._means(self.whole.tokens)
        beside = np.take_along_axis(self._budget_tokens, cheapest[None], axis=0)[0]
        saved = 1 - tokens / beside
        return ExitPoint(
            rule=name,
            accuracy=self.mean(found.right),
            tokens=self.mean(found.tokens, shares=False),
            change=self._difference(found, self.whole),
            saving=self._estimate(1 - tokens / whole),
            budget_saving=self._estimate(saved),
            budget_saving_p=float(permutation_p(0.0, saved[1:], "less")),
            budget_change=self._difference(found, budget),
            **about,
        )

    def _cheapest(self, found: Outcomes) -> Rows:
        """On all traces and on each resample, the number of the cheapest budget that is at least as accurate, (1 + draw,); the most
        accurate one if none is."""
        least = np.minimum(self._means(found.right), self._budget_right.max(axis=0)) - 1e-9
        return np.asarray(np.where(self._budget_right >= least, self._budget_tokens, np.inf).argmin(axis=0))

    @cached_property
    def _budget_right(self) -> Values:
        return np.stack([self._means(one.right) for one in self.budgets])

    @cached_property
    def _budget_tokens(self) -> Values:
        return np.stack([self._means(one.tokens) for one in self.budgets])

    def _means(self, values: Values) -> Values:
        return self._resamples.means(values)

    def _estimate(self, statistics: Values) -> Estimate:
        found = self._resamples.estimate(statistics)
        assert found is not None  # tokens are never all 0: a trace without thinking has no signals
        return found

    def _difference(self, ours: Outcomes, theirs: Outcomes) -> Estimate:
        return difference_estimate(ours.right, theirs.right, verdicts=True, groups=self._groups)

    def _random(self, stops: Sequence[int | None]) -> list[Outcomes]:
        """The shares of the thinking after which the rule stops, given to the traces in random order."""
        rng = np.random.default_rng(self._seed)
        pairs = zip(self._signals, stops, strict=True)
        shares = np.array([np.inf if at is None else one.spent[at] / one.total for one, at in pairs])
        found = []
        for _ in range(self._n_controls):
            drawn = zip(self._signals, rng.permutation(shares), strict=True)
            at = [stopping_place(one.spent / one.total, share) for one, share in drawn]
            found.append(outcomes_at(self._signals, at))
        return found
