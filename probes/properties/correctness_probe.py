"""Will the answer be right? A linear probe at any position of a trace (Reasoning Models Know When They're Right, arXiv 2504.05419)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.progress import working
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import Points, baseline_features, residual_sites
from reasonscope.probes.evaluation.comparison import N_RESAMPLES, Comparison
from reasonscope.probes.evaluation.grouped_folds import trace_groups
from reasonscope.probes.fitting.held_out import compare_binary, held_out_probes
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS
from reasonscope.probes.fitting.positions import Position, has_position, position_name, row_at, states_at
from reasonscope.probes.properties.labels import Label, label_values
from reasonscope.probes.properties.report import (
    NO_TRACES,
    class_shortage,
    not_closed,
    probe_numbers,
    truncation_notes,
    undefined_notes,
)

_BASELINES = ("prompt_length", "bag_of_words", "thinking_length", "elapsed_position", "truncated")
_WHERE = {"prompt": "The state at the end of the prompt", "window": "The state at the end of the thinking"}


@dataclass(frozen=True, kw_only=True)
class _WithinProblem:
    """Of two samples of one problem, one right and one wrong, how often the right one scores higher (ties count half).

    Attributes:
        share: How often; NaN if fewer than two problems have such pairs.
        n_pairs: Number of pairs.
        why_not: Why `share` is NaN.
    """

    share: Estimate
    n_pairs: int
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class CorrectnessReport:
    """What the state at `position` says about the answer, on problems that the probe was not fitted on.

    Attributes:
        position: Where the probe reads.
        comparison: AUROC of the probe and its baselines. `comparison.beats` is the finding.
        within_problem: The same among samples of one problem, which nothing that the problem decides can help with.
        probe: The probe, fitted on all rows.
        sites: The sites that were read.
        by_layer: Held-out AUROC at each of `sites`, (layer,).
        n_traces: Traces that were learned from.
        n_right: How many of them have the right answer.
        n_truncated: How many of them were cut off, and count as wrong.
        n_left_out: Traces without a gold answer or without this position.
        n_groups: Groups of problems.
    """

    position: Position
    comparison: Comparison
    within_problem: _WithinProblem
    probe: LinearProbe
    sites: tuple[Site, ...]
    by_layer: Values
    n_traces: int
    n_right: int
    n_truncated: int
    n_left_out: int
    n_groups: int

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {
            "position": position_name(self.position),
            "comparison": self.comparison.to_dict(),
            "probe": probe_numbers(self.probe),
            "within_problem": {
                **self.within_problem.share.to_dict(),
                "n_pairs": self.within_problem.n_pairs,
                "why_not": self.within_problem.why_not or None,
            },
            "by_site": {str(site): float(score) for site, score in zip(self.sites, self.by_layer, strict=True)},
            "n_traces": self.n_traces,
            "n_right": self.n_right,
            "n_truncated": self.n_truncated,
            "n_left_out": self.n_left_out,
            "n_groups": self.n_groups,
        }

    def summary(self) -> Summary:
        """The finding for people, with the scores of the baselines."""
        share = self.within_problem
        where = _WHERE.get(
            str(self.position),
            f"The state after {position_name(self.position).removeprefix('thinking ')} of the thinking",
        )
        left_out = f"; {self.n_left_out} without a gold answer or this position are left out" if self.n_left_out else ""
        return Summary(
            finding=self.comparison.finding(where, "whether the answer will be right"),
            columns=self.comparison.columns,
            rows=self.comparison.rows(),
            notes=[
                f"{self.n_right} of {self.n_traces} traces have the right answer{left_out}.",
                f"Undefined: the comparison within problems, because {share.why_not}."
                if share.why_not
                else f"Of {share.n_pairs} pairs of a right and a wrong sample of one problem, the right one scores higher in "
                f"{in_hundredths(share.share)} (0.5 is chance).",
                *truncation_notes(
                    self.n_truncated,
                    self.n_traces,
                    "They count as wrong, so the probe may predict the cut; compare it with the baseline `truncated`",
                ),
            ],
        )


@working("correctness probe")
def correctness(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    labels: Label | None = None,
    folds: int = 5,
    seed: int = 0,
    position: Position = "window",
    n_permutations: int = N_PERMUTATIONS,
    n_resamples: int = N_RESAMPLES,
) -> CorrectnessReport:
    """Predict from one position of a trace whether its answer will be right, and compare with what needs no probe.

    Baselines know the prompt's words and length, how long the whole thinking is (even if it is still to come, which is more than the
    probe can know), how much of it has passed, and whether it was cut off.

    Args:
        store: A run with residual sites.
        traces: The traces to learn from; by default all. Those without a gold answer or without the position are left out.
        labels: Right or wrong by a label of yours (as `fit` takes it), which replaces the comparison with gold answers.
        folds: Parts that the problems are split into; layer and penalty are chosen inside each training part.
        seed: Seed of the folds, shuffles and resamples.
        position: "prompt", "window" (the end of the closing tag), or a share of the thinking from 0.0 to 1.0.
        n_permutations: Shuffles of the labels; the smallest p-value is 1 / (n_permutations + 1).
        n_resamples: Resamples of the problems for the intervals.

    Returns:
        The held-out scores, and the probe fitted on all rows.

    Raises:
        InputError: No trace has a gold answer and the position, right or wrong answers are in fewer than `folds` groups, or the run has
            no residual site.

    Reasoning Models Know When They're Right (arXiv 2504.05419).

    Departures: The thinking is not cut into chunks by another model; the fit is not chosen from 216 by its accuracy; problems of one group
        stay together; baselines are shown.

    Example:
        store = TraceStore.open("runs/mine/store")
        report = correctness(store, position=0.5)
        print(report.summary())
    """
    if not store.ids:
        raise InputError(NO_TRACES)
    given = _with_verdicts(list(store) if traces is None else traces, labels)
    judged = _judged(given)
    sites = residual_sites(store)
    chosen = [trace for trace in judged if has_position(trace, position)]
    if not chosen:
        raise InputError(not_closed(judged, "traces with a gold answer"))
    right = np.array([trace.correct is True for trace in chosen])
    targets, groups = right.astype(np.float64), trace_groups(chosen)
    found = {
        f"{name} answers": len(set(np.asarray(groups)[rows])) for name, rows in (("right", right), ("wrong", ~right))
    }
    remedy = "record more problems, easier or harder ones, or several samples of each (--samples)"
    if why_not := class_shortage(found, folds, remedy):
        raise InputError(why_not)
    points = Points(traces=chosen, tokens=[row_at(trace, position) for trace in chosen])
    held = held_out_probes(
        states_at(store, points, sites)[:, :, 0],
        targets,
        np.ones_like(right),
        groups,
        sites,
        model=chosen[0].model,
        provenance={"target": "correctness", "position": position},
        n_permutations=n_permutations,
        folds=folds,
        seed=seed,
    )
    baselines = baseline_features(points, store, _BASELINES)
    problems = [trace.problem.id for trace in chosen]
    return CorrectnessReport(
        position=position,
        comparison=compare_binary(
            targets,
            held,
            range(len(chosen)),
            baselines,
            groups,
            problems=problems,
            n_resamples=n_resamples,
            folds=folds,
            seed=seed,
        ),
        within_problem=within_problem(right, held.scores, problems, n_resamples=n_resamples, seed=seed),
        probe=held.final,
        sites=tuple(sites),
        by_layer=held.by_layer,
        n_traces=len(chosen),
        n_right=int(right.sum()),
        n_truncated=sum(trace.state == "truncated" for trace in chosen),
        n_left_out=len(given) - len(chosen),
        n_groups=len(set(groups)),
    )


def positions_summary(reports: Sequence[CorrectnessReport], undefined: Mapping[str, str]) -> Summary:
    """The finding at the last of several positions, with the score at each of them.

    `undefined` says for each position that could not be measured why.
    """
    last = reports[-1].summary()
    rows = [
        (f"probe, {position_name(one.position)}", in_hundredths(one.comparison.score), str(one.comparison.n_problems))
        for one in reports
    ]
    return replace(last, rows=[*rows, *last.rows[1:]], notes=[*last.notes, *undefined_notes(undefined)])


def _with_verdicts(traces: Sequence[Trace], labels: Label | None) -> Sequence[Trace]:
    """The traces, right or wrong as `labels` say; a trace without a label is neither. Raises InputError for other labels."""
    if labels is None:
        return traces
    name, values = label_values(labels, traces)
    return [replace(t, correct=None if v is None else _right(name, t, v)) for t, v in zip(traces, values, strict=True)]


def _right(name: str, trace: Trace, value: Any) -> bool:
    if (word := str(value).strip().lower()) in ("right", "correct", "true", "yes", "1", "1.0"):
        return True
    if word in ("wrong", "incorrect", "false", "no", "0", "0.0"):
        return False
    raise InputError(f"trace {trace.id!r} has {name} = {value!r:.60}; write right or wrong, true or false, or 1 or 0")


def _judged(traces: Sequence[Trace]) -> list[Trace]:
    """Those of `traces` that have a gold answer. Raises InputError if none has."""
    judged = [trace for trace in traces if trace.correct is not None]
    if not judged:
        raise InputError(
            f"none of the {len(traces)} traces has a gold answer, so nothing says whether it is right; record problems with one "
            '(reasonscope record --problems ledger --n 240 --out RUN, or a problem file whose lines have an "answer")'
        )
    return judged


def within_problem(
    right: NDArray[np.bool_], scores: Values, problems: Sequence[str], *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> _WithinProblem:
    """Compare only samples of the same problem, so that nothing that the problem decides can help; intervals resample problems."""
    wins, owners = [], []
    for problem in sorted(set(problems)):
        own = np.asarray(problems) == problem
        pairs = np.sign(scores[own & right][:, None] - scores[own & ~right][None, :]).ravel()
        wins += (pairs / 2 + 0.5).tolist()
        owners += [problem] * len(pairs)
    if len(set(owners)) < 2:
        nothing = Estimate(value=np.nan, low=np.nan, high=np.nan)
        why_not = (
            f"{'only one' if owners else 'no'} problem has both a right and a wrong sample; "
            "record several samples of each problem (--samples)"
        )
        return _WithinProblem(share=nothing, n_pairs=len(wins), why_not=why_not)
    values = np.array(wins)
    share = resample_groups(lambda rows: float(values[rows].mean()), owners, n_resamples=n_resamples, seed=seed)
    return _WithinProblem(share=share, n_pairs=len(wins))
