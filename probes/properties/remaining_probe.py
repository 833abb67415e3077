"""How much thinking is left? A linear probe at positions all along the thinking, compared with what the position alone says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.progress import working
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths, plural
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import Points, baseline_features, residual_sites
from reasonscope.probes.evaluation.comparison import N_RESAMPLES, Comparison, compare
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap, trace_groups
from reasonscope.probes.evaluation.metrics import r2_log, spearman_within
from reasonscope.probes.fitting.censoring import concordance_index
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS, permuted_sweep
from reasonscope.probes.fitting.positions import states_at
from reasonscope.probes.fitting.sweep import sweep
from reasonscope.probes.properties.length_probe import token_predictions
from reasonscope.probes.properties.report import censored_notes, probe_numbers, truncation_notes, without_thinking

_BASELINES = ("elapsed_position", "prompt_length", "bag_of_words")


@dataclass(frozen=True, kw_only=True)
class RemainingReport:
    """How well the number of thinking tokens that are left is predicted from one state, on held-out problems.

    A row is a position in a trace.

    Attributes:
        comparison: Spearman correlation of the probe and its baselines with the tokens that are left. `metrics` has R² of
            log(1 + tokens) (`r2_log`) and Harrell's `concordance` (0.5 is chance), which knows that cut-off traces are longer.
            Shuffled labels come from the same place in another trace, so they keep what the position says.
        probe: The probe, fitted on all rows; its scores are log(1 + tokens that are left).
        within_position: Spearman correlation among rows that have come equally far (`elapsed` in ten bins of equal mass), where the
            position says next to nothing.
        n_groups: Groups of problems.
        n_traces: Traces that were learned from.
        n_truncated: Traces that ended at the token limit; their rows stay in with what was counted.
        traces: The trace of each row, (row,).
        token: The index of each row's token in its trace, (row,).
        elapsed: Tokens written up to this one, (row,).
        predicted: Held-out predictions in tokens, (row,).
        true: Thinking tokens that are left, (row,).
        layer: The site that each fold chose, (fold,).
    """

    comparison: Comparison
    probe: LinearProbe
    within_position: Estimate
    n_groups: int
    n_traces: int
    n_truncated: int
    traces: tuple[str, ...]
    token: Rows
    elapsed: Values
    predicted: Values
    true: Values
    layer: tuple[Site, ...]

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {
            "comparison": self.comparison.to_dict(),
            "probe": probe_numbers(self.probe),
            "within_position": self.within_position.to_dict(),
            "chosen_sites": [str(site) for site in self.layer],
            "n_rows": len(self.true),
            "n_groups": self.n_groups,
            "n_traces": self.n_traces,
            "n_truncated": self.n_truncated,
        }

    def summary(self) -> Summary:
        """The finding for people, with the scores of the baselines."""
        return Summary(
            finding=self.comparison.finding("The state at a thinking token", "how much thinking is left"),
            columns=self.comparison.columns,
            rows=self.comparison.rows(),
            notes=[
                f"{len(self.true)} positions in {plural(self.n_traces, 'trace')}.",
                f"Among positions that have come equally far: Spearman {in_hundredths(self.within_position)}.",
                *censored_notes(self.comparison),
                *truncation_notes(
                    self.n_truncated,
                    self.n_traces,
                    "What is left of them counts up to the limit, and only the concordance knows that it is more",
                ),
            ],
        )


@working("remaining probe")
def remaining(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    per_trace: int = 8,
    n_permutations: int = N_PERMUTATIONS,
    n_resamples: int = N_RESAMPLES,
) -> RemainingReport:
    """Predict at positions all along the thinking how much of it is left, and compare with what the position alone says.

    One probe serves all positions: ridge on log(1 + thinking tokens that are left). Every trace has the same weight.

    Args:
        store: A run with residual sites.
        traces: The traces to learn from; by default all with a thinking token that was read.
        folds: Parts that the problems are split into; layer and penalty are chosen inside each training part.
        seed: Seed of the folds, shuffles and resamples.
        per_trace: Positions per trace, spread evenly over its thinking, of which shorter thinking repeats some.
        n_permutations: Shuffles of the labels; the smallest p-value is 1 / (n_permutations + 1).
        n_resamples: Resamples of the problems for the intervals.

    Returns:
        The held-out scores, and the probe fitted on all rows.

    Raises:
        InputError: A trace has no thinking, the run has no residual site, a problem is in two groups, there are fewer groups than
            folds, or an activation is not finite.

    Example:
        store = TraceStore.open("runs/mine/store")
        report = remaining(store, per_trace=8)
        print(report.comparison.score, report.within_position)
    """
    if traces is None:
        traces = with_read_thinking(list(store))
    sites = residual_sites(store)
    points = _thinking_points(traces, per_trace=per_trace)
    groups = trace_groups(points.traces)
    pairs = list(zip(points.traces, points.tokens, strict=True))
    true = np.array([(trace.thinking_positions > token).sum() for trace, token in pairs], dtype=np.float64)
    elapsed = np.array([token + 1 - trace.n_prompt_tokens for trace, token in pairs], dtype=np.float64)
    truncated = np.array([trace.state == "truncated" for trace in points.traces])
    states = states_at(store, points, sites)
    swept = sweep(states, np.log1p(true), groups, task="regression", folds=folds, seed=seed)
    predicted = np.maximum(np.expm1(swept.predictions), 0.0)
    bins = np.searchsorted(np.quantile(elapsed, np.linspace(0, 1, 11)[1:-1]), elapsed)

    def within(rows: Rows) -> float:
        return spearman_within(true[rows], predicted[rows], bins[rows].tolist())

    def concordance(rows: Rows) -> float:
        return concordance_index(true[rows], truncated[rows], predicted[rows])

    baselines = baseline_features(points, store, _BASELINES)
    return RemainingReport(
        comparison=compare(
            "Spearman",
            true,
            predicted,
            token_predictions(baselines, true, groups, folds=folds, seed=seed),
            groups,
            problems=[trace.problem.id for trace in points.traces],
            shuffled=permuted_sweep(
                states,
                np.log1p(true),
                groups,
                task="regression",
                n_permutations=n_permutations,
                folds=folds,
                seed=seed,
            ),
            metrics={
                "concordance": resample_groups(concordance, groups, n_resamples=min(n_resamples, 50), seed=seed),
                "r2_log": cluster_bootstrap(r2_log, true, predicted, groups, n_resamples=n_resamples, seed=seed),
            },
            n_resamples=n_resamples,
            seed=seed,
        ),
        probe=LinearProbe(
            coef=swept.coef,
            intercept=swept.intercept,
            site=sites[swept.final.layer],
            task="regression",
            method="ridge",
            model=traces[0].model,
            provenance={
                "target": "log(1 + thinking tokens remaining)",
                "position": "thinking",
                "penalty": swept.final.penalty,
                "rows": len(true),
                "groups": len(set(groups)),
                "learned_from": sorted(set(groups)),
                "seed": seed,
            },
        ),
        within_position=resample_groups(within, groups, n_resamples=min(n_resamples, 200), seed=seed),
        n_groups=len(set(groups)),
        n_traces=len(traces),
        n_truncated=sum(trace.state == "truncated" for trace in traces),
        traces=tuple(trace.id for trace in points.traces),
        token=np.asarray(points.tokens, dtype=np.intp),
        elapsed=elapsed,
        predicted=predicted,
        true=true,
        layer=tuple(sites[choice.layer] for choice in swept.chosen),
    )


def with_read_thinking(traces: Sequence[Trace]) -> list[Trace]:
    """Those of `traces` that have a thinking token with a state. Raises InputError if none has."""
    found = [trace for trace in traces if len(_read_thinking(trace))]
    if not found:
        raise InputError(without_thinking(traces))
    return found


def _thinking_points(traces: Sequence[Trace], *, per_trace: int) -> Points:
    """`per_trace` tokens of each thinking, spread evenly and the same each time; shorter thinking repeats some.

    So every trace has as many rows, and shuffles exchange whole traces: if short traces had fewer rows, the number of rows would tell what
    is left. Raises InputError if a trace has no such token.
    """
    if not traces:
        raise InputError(without_thinking(traces))
    if per_trace < 1:
        raise InputError(f"{per_trace} positions per trace; ask for at least one")
    chosen: list[tuple[Trace, int]] = []
    for trace in traces:
        read = _read_thinking(trace)
        if not len(read):
            raise InputError(
                f"trace {trace.id!r} has no thinking token with a state (its last token was never read by the model); "
                "leave it out, or let `remaining` choose the traces"
            )
        places = read[np.linspace(0, len(read) - 1, per_trace).astype(int)]
        chosen += [(trace, int(token)) for token in places]
    return Points(traces=[trace for trace, _ in chosen], tokens=[token for _, token in chosen])


def _read_thinking(trace: Trace) -> NDArray[np.int64]:
    """The thinking tokens that the model read; it never read the last token of a trace, which therefore has no state."""
    return trace.thinking_positions[trace.thinking_positions < len(trace.token_ids) - 1]
