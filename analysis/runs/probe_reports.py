"""What the probe commands show of a result: its numbers by name, and its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reasonscope.analysis import figures
from reasonscope.analysis.figures import Figure
from reasonscope.data.arrays import Rows
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Message, Problem, Trace
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap, spearman
from reasonscope.probes.evaluation.permutation_null import Null
from reasonscope.probes.fitting.censoring import aft_predictions, concordance_index
from reasonscope.probes.fitting.held_out import Comparison, LayerMap
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import position_name, thinking_to_window
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.models.model import Model
from reasonscope.probes.properties.correctness_probe import CorrectnessReport
from reasonscope.probes.properties.length_probe import LengthReport, forecast, length_data
from reasonscope.probes.properties.refusal_cliff import mean_trajectory
from reasonscope.probes.properties.refusal_probe import CliffStudy, RefusalReport, RequestOutcome
from reasonscope.probes.properties.remaining_probe import RemainingReport


def refusal_numbers(found: RefusalReport) -> dict[str, Any]:
    """AUROCs with baselines of each contrast, and the cliffs by cell with their nulls."""
    return {
        "n_groups": found.n_groups,
        "n_left_out": found.n_left_out,
        "cells": {_name(of): count for of, count in sorted(found.cells.items())},
        **{
            name: {
                **_comparison(comparison),
                **_probe(found.probes[name]),
                **({"cliffs": _cliffs(found.cliffs[name])} if name in found.cliffs else {}),
            }
            for name, comparison in found.comparisons.items()
        },
    }


def refusal_figures(
    found: RefusalReport, traces: Sequence[Trace], maps: Mapping[str, LayerMap] | None = None
) -> dict[str, Figure]:
    """Of each contrast: the probe beside its baselines, mean trajectories by outcome, and the cliffs of single traces."""
    by_id = {trace.id: trace for trace in traces}
    drawn = {}
    for name, comparison in found.comparisons.items():
        drawn[f"{name}_scores"] = _scores(f"The {name} probe at the closing tag", {name: comparison.auroc}, comparison)
    for name, shown in (maps or {}).items():
        drawn[f"{name}_layers"] = _map(shown, f"Where {name} can be read")
    for name, study in found.cliffs.items():
        curves = {
            _name(of): mean_trajectory(
                [study.scores[id][thinking_to_window(by_id[id]).slice] for id in cliff.ids],
                groups=[by_id[id].problem.group for id in cliff.ids],
            )
            for of, cliff in study.cliffs.items()
        }
        drawn[f"{name}_trajectories"] = figures.mean_trajectories(
            curves, title=f"The {name} probe along the thinking", measure=f"probability ({name})"
        )
        drawn[f"{name}_cliffs"] = figures.cliff_distribution(
            {_name(of): cliff for of, cliff in study.cliffs.items()},
            study.random,
            title=f"The cliff of the {name} probe",
        )
    return drawn


def correctness_numbers(found: Sequence[CorrectnessReport]) -> dict[str, Any]:
    """What the probe says at each position, with the baselines, and within problems."""
    return {
        position_name(one.position): {
            **_comparison(one.comparison),
            **_probe(one.probe),
            "within_problem": {
                **_estimate(one.within_problem.share),
                "n_pairs": one.within_problem.n_pairs,
                "why_not": one.within_problem.why_not or None,
            },
            "n_traces": one.n_traces,
            "n_right": one.n_right,
            "n_truncated": one.n_truncated,
            "n_left_out": one.n_left_out,
            "n_groups": one.n_groups,
        }
        for one in found
    }


def correctness_figures(found: Sequence[CorrectnessReport]) -> dict[str, Figure]:
    """The probe at each position beside the baselines of the last."""
    scores = {f"probe, {position_name(one.position)}": one.comparison.auroc for one in found}
    layers = LayerMap(
        scores=np.stack([one.by_layer for one in found], axis=1),
        sites=found[0].sites,
        positions=tuple(position_name(one.position) for one in found),
    )
    return {
        "correctness_scores": _scores("Will the answer be right?", scores, found[-1].comparison),
        "correctness_layers": _map(layers, "Where correctness can be read"),
    }


def length_numbers(found: LengthReport) -> dict[str, Any]:
    """Rank correlations with baselines, inside difficulties, and what the truncated traces allow to say."""
    return {
        "spearman": _estimate(found.spearman),
        "baselines": {name: _estimate(score) for name, score in found.baselines.items()},
        "difference_to_best_text_baseline": _estimate(found.difference),
        "verdict": "beats the text" if found.difference.low > 0 else "does not beat the text",
        "shuffled_lengths": _null(found.shuffled),
        "within_difficulty": _estimate(found.within_difficulty) if found.within_difficulty else None,
        "concordance": _estimate(found.concordance),
        "r2_log": _estimate(found.r2_log),
        "r2": _estimate(found.r2),
        "between_prompts_share": found.between_share,
        "interval_factors": [float(np.exp(found.band.low)), float(np.exp(found.band.high))],
        "interval_coverage": found.band.coverage,
        "n_groups": found.n_groups,
        "n_truncated": found.n_truncated,
        **_probe(found.probe),
    }


def remaining_numbers(found: RemainingReport) -> dict[str, Any]:
    """Rank correlations of the tokens that are left, with the position alone beside them."""
    return {
        "spearman": _estimate(found.spearman),
        "baselines": {name: _estimate(score) for name, score in found.baselines.items()},
        "difference_to_best_baseline": _estimate(found.difference),
        "verdict": "beats the baselines" if found.difference.low > 0 else "does not beat the baselines",
        "within_position": _estimate(found.within_position),
        "concordance": _estimate(found.concordance),
        "r2_log": _estimate(found.r2_log),
        "n_rows": len(found.true),
        "n_groups": found.n_groups,
        "n_truncated": found.n_truncated,
        **_probe(found.probe),
    }


def remaining_figures(found: RemainingReport) -> dict[str, Figure]:
    """Predicted against true tokens remaining, and the probe beside its baselines."""
    return {
        "remaining_prediction": figures.remaining_prediction(found),
        "remaining_scores": figures.probe_scores(
            {"probe": found.spearman, **found.baselines},
            title=f"Tokens remaining: the probe and its baselines ({found.n_groups} problems)",
            measure="Spearman correlation",
            chance=0.0,
        ),
    }


def aft_numbers(
    store: TraceStore, traces: Sequence[Trace], found: LengthReport, *, folds: int, seed: int
) -> dict[str, Any]:
    """The same rows at the site of the probe by a model that knows which lengths were cut off."""
    data = length_data(store, list(traces))
    states = data.features[:, data.sites.index(found.probe.site), 0]
    predicted = aft_predictions(states, data.tokens, data.truncated, data.groups, folds=folds, seed=seed)

    def concordance(rows: Rows) -> float:
        return concordance_index(data.tokens[rows], data.truncated[rows], predicted[rows])

    return {
        "concordance": _estimate(resample_groups(concordance, data.groups, n_resamples=200, seed=seed)),
        "spearman": _estimate(cluster_bootstrap(spearman, data.tokens, predicted, data.groups, seed=seed)),
    }


def forecast_numbers(model: Model, probe: LinearProbe, prompts: Sequence[str]) -> dict[str, Any]:
    """How long a model will think about each prompt, by a kept length probe. Raises InputError for a probe of another model."""
    probe.check(probe.site, model.fingerprint)
    problems = [Problem(id=prompt, messages=(Message(role="user", content=prompt),)) for prompt in prompts]
    read = [run_with_cache(model, model.encode_prompt(problem), [probe.site])[1] for problem in problems]
    said = forecast(probe, np.stack([states[probe.site][0, -1].float().cpu().numpy() for states in read]))
    coverage = probe.provenance["interval"]["coverage"]
    return {
        prompt: {"thinking_tokens": float(tokens), "interval": [float(low), float(high)], "coverage": coverage}
        for prompt, tokens, low, high in zip(prompts, said.tokens, said.low, said.high, strict=True)
    }


def length_figures(found: LengthReport) -> dict[str, Figure]:
    """Predicted against true lengths, and the probe beside its baselines."""
    return {"length_prediction": figures.length_prediction(found), "length_scores": figures.length_scores(found)}


def _map(shown: LayerMap, title: str) -> Figure:
    layers = [str(site) for site in shown.sites]
    return figures.layer_position_map(
        shown.scores, layers, shown.positions, title=title, measure="AUROC on held-out problems", chance=0.5
    )


def _scores(title: str, scores: Mapping[str, Estimate], comparison: Comparison) -> Figure:
    shown = {**scores, **comparison.baselines}
    return figures.probe_scores(shown, title=title, measure="AUROC on held-out problems", chance=0.5)


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "auroc": _estimate(comparison.auroc),
        **{name: _estimate(score) for name, score in comparison.metrics.items()},
        "baselines": {name: _estimate(score) for name, score in comparison.baselines.items()},
        "difference_to_best_baseline": _estimate(comparison.difference),
        "shuffled_labels": _null(comparison.shuffled),
        "verdict": "beats the baselines" if comparison.beats else "does not beat the baselines",
    }


def _null(shuffled: Null) -> dict[str, float]:
    null = shuffled.null
    return {"mean": float(null.mean()), "highest": float(null.max()), "p_value": shuffled.p_value}


def _cliffs(study: CliffStudy) -> dict[str, Any]:
    shown: dict[str, Any] = {
        _name(of): {
            "plateau": _estimate(cliff.plateau),
            "end": _estimate(cliff.end),
            "drop": _estimate(cliff.drop),
            "n": len(cliff.ids),
        }
        for of, cliff in study.cliffs.items()
    }
    low, high = np.quantile(study.random, [0.025, 0.975])
    shown["random_directions"] = {"drop": {"value": float(study.random.mean()), "ci": [float(low), float(high)]}}
    shown["above_nulls"] = study.above_nulls
    if study.excess is not None and study.random_excess is not None:
        low, high = np.quantile(study.random_excess, [0.025, 0.975])
        null = {"value": float(study.random_excess.mean()), "ci": [float(low), float(high)]}
        shown["excess_over_benign"] = {
            **_estimate(study.excess),
            "random_directions": null,
            "above_random": study.excess_above_random,
        }
    return shown


def _probe(probe: LinearProbe) -> dict[str, Any]:
    return {"site": str(probe.site)}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci": list(estimate.interval)}


def _name(of: RequestOutcome) -> str:
    return " ".join(of)
