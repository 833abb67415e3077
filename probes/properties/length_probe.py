"""How long will the model think? A linear probe on the last prompt token (On Reasoning Strength Planning, arXiv 2506.08390)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.progress import working
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import (
    TEXT_BASELINES,
    Features,
    Points,
    baseline_features,
    residual_sites,
)
from reasonscope.probes.evaluation.comparison import N_RESAMPLES, Comparison, compare
from reasonscope.probes.evaluation.conformal import ResidualBand, residual_band
from reasonscope.probes.evaluation.grouped_folds import (
    cluster_bootstrap,
    trace_groups,
)
from reasonscope.probes.evaluation.metrics import r2, r2_log, spearman_within
from reasonscope.probes.fitting.baseline_fits import rank_predictions
from reasonscope.probes.fitting.censoring import Mask, concordance_index
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS, permuted_sweep
from reasonscope.probes.fitting.positions import states_at
from reasonscope.probes.fitting.sweep import SweepResult, sweep
from reasonscope.probes.properties.report import (
    censored_notes,
    probe_numbers,
    traces_with_thinking,
    truncation_notes,
    undefined_notes,
    without_thinking,
)


@dataclass(frozen=True, kw_only=True)
class _LengthData:
    """What the probe learns from: one row per prompt, its rollouts averaged, because they all start from the same state.

    Attributes:
        features: States at the last prompt token, (row, layer, 1, d_model), layers as in `sites`.
        tokens: Mean number of thinking tokens of the prompt's rollouts, (row,).
        truncated: Whether one of them was cut off, so that the mean is too low, (row,).
        groups: The group of each row.
        sites: The sites that were read.
        traces: The first rollout of each prompt, (row,).
        n_traces: Number of rollouts of all prompts.
        n_truncated: How many of them were cut off.
        between_share: The share of the variance of log(1 + tokens) that lies between prompts, which bounds R² for single rollouts;
            None if no prompt has two rollouts.
    """

    features: NDArray[np.float32]
    tokens: Values
    truncated: Mask
    groups: tuple[str, ...]
    sites: tuple[Site, ...]
    traces: tuple[Trace, ...]
    n_traces: int
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
    """How well the number of thinking tokens is predicted before the first of them, on held-out problems.

    Attributes:
        comparison: Spearman correlation of the probe and its baselines with the true length. `metrics` has R² in tokens (`r2`) and in
            log(1 + tokens) (`r2_log`), and Harrell's `concordance` (0.5 is chance), which knows that cut-off traces are longer.
        probe: The probe, fitted on all rows; its scores are log(1 + tokens).
        within_difficulty: Spearman correlation among problems of the same difficulty, or None.
        within_dataset: The same among problems of the same data set, or None.
        undefined: For each of these two that is None and was asked for, why.
        between_share: See `_LengthData`.
        n_groups: Groups of problems.
        n_traces: Traces that were learned from.
        n_truncated: Traces that ended at the token limit; they stay in with what was counted.
        predicted: Held-out predictions in tokens, (row,), one row per prompt as in `_LengthData`.
        true: The number of thinking tokens, (row,).
        layer: The site that each fold chose, (fold,).
        band: How far the logarithm of a new length may be from the prediction.
    """

    comparison: Comparison
    probe: LinearProbe
    within_difficulty: Estimate | None
    within_dataset: Estimate | None
    undefined: Mapping[str, str]
    between_share: float | None
    n_groups: int
    n_traces: int
    n_truncated: int
    predicted: Values
    true: Values
    layer: tuple[Site, ...]
    band: ResidualBand

    def forecast(self, activations: ArrayLike) -> LengthForecast:
        """Forecast new prompts from states (…, d_model) of `probe.site` at their last token; `band.coverage` of the intervals hold."""
        return forecast(self.probe, activations)

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON; `interval_factors` are what a predicted length is multiplied by for the ends of its interval."""
        return {
            "comparison": self.comparison.to_dict(),
            "probe": probe_numbers(self.probe),
            "within_difficulty": None if self.within_difficulty is None else self.within_difficulty.to_dict(),
            "within_dataset": None if self.within_dataset is None else self.within_dataset.to_dict(),
            "undefined": dict(self.undefined),
            "between_prompts_share": self.between_share,
            "interval_factors": [float(np.exp(self.band.low)), float(np.exp(self.band.high))],
            "interval_coverage": self.band.coverage,
            "chosen_sites": [str(site) for site in self.layer],
            "n_groups": self.n_groups,
            "n_traces": self.n_traces,
            "n_truncated": self.n_truncated,
        }

    def summary(self) -> Summary:
        """The finding for people, with the scores of the baselines."""
        within = [
            f"Among problems of the same {what}: Spearman {in_hundredths(score)}."
            for what, score in (("difficulty", self.within_difficulty), ("data set", self.within_dataset))
            if score is not None
        ]
        return Summary(
            finding=self.comparison.finding(
                "The state before the first thinking token", "how long the model will think"
            ),
            columns=self.comparison.columns,
            rows=self.comparison.rows(),
            notes=[
                *censored_notes(self.comparison),
                *within,
                *undefined_notes(self.undefined),
                *truncation_notes(
                    self.n_truncated,
                    self.n_traces,
                    "They count with the tokens that were written, and only the concordance knows that they are longer",
                ),
            ],
        )


