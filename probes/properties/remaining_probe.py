"""How much thinking is left? Tokens remaining, read at positions all along the thinking, against the position alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import BASELINES, Points, residual_sites
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap, difference_to_best, spearman, trace_groups
from reasonscope.probes.evaluation.metrics import r2_log, spearman_within
from reasonscope.probes.fitting.censoring import concordance_index
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import states_at
from reasonscope.probes.fitting.sweep import sweep
from reasonscope.probes.properties.length_probe import varying_baseline

_BASELINES = ("elapsed_position", "prompt_length", "bag_of_words")


@dataclass(frozen=True, kw_only=True)
class RemainingReport:
    """How well the thinking tokens that are left are predicted from one state, on held-out problems.

    A row is a position of a trace: `token` (row,) its index, `elapsed` (row,) the tokens written before the next one. `predicted` and
    `true` (row,) in tokens. `difference` is to the best of `baselines`. `within_position` is the Spearman correlation among rows that
    have come equally far (`elapsed` in ten bins of equal mass), where the position says next to nothing. The rows of `n_truncated`
    traces stay in with what was counted, and `concordance` knows. `layer` (fold,); `probe` scores log(1 + tokens remaining).
    """

    spearman: Estimate
    baselines: Mapping[str, Estimate]
    difference: Estimate
    within_position: Estimate
    concordance: Estimate
    r2_log: Estimate
    n_groups: int
    n_truncated: int
    traces: tuple[str, ...]
    token: Rows
    elapsed: Values
    predicted: Values
    true: Values
    layer: tuple[Site, ...]
    probe: LinearProbe


def remaining(
    store: TraceStore, traces: Sequence[Trace] | None = None, *, per_trace: int = 8, folds: int = 5, seed: int = 0
) -> RemainingReport:
    """Ridge on log(1 + thinking tokens remaining) at `per_trace` positions of each trace, spread evenly over its thinking.

    One probe serves all positions. Layer and penalty are chosen inside the fold, groups are kept together. Every trace weighs the
    same as long as its thinking has `per_trace` tokens. Raises InputError as `length` does.
    """
    if traces is None:
        traces = [trace for trace in store if trace.n_thinking_tokens > 0]
    sites = residual_sites(store)
    points = thinking_points(traces, per_trace=per_trace)
    groups = trace_groups(points.traces)
    pairs = list(zip(points.traces, points.tokens, strict=True))
    true = np.array([trace.tokens.thinking.stop - 1 - token for trace, token in pairs], dtype=np.float64)
    elapsed = np.array([token + 1 - trace.n_prompt_tokens for trace, token in pairs], dtype=np.float64)
    truncated = np.array([trace.state == "truncated" for trace in points.traces])
    swept = sweep(states_at(store, points, sites), np.log1p(true), groups, task="regression", folds=folds, seed=seed)
    predicted = np.maximum(np.expm1(swept.predictions), 0.0)
    weaker = {
        name: varying_baseline(BASELINES[name](points), true, groups, folds=folds, seed=seed) for name in _BASELINES
    }
    bins = np.searchsorted(np.quantile(elapsed, np.linspace(0, 1, 11)[1:-1]), elapsed)

    def within(rows: Rows) -> float:
        return spearman_within(true[rows], predicted[rows], bins[rows].tolist())

    def concordance(rows: Rows) -> float:
        return concordance_index(true[rows], truncated[rows], predicted[rows])

    return RemainingReport(
        spearman=cluster_bootstrap(spearman, true, predicted, groups, seed=seed),
        baselines={
            name: cluster_bootstrap(spearman, true, values, groups, seed=seed) for name, values in weaker.items()
        },
        difference=difference_to_best(spearman, true, predicted, weaker, groups, seed=seed),
        within_position=resample_groups(within, groups, n_resamples=200, seed=seed),
        concordance=resample_groups(concordance, groups, n_resamples=50, seed=seed),
        r2_log=cluster_bootstrap(r2_log, true, predicted, groups, seed=seed),
        n_groups=len(set(groups)),
        n_truncated=sum(trace.state == "truncated" for trace in traces),
        traces=tuple(trace.id for trace in points.traces),
        token=np.asarray(points.tokens, dtype=np.intp),
        elapsed=elapsed,
        predicted=predicted,
        true=true,
        layer=tuple(sites[choice.layer] for choice in swept.chosen),
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
                "seed": seed,
            },
        ),
    )


def thinking_points(traces: Sequence[Trace], *, per_trace: int) -> Points:
    """Up to `per_trace` tokens of each thinking, spread evenly and the same each time. Raises InputError where one has no token."""
    if not traces or per_trace < 1:
        raise InputError(f"{per_trace} positions of each of {len(traces)} traces; ask for at least one of each")
    chosen: list[tuple[Trace, int]] = []
    for trace in traces:
        span = trace.tokens.thinking
        last = min(span.stop, len(trace.token_ids) - 1)  # the last token of a trace was never fed, so it has no state
        if last <= span.start:
            raise InputError(f"trace {trace.id!r} has no thinking token that was fed; leave it out, and say so")
        places = np.unique(np.linspace(span.start, last - 1, per_trace).astype(int))
        chosen += [(trace, int(token)) for token in places]
    return Points(traces=[trace for trace, _ in chosen], tokens=[token for _, token in chosen])
