"""How long will it think? A linear probe on the last prompt token (On Reasoning Strength Planning, arXiv 2506.08390)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import (
    BASELINES,
    Features,
    Points,
    embedding,
    residual_sites,
)
from reasonscope.probes.evaluation.baselines import baseline_predictions as predictions_from
from reasonscope.probes.evaluation.conformal import ResidualBand, residual_band
from reasonscope.probes.evaluation.grouped_folds import (
    cluster_bootstrap,
    difference_to_best,
    grouped_predictions,
    spearman,
    trace_groups,
)
from reasonscope.probes.evaluation.metrics import r2, r2_log, spearman_within
from reasonscope.probes.evaluation.permutation_null import Null, permutation_null
from reasonscope.probes.fitting.censoring import Mask, concordance_index
from reasonscope.probes.fitting.linear_probes import LinearProbe, RidgeProbe
from reasonscope.probes.fitting.positions import states_at
from reasonscope.probes.fitting.sweep import SweepResult, sweep

# What the prompt's text says without a model; the difference is to the best of these.
TEXT_BASELINES = ("prompt_length", "bag_of_words")


@dataclass(frozen=True, kw_only=True)
class LengthData:
    """What the probe learns from, one row a prompt; its rollouts are averaged, for their first state is the same.

    `features` (row, layer, 1, d_model) at the last prompt token, layers as in `sites`. `tokens` (row,): mean thinking tokens of the
    prompt's rollouts. `truncated` (row,): one of them was cut off, so the mean is too low. `traces` (row,): the first of them.
    `between_share`: the share of the variance of log(1 + tokens) that lies between prompts, the most that R² on it can be for
    single rollouts; None where no prompt has two.
    """

    features: NDArray[np.float32]
    tokens: Values
    truncated: Mask
    groups: tuple[str, ...]
    sites: tuple[Site, ...]
    traces: tuple[Trace, ...]
    n_truncated: int
    between_share: float | None


@dataclass(frozen=True, kw_only=True)
class LengthForecast:
    """Thinking tokens of new prompts, and the ends of the interval, each (…)."""

    tokens: Values
    low: Values
    high: Values


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """How well thinking tokens are predicted before the first of them, on held-out problems.

    `spearman` is of the probe; `baselines` the same for what needs no trained probe; `difference` is to the best of `TEXT_BASELINES`.
    `predicted` and `true` (row,) in tokens, rows as in `LengthData`. `n_truncated` traces ended at the token limit: their true length is
    longer than what is counted; they stay in, and `concordance` is Harrell's C, which knows (0.5 is chance). `within_difficulty`
    and `within_dataset` are Spearman correlations inside each difficulty or data set, None where none is stated. `r2_log` is on
    log(1 + tokens). `shuffled`: Spearman at the final layer and penalty on lengths that problems exchanged. `layer` (fold,): the site
    that each fold chose. `probe` is fitted on all rows, its scores are log(1 + tokens).
    """

    spearman: Estimate
    baselines: Mapping[str, Estimate]
    difference: Estimate
    shuffled: Null
    within_difficulty: Estimate | None
    within_dataset: Estimate | None
    concordance: Estimate
    r2_log: Estimate
    r2: Estimate
    between_share: float | None
    n_groups: int
    n_truncated: int
    predicted: Values
    true: Values
    layer: tuple[Site, ...]
    probe: LinearProbe
    band: ResidualBand

    def forecast(self, activations: ArrayLike) -> LengthForecast:
        """Of states (…, d_model) of `probe.site` at the last prompt token. The interval covers `band.coverage` of new problems."""
        return forecast(self.probe, activations)


def length(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    seed: int = 0,
    folds: int = 5,
    coverage: float = 0.9,
    datasets: Sequence[str] | None = None,
) -> LengthReport:
    """Fit and evaluate on `traces` of a run with residual sites: ridge on log(1 + thinking tokens), groups kept together.

    The state is that of the last prompt token, which opens the thinking. `datasets` (trace,) names the data set of each trace.
    Departures from the paper: log target, standardised features, ridge for lasso, penalty and layer chosen inside the fold, groups,
    and the baselines. Raises InputError where a trace has no thinking, where the run holds no residual site, where one problem is in
    two groups, for fewer groups than folds and for activations that are not finite.
    """
    if traces is None:
        traces = [trace for trace in store if trace.state != "absent"]
    data = length_data(store, traces)
    swept = sweep(data.features, np.log1p(data.tokens), data.groups, task="regression", folds=folds, seed=seed)
    predicted = _tokens(swept.predictions)
    weaker = _baselines(store, data, folds=folds, seed=seed)
    strata = {id(trace): name for trace, name in zip(traces, datasets, strict=True)} if datasets is not None else {}

    band = residual_band(np.log1p(data.tokens) - swept.predictions, data.truncated, data.groups, coverage=coverage)

    def judged(metric: Any, values: Values = predicted) -> Estimate:
        return cluster_bootstrap(metric, data.tokens, values, data.groups, seed=seed)

    def concordance(rows: NDArray[np.intp]) -> float:
        return concordance_index(data.tokens[rows], data.truncated[rows], predicted[rows])

    def judge(lengths: Values) -> float:
        again = RidgeProbe(swept.final.penalty, standardise=True)
        states = data.features[:, swept.final.layer, 0]
        return spearman(
            lengths, grouped_predictions(again, states, np.log1p(lengths), data.groups, folds=folds, seed=seed)
        )

    return LengthReport(
        spearman=judged(spearman),
        baselines={name: judged(spearman, values) for name, values in weaker.items()},
        difference=difference_to_best(
            spearman, data.tokens, predicted, {name: weaker[name] for name in TEXT_BASELINES}, data.groups, seed=seed
        ),
        shuffled=permutation_null(judge, data.tokens, data.groups, within=False, n_permutations=20, seed=seed),
        within_difficulty=_within(data, predicted, [trace.problem.difficulty for trace in data.traces], seed),
        within_dataset=_within(data, predicted, [strata.get(id(trace)) for trace in data.traces], seed),
        concordance=resample_groups(concordance, data.groups, n_resamples=200, seed=seed),
        r2_log=judged(r2_log),
        r2=judged(r2),
        between_share=data.between_share,
        n_groups=len(set(data.groups)),
        n_truncated=data.n_truncated,
        predicted=predicted,
        true=data.tokens,
        layer=tuple(data.sites[choice.layer] for choice in swept.chosen),
        probe=_kept(swept, data, band, seed),
        band=band,
    )


def forecast(probe: LinearProbe, activations: ArrayLike) -> LengthForecast:
    """What a probe of `length` says, kept or loaded, of states (…, d_model) of its site at the last prompt token.

    Raises InputError for a probe that does not know how wrong it can be.
    """
    band = probe.provenance.get("interval")
    if band is None:
        raise InputError("this probe tells no lengths; take the one that `reasonscope probe length` keeps")
    scores = probe.scores(activations)
    low, high = (np.inf * sign if end is None else end for sign, end in zip((-1, 1), band["log"], strict=True))
    return LengthForecast(tokens=_tokens(scores), low=_tokens(scores + low), high=_tokens(scores + high))


def length_data(store: TraceStore, traces: Sequence[Trace]) -> LengthData:
    """The states and the lengths of `traces`. Raises InputError where a trace has no thinking, or the run holds no residual site."""
    sites = residual_sites(store)
    if not traces:
        raise InputError("no trace to learn from; give the traces of a run")
    for trace in traces:
        if trace.state == "absent":
            raise InputError(f"trace {trace.id!r} has no thinking, so it has no length to predict")
    trace_groups(traces)
    asked: dict[tuple[str, bytes], list[Trace]] = {}
    for trace in traces:
        prompt = trace.token_ids[: trace.n_prompt_tokens].tobytes()
        asked.setdefault((trace.problem.id, prompt), []).append(trace)
    rollouts = list(asked.values())
    first = tuple(traces[0] for traces in rollouts)
    return LengthData(
        features=states_at(store, Points.last_prompt_tokens(first), sites),
        tokens=np.array([np.mean([trace.n_thinking_tokens for trace in traces]) for traces in rollouts]),
        truncated=np.array([any(trace.state == "truncated" for trace in traces) for traces in rollouts]),
        groups=tuple(trace.problem.group for trace in first),
        sites=tuple(sites),
        traces=first,
        n_truncated=sum(trace.state == "truncated" for trace in traces),
        between_share=_between_share(rollouts),
    )


def baseline_predictions(traces: Sequence[Trace], *, folds: int = 5, seed: int = 0) -> dict[str, Values]:
    """Held-out predictions of thinking tokens, (trace,), by each of `TEXT_BASELINES`: no model is needed."""
    points, groups = Points.last_prompt_tokens(traces), trace_groups(traces)
    tokens = np.array([trace.n_thinking_tokens for trace in traces], dtype=np.float64)
    return {
        name: varying_baseline(BASELINES[name](points), tokens, groups, folds=folds, seed=seed)
        for name in TEXT_BASELINES
    }


def varying_baseline(features: Features, targets: Values, groups: Sequence[str], *, folds: int, seed: int) -> Values:
    """Held-out predictions of tokens from a baseline's features, fitted on log(1 + tokens).

    Features that never vary give one constant for all rows, which orders nothing.
    The means of the training parts would order the folds, the wrong way round.
    """
    if features.ndim > 1 and not np.ptp(features, axis=0).any():
        return np.full(len(targets), targets.mean())
    return _tokens(predictions_from(features, np.log1p(targets), groups, folds=folds, seed=seed))


def _baselines(store: TraceStore, data: LengthData, *, folds: int, seed: int) -> dict[str, Values]:
    points = Points.last_prompt_tokens(data.traces)
    features = {name: BASELINES[name](points) for name in TEXT_BASELINES}
    if all(trace.problem.difficulty is not None for trace in data.traces):
        features["difficulty"] = BASELINES["difficulty"](points)
    if all(trace.entropies is not None and trace.logprobs is not None for trace in data.traces):
        features["next_token"] = BASELINES["next_token"](points)
    if data.sites[0].layer == 0:
        name = "embedding" if data.sites[0].point == "resid_pre" else "first_layer"
        features[name] = embedding(points, store)
    return {
        name: varying_baseline(values, data.tokens, data.groups, folds=folds, seed=seed)
        for name, values in features.items()
    }


def _within(data: LengthData, predicted: Values, strata: Sequence[float | str | None], seed: int) -> Estimate | None:
    rows = np.array([index for index, stratum in enumerate(strata) if stratum is not None], dtype=np.intp)
    names = np.array([str(strata[index]) for index in rows])
    true, guessed = data.tokens[rows], predicted[rows]
    if not len(rows) or np.isnan(spearman_within(true, guessed, names.tolist())):
        return None
    return resample_groups(
        lambda drawn: spearman_within(true[drawn], guessed[drawn], names[drawn].tolist()),
        [data.groups[index] for index in rows],
        seed=seed,
    )


def _between_share(rollouts: Sequence[Sequence[Trace]]) -> float | None:
    """1 − variance within prompts / variance in all, of log(1 + tokens), from the prompts that have several rollouts."""
    logs = [np.log1p([trace.n_thinking_tokens for trace in traces]) for traces in rollouts if len(traces) > 1]
    if not logs or not (total := float(np.concatenate(logs).var())):
        return None
    within = sum(((values - values.mean()) ** 2).sum() for values in logs) / sum(len(values) - 1 for values in logs)
    return float(max(0.0, 1 - within / total))


def _kept(swept: SweepResult, data: LengthData, band: ResidualBand, seed: int) -> LinearProbe:
    return LinearProbe(
        coef=swept.coef,
        intercept=swept.intercept,
        site=data.sites[swept.final.layer],
        task="regression",
        method="ridge",
        model=data.traces[0].model,
        provenance={
            "target": "log(1 + thinking tokens)",
            "position": "last prompt token",
            "penalty": swept.final.penalty,
            "rows": len(data.tokens),
            "groups": len(set(data.groups)),
            "truncated": data.n_truncated,
            "interval": {
                "coverage": band.coverage,
                "log": [end if np.isfinite(end) else None for end in (band.low, band.high)],
            },
            "seed": seed,
        },
    )


def _tokens(logs: Values) -> Values:
    """Back from log(1 + tokens); a length is not below 0."""
    return np.asarray(np.maximum(np.expm1(logs), 0.0))