@working("length probe")
def length(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    coverage: float = 0.9,
    datasets: Sequence[str] | None = None,
    n_permutations: int = N_PERMUTATIONS,
    n_resamples: int = N_RESAMPLES,
) -> LengthReport:
    """Predict from the last prompt token how long the model will think, and compare with what needs no probe.

    Args:
        store: A run with residual sites.
        traces: The traces to learn from; by default all that have thinking.
        folds: Parts that the problems are split into; layer and penalty are chosen inside each training part.
        seed: Seed of the folds, shuffles and resamples.
        coverage: Share of new problems that the interval of a forecast covers.
        datasets: The data set of each trace, for the correlation within data sets.
        n_permutations: Shuffles of the labels; the smallest p-value is 1 / (n_permutations + 1).
        n_resamples: Resamples of the problems for the intervals.

    Returns:
        The held-out scores, and the probe fitted on all rows: ridge on log(1 + thinking tokens), one row per prompt.

    Raises:
        InputError: A trace has no thinking, the run has no residual site, a problem is in two groups, there are fewer groups than
            folds, or an activation is not finite.

    On Reasoning Strength Planning (arXiv 2506.08390).

    Departures: The target is logarithmic and features are standardised; ridge replaces lasso; penalty and layer are chosen inside the
        fold; problems of one group stay together; baselines are shown.

    Example:
        store = TraceStore.open("runs/mine/store")
        report = length(store)
        print(report.summary())
    """
    if traces is None:
        traces = traces_with_thinking(store)
    data = length_data(store, traces)
    baselines = baseline_features(Points.last_prompt_tokens(data.traces), store, TEXT_BASELINES)
    swept = sweep(data.features, np.log1p(data.tokens), data.groups, task="regression", folds=folds, seed=seed)
    predicted = _tokens(swept.predictions)
    band = residual_band(np.log1p(data.tokens) - swept.predictions, data.truncated, data.groups, coverage=coverage)
    names = {id(trace): name for trace, name in zip(traces, datasets, strict=True)} if datasets is not None else {}
    strata = {"within_difficulty": [trace.problem.difficulty for trace in data.traces]} | (
        {"within_dataset": [names[id(trace)] for trace in data.traces]} if names else {}
    )
    within = {name: _within(data, predicted, of, n_resamples, seed) for name, of in strata.items()}
    return LengthReport(
        comparison=compare(
            "Spearman",
            data.tokens,
            predicted,
            token_predictions(baselines, data.tokens, data.groups, folds=folds, seed=seed),
            data.groups,
            problems=[trace.problem.id for trace in data.traces],
            shuffled=permuted_sweep(
                data.features,
                np.log1p(data.tokens),
                data.groups,
                task="regression",
                n_permutations=n_permutations,
                folds=folds,
                seed=seed,
            ),
            metrics=_metrics(data, predicted, n_resamples, seed),
            n_resamples=n_resamples,
            seed=seed,
        ),
        probe=_kept(swept, data, band, store.meta, seed),
        within_difficulty=_defined(within["within_difficulty"]),
        within_dataset=_defined(within.get("within_dataset")),
        undefined={name: why for name, why in within.items() if isinstance(why, str)},
        between_share=data.between_share,
        n_groups=len(set(data.groups)),
        n_traces=data.n_traces,
        n_truncated=data.n_truncated,
        predicted=predicted,
        true=data.tokens,
        layer=tuple(data.sites[choice.layer] for choice in swept.chosen),
        band=band,
    )


def forecast(probe: LinearProbe, activations: ArrayLike) -> LengthForecast:
    """Forecast the length of new thinking with a probe of `length`, just fitted or loaded from a file.

    `activations` (…, d_model) are states of the probe's site at the last prompt token. Raises InputError for another kind of probe.
    """
    band = probe.provenance.get("interval")
    if band is None:
        raise InputError(
            "this probe does not predict lengths; use RUN/probes/length.safetensors, which `reasonscope probe length` writes"
        )
    scores = probe.scores(activations)
    low, high = (np.inf * sign if end is None else end for sign, end in zip((-1, 1), band["log"], strict=True))
    return LengthForecast(tokens=_tokens(scores), low=_tokens(scores + low), high=_tokens(scores + high))


