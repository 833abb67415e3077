"""Rules that end the thinking at a place: each reads one number per place, and stops at the first that reaches a threshold."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.text.answers import equivalent
from reasonscope.steering.exits.signals import PlaceSignals

BUDGET = "fixed budget"
PROBE = "probe"


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """A rule.

    Attributes:
        name: Its name.
        unit: What its threshold counts.
        statistic: The number that it compares at each place, (place,); it never stops at NaN. The number at a place depends on nothing
            after it, so that a model that writes and a finished trace have the same.
        tries: At which places it forces an answer to decide, (place,), whose tokens it pays for; None if at none.
        passes: Whether it needs a pass of its own at each place, for the likeliest next tokens.
    """

    name: str
    unit: str
    statistic: Callable[[PlaceSignals], Values]
    tries: Callable[[PlaceSignals], NDArray[np.bool_]] | None = None
    passes: bool = False


def stopping_place(statistic: Values, threshold: float) -> int | None:
    """The first place at which the number reaches the threshold; None if the thinking runs to its end."""
    reached = np.flatnonzero(statistic >= threshold)  # NaN never does
    return int(reached[0]) if len(reached) else None


def _repeats(signals: PlaceSignals) -> Values:
    """How many forced answers in a row, up to each place, are the same; 0 without an answer."""
    counts: list[float] = []
    for i, answer in enumerate(signals.answers):
        before = signals.answers[i - 1] if i else None
        same = answer is not None and before is not None and equivalent(answer, before)
        counts.append(0.0 if answer is None else counts[-1] + 1 if same else 1.0)
    return np.array(counts)


def _at_transitions(signals: PlaceSignals) -> Values:
    return np.where(signals.transition, signals.confidence, np.nan)


def _everywhere(signals: PlaceSignals) -> NDArray[np.bool_]:
    return np.ones(len(signals.spent), dtype=bool)


RULES: tuple[ExitRule, ...] = (
    ExitRule(name=PROBE, unit="score", statistic=lambda one: one.score),
    ExitRule(  # DEER, arXiv 2504.15895
        name="confidence before a doubt",
        unit="probability",
        statistic=_at_transitions,
        tries=lambda one: one.transition,
        passes=True,
    ),
    ExitRule(
        name="closing margin", unit="−nats", statistic=lambda one: -one.margin, passes=True
    ),  # ThinkBrake, arXiv 2510.00546
    ExitRule(name="stable answers", unit="answers", statistic=_repeats, tries=_everywhere),
    ExitRule(  # First Try Matters, arXiv 2510.08308
        name="stated answers", unit="answers", statistic=lambda one: one.candidates.astype(np.float64)
    ),
    ExitRule(name="random stops", unit="draw", statistic=lambda one: one.draw),
)
FIXED_BUDGET = ExitRule(name=BUDGET, unit="tokens", statistic=lambda one: one.spent.astype(np.float64))


def rule_named(name: str) -> ExitRule:
    """The rule of that name, with spaces or hyphens. Raises InputError for any other."""
    known = {rule.name: rule for rule in (*RULES, FIXED_BUDGET)}
    if (found := known.get(name.replace("-", " "))) is None:
        raise InputError(f"no exit rule is called {name!r}; choose from {', '.join(known)}")
    return found


def slug(name: str) -> str:
    """The name of a rule in the name of a file."""
    return name.replace(" ", "-")
