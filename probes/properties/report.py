"""What the reports of all four probes have in common: one comparison, one probe, numbers for JSON, and a summary for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths, in_percent
from reasonscope.data.trace import Trace
from reasonscope.probes.evaluation.comparison import Comparison
from reasonscope.probes.evaluation.grouped_folds import other_folds
from reasonscope.probes.fitting.linear_probes import FittedProbe, LinearProbe

NO_TRACES = "the run has no traces to learn from; record some: reasonscope record --problems ledger --n 240 --out RUN"
_MANY = 0.1  # from this share of cut-off traces on, a reader is warned


class ProbeReport(Protocol):
    """What `length`, `remaining`, `refusal` and `correctness` return, so that code can treat the four alike.

    Attributes:
        comparison: The held-out score of the probe beside its baselines and shuffled labels.
        probe: The probe, fitted on all rows.
        n_groups: Groups of problems that the intervals resample.

    Example:
        for measure in (probes.length, probes.remaining, probes.correctness):
            report = measure(store)
            print(report.summary())
    """

    @property
    def comparison(self) -> Comparison: ...
    @property
    def probe(self) -> LinearProbe: ...
    @property
    def n_groups(self) -> int: ...

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON; an interval is {"value", "low", "high"}."""

    def summary(self) -> Summary:
        """The finding for people."""


def probe_numbers(probe: FittedProbe) -> dict[str, str]:
    """What a probe is, for JSON, without its coefficients."""
    return {"site": str(probe.site), "task": probe.task, "method": probe.method}


def truncation_notes(n_truncated: int, n_traces: int, consequence: str) -> list[str]:
    """A warning if many of the traces were cut off at the token limit, else nothing."""
    if not n_traces or n_truncated / n_traces < _MANY:
        return []
    cut = f"{n_truncated} of {n_traces} traces ({in_percent(n_truncated / n_traces)}) were cut off at the token limit"
    return [f"Warning: {cut}. {consequence}; record again with a larger --max-new-tokens to be sure."]


def censored_notes(comparison: Comparison) -> list[str]:
    """The metrics of predicted lengths beside the rank correlation."""
    concordance, r2_log = (in_hundredths(comparison.metrics[name]) for name in ("concordance", "r2_log"))
    return [f"Concordance {concordance} (0.5 is chance), R² of log(1 + tokens) {r2_log}."]


def undefined_notes(undefined: Mapping[str, str]) -> list[str]:
    """One line for each number that could not be computed, and why."""
    return [f"Undefined: {name.replace('_', ' ')}, because {why}." for name, why in undefined.items()]


def traces_with_thinking(store: TraceStore) -> list[Trace]:
    """The traces of a run that have a thinking block. Raises InputError if none has."""
    traces = list(store)
    found = [trace for trace in traces if trace.state != "absent"]
    if not found:
        raise InputError(without_thinking(traces))
    return found


def without_thinking(traces: Sequence[Trace]) -> str:
    """Why nothing in `traces` can be predicted, and what to do."""
    if not traces:
        return NO_TRACES
    return (
        f"none of the {len(traces)} traces has thinking, so nothing can be predicted; "
        "record a model that thinks before it answers, without --no-think and --thinking none"
    )


def not_closed(traces: Sequence[Trace], noun: str) -> str:
    """Why none of `traces` reaches an answer after its thinking, and what to do."""
    states = Counter(trace.state for trace in traces)
    without = states["absent"] + states["empty"]
    reasons = {
        "were cut off at the token limit": states["truncated"],
        "have no thinking": without,
        "end with their thinking": states["closed"],
    }
    counted = ", ".join(f"{n} {why}" for why, n in reasons.items() if n)
    remedy = (
        "record a model that thinks before it answers, without --no-think"
        if without > len(traces) / 2
        else "record again with a larger --max-new-tokens"
    )
    return f"none of the {len(traces)} {noun} has closed thinking and an answer ({counted}); {remedy}"


def class_shortage(groups: Mapping[str, int], folds: int, remedy: str) -> str:
    """Why two classes, each with the number of groups of problems that have it, are too few for `folds`; empty if they are enough."""
    if all(n >= folds for n in groups.values()):
        return ""
    counts = " and ".join(f"the {name} in {n}" for name, n in groups.items())
    fewer = other_folds(min(groups.values()), folds)
    return f"a probe needs each class in at least {folds} groups of problems, but has {counts}; {remedy}{fewer}"