def length_data(store: TraceStore, traces: Sequence[Trace]) -> _LengthData:
    """The states and the lengths of `traces`. Raises InputError if a trace has no thinking or the run has no residual site."""
    sites = residual_sites(store)
    if all(trace.state == "absent" for trace in traces):
        raise InputError(without_thinking(traces))
    for trace in traces:
        if trace.state == "absent":
            raise InputError(
                f"trace {trace.id!r} has no thinking, so it has no length to predict; "
                "leave it out: [trace for trace in store if trace.state != 'absent']"
            )
    trace_groups(traces)
    asked: dict[tuple[str, bytes], list[Trace]] = {}
    for trace in traces:
        prompt = trace.token_ids[: trace.n_prompt_tokens].tobytes()
        asked.setdefault((trace.problem.id, prompt), []).append(trace)
    rollouts = list(asked.values())
    first = tuple(traces[0] for traces in rollouts)
    return _LengthData(
        features=states_at(store, Points.last_prompt_tokens(first), sites),
        tokens=np.array([np.mean([trace.n_thinking_tokens for trace in traces]) for traces in rollouts]),
        truncated=np.array([any(trace.state == "truncated" for trace in traces) for traces in rollouts]),
        groups=tuple(trace.problem.group for trace in first),
        sites=tuple(sites),
        traces=first,
        n_traces=len(traces),
        n_truncated=sum(trace.state == "truncated" for trace in traces),
        between_share=_between_share(rollouts),
    )


def token_predictions(
    baselines: Mapping[str, Features], tokens: Values, groups: Sequence[str], *, folds: int, seed: int
) -> dict[str, Values]:
    """Held-out predictions of `tokens` (row,) by each baseline, fitted on log(1 + tokens)."""
    predicted = rank_predictions(baselines, np.log1p(tokens), groups, folds=folds, seed=seed)
    return {name: _tokens(logs) for name, logs in predicted.items()}


def _metrics(data: _LengthData, predicted: Values, n_resamples: int, seed: int) -> dict[str, Estimate]:
    def concordance(rows: Rows) -> float:
        return concordance_index(data.tokens[rows], data.truncated[rows], predicted[rows])

    return {
        "concordance": resample_groups(concordance, data.groups, n_resamples=min(n_resamples, 200), seed=seed),
        "r2_log": cluster_bootstrap(r2_log, data.tokens, predicted, data.groups, n_resamples=n_resamples, seed=seed),
        "r2": cluster_bootstrap(r2, data.tokens, predicted, data.groups, n_resamples=n_resamples, seed=seed),
    }


def _within(
    data: _LengthData, predicted: Values, strata: Sequence[float | str | None], n_resamples: int, seed: int
) -> Estimate | str:
    """The correlation inside strata, or why it is undefined."""
    rows = np.array([index for index, stratum in enumerate(strata) if stratum is not None], dtype=np.intp)
    if not len(rows):
        return "no problem states it (`difficulty` in a problem file)"
    names = np.array([str(strata[index]) for index in rows])
    true, guessed = data.tokens[rows], predicted[rows]
    if np.isnan(spearman_within(true, guessed, names.tolist())):
        return "no three problems share it; record more problems"
    return resample_groups(
        lambda drawn: spearman_within(true[drawn], guessed[drawn], names[drawn].tolist()),
        [data.groups[index] for index in rows],
        n_resamples=n_resamples,
        seed=seed,
    )


def _defined(found: Estimate | str | None) -> Estimate | None:
    return found if isinstance(found, Estimate) else None


def _between_share(rollouts: Sequence[Sequence[Trace]]) -> float | None:
    """1 − variance within prompts / variance in all, of log(1 + tokens), from the prompts that have several rollouts."""
    logs = [np.log1p([trace.n_thinking_tokens for trace in traces]) for traces in rollouts if len(traces) > 1]
    if not logs or not (total := float(np.concatenate(logs).var())):
        return None
    within = sum(((values - values.mean()) ** 2).sum() for values in logs) / sum(len(values) - 1 for values in logs)
    return float(max(0.0, 1 - within / total))


def _kept(swept: SweepResult, data: _LengthData, band: ResidualBand, meta: Mapping[str, Any], seed: int) -> LinearProbe:
    """The probe, with how its run was asked: a forecast has to read the same kind of prompt."""
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
            "learned_from": sorted(set(data.groups)),
            "truncated": data.n_truncated,
            **{key: meta[key] for key in ("prompt", "thinking") if key in meta},
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
