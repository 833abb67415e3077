"""Will the answer be right? A linear probe at any position of a trace (Reasoning Models Know When They're Right, arXiv 2504.05419)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import Points, residual_sites
from reasonscope.probes.evaluation.grouped_folds import trace_groups
from reasonscope.probes.fitting.held_out import Comparison, baseline_features, compared, held_out_probes
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import Position, has_position, row_at, states_at

_BASELINES = ("prompt_length", "bag_of_words", "thinking_length", "elapsed_position", "truncated")


@dataclass(frozen=True, kw_only=True)
class WithinProblem:
    """Of two samples of one problem, one right and one wrong: how often the right one scores higher (ties half).

    NaN, and `why_not` says why, where there are no such pairs in two problems or more.
    """

    share: Estimate
    n_pairs: int
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class CorrectnessReport:
    """What the state at `position` says of the answer, on problems that the probe did not learn from.

    `comparison.beats` is the finding: whether the interval of the difference to the best baseline lies above 0.
    `by_layer` (layer,) is the held-out AUROC at each of `sites`. Of all traces, `n_left_out` have no gold answer or no such position;
    `n_truncated` of the others are wrong because they were cut off.
    """

    position: Position
    comparison: Comparison
    within_problem: WithinProblem
    probe: LinearProbe
    sites: tuple[Site, ...]
    by_layer: Values
    n_traces: int
    n_right: int
    n_truncated: int
    n_left_out: int
    n_groups: int


def correctness(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    position: Position = "window",
    folds: int = 5,
    seed: int = 0,
) -> CorrectnessReport:
    """Fit and evaluate on those of `traces` that have a gold answer and the position, folds keeping a problem's samples together.

    The baselines know the prompt's words and length, how long the whole thinking is (also where that is still to come, which is
    more than the probe can know), how much of it has passed, and whether it was cut off. Departures from the paper: no chunking by
    another model, no choice among 216 fits by accuracy, groups, and the baselines. Raises InputError for one class only, a class
    in fewer problems than folds, or a run without `resid_post`.
    """
    if traces is None:
        traces = list(store)
    chosen = [trace for trace in traces if trace.correct is not None and has_position(trace, position)]
    if not chosen:
        raise InputError(
            f"none of {len(traces)} traces has a gold answer and the position {position}; record such ones"
        )
    points = Points(traces=chosen, tokens=[row_at(trace, position) for trace in chosen])
    sites = residual_sites(store)
    right = np.array([trace.correct is True for trace in chosen])
    targets, groups = right.astype(np.float64), trace_groups(chosen)
    held = held_out_probes(
        states_at(store, points, sites)[:, :, 0],
        targets,
        np.ones_like(right),
        groups,
        sites,
        model=chosen[0].model,
        provenance={"target": "correctness", "position": position},
        folds=folds,
        seed=seed,
    )
    baselines = baseline_features(points, store, _BASELINES)
    return CorrectnessReport(
        position=position,
        comparison=compared(targets, held, range(len(chosen)), baselines, groups, folds=folds, seed=seed),
        within_problem=within_problem(right, held.scores, [trace.problem.id for trace in chosen], seed=seed),
        probe=held.final,
        sites=tuple(sites),
        by_layer=held.by_layer,
        n_traces=len(chosen),
        n_right=int(right.sum()),
        n_truncated=sum(trace.state == "truncated" for trace in chosen),
        n_left_out=len(traces) - len(chosen),
        n_groups=len(set(groups)),
    )


def within_problem(
    right: NDArray[np.bool_], scores: Values, problems: Sequence[str], *, seed: int = 0
) -> WithinProblem:
    """Compare samples of the same problem only, so that nothing that the problem decides can help: (row,) each."""
    wins, owners = [], []
    for problem in sorted(set(problems)):
        own = np.asarray(problems) == problem
        pairs = np.sign(scores[own & right][:, None] - scores[own & ~right][None, :]).ravel()
        wins += (pairs / 2 + 0.5).tolist()
        owners += [problem] * len(pairs)
    if len(set(owners)) < 2:
        nothing = Estimate(value=np.nan, low=np.nan, high=np.nan)
        why_not = (
            f"{len(set(owners))} problems have both a right and a wrong sample; record several samples of each problem"
        )
        return WithinProblem(share=nothing, n_pairs=len(wins), why_not=why_not)
    values = np.array(wins)
    share = resample_groups(lambda rows: float(values[rows].mean()), owners, seed=seed)
    return WithinProblem(share=share, n_pairs=len(wins))
