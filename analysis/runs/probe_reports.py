"""What the probe commands need besides the reports themselves: which traces to learn from, figures, and forecasts of new prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reasonscope.analysis import figures
from reasonscope.analysis.figures import Figure
from reasonscope.data.arrays import Rows
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.ranks import spearman
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, plural
from reasonscope.data.trace import Message, Problem, Trace
from reasonscope.probes.evaluation.comparison import Comparison
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap
from reasonscope.probes.fitting.censoring import aft_predictions, concordance_index
from reasonscope.probes.fitting.held_out import LayerMap
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import POSITIONS, Position, position_name, thinking_to_window
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.models.model import Model
from reasonscope.probes.properties.correctness_probe import CorrectnessReport, correctness
from reasonscope.probes.properties.judge import Verdicts, judged, verdicts_of_file
from reasonscope.probes.properties.label_reports import LabelReport, predicted_words
from reasonscope.probes.properties.labels import Label
from reasonscope.probes.properties.length_probe import LengthReport, forecast, length_data
from reasonscope.probes.properties.refusal_cliff import mean_trajectory
from reasonscope.probes.properties.refusal_probe import RefusalReport
from reasonscope.probes.properties.remaining_probe import RemainingReport

Chosen = Literal["requests", "problems"]


def choose_traces(store: TraceStore, which: Chosen) -> list[Trace]:
    """The traces of requests (their meta says whether they are harmful), or those of other problems that have thinking.

    Raises InputError if a run has requests only and other problems are asked for.
    """
    requests = [trace for trace in store if "harmful" in trace.problem.meta]
    if which == "requests":
        return requests
    others = [trace for trace in store if "harmful" not in trace.problem.meta]
    if requests and not others:
        raise InputError(
            f"all {len(requests)} traces of this run are of requests (their meta says whether they are harmful), which this command "
            "leaves out; record other problems (reasonscope record --problems ledger --n 240 --out RUN), or call "
            "reasonscope.probes.length(store) in Python, which takes every trace"
        )
    thinking = [trace for trace in others if trace.state != "absent"]
    return thinking or others


def correctness_along(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    labels: Label | None = None,
    positions: Sequence[Position] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[list[CorrectnessReport], dict[str, str]]:
    """Reports of `correctness` at positions from the prompt to the closing tag, and for each that failed why.

    Raises InputError, the first of them, if all failed.
    """
    found: list[CorrectnessReport] = []
    failed: dict[Position, InputError] = {}
    for position in positions or POSITIONS:
        try:
            found.append(correctness(store, traces, labels=labels, position=position, folds=folds, seed=seed))
        except InputError as error:
            failed[position] = error
    if not found:
        raise next(iter(failed.values()))
    return found, {f"the probe at {position_name(position)}": str(error) for position, error in failed.items()}


def refusal_verdicts(
    traces: Sequence[Trace], labels: Path | None, judge: tuple[str, str] | None, keep: Path
) -> Verdicts | None:
    """Who says what the answers do: a file, a model on a server (URL and name; its replies are kept in `keep`), or None for the rules.

    Raises InputError if both are given.
    """
    if labels and judge:
        raise InputError("labels and a judge were given; leave one of --labels and --judge out")
    if judge:
        return judged(traces, *judge, keep=keep)
    return verdicts_of_file(labels, traces) if labels else None


def refusal_figures(
    found: RefusalReport, traces: Sequence[Trace], maps: Mapping[str, LayerMap] | None = None
) -> dict[str, Figure]:
    """For each contrast: the probe beside its baselines, mean trajectories by outcome, and the cliffs of single traces."""
    by_id = {trace.id: trace for trace in traces}
    drawn = {}
    for name, comparison in found.comparisons.items():
        drawn[f"{name}_scores"] = _scores(
            f"The {name} probe at the end of the thinking", {name: comparison.score}, comparison
        )
    for name, shown in (maps or {}).items():
        drawn[f"{name}_layers"] = _map(shown, f"Where {name} can be read")
    for name, study in found.cliffs.items():
        curves = {
            " ".join(of): mean_trajectory(
                [study.scores[id][thinking_to_window(by_id[id])] for id in cliff.ids],
                groups=[by_id[id].problem.group for id in cliff.ids],
            )
            for of, cliff in study.cliffs.items()
        }
        drawn[f"{name}_trajectories"] = figures.mean_trajectories(
            curves, title=f"The {name} probe along the thinking", measure=f"probability ({name})"
        )
        drawn[f"{name}_cliffs"] = figures.cliff_distribution(
            {" ".join(of): cliff for of, cliff in study.cliffs.items()},
            study.random,
            title=f"The cliff of the {name} probe",
        )
    return drawn


def correctness_figures(found: Sequence[CorrectnessReport]) -> dict[str, Figure]:
    """The probe at each position beside the baselines of the last one, and the score at each layer and position."""
    scores = {f"probe, {position_name(one.position)}": one.comparison.score for one in found}
    layers = LayerMap(
        scores=np.stack([one.by_layer for one in found], axis=1),
        sites=found[0].sites,
        positions=tuple(position_name(one.position) for one in found),
    )
    return {
        "correctness_scores": _scores("Will the answer be right?", scores, found[-1].comparison),
        "correctness_layers": _map(layers, "Where correctness can be read"),
    }


def label_figures(found: LabelReport, name: str) -> dict[str, Figure]:
    """The probe beside its baselines, its calibration, and the score at each layer."""
    comparison, what = found.comparison, predicted_words(found.label, found.positive)
    measure = f"{comparison.metric} on held-out problems"
    drawn = {
        f"{name}_scores": figures.probe_scores(
            {"probe": comparison.score, **comparison.baselines},
            title=f"A probe of {what}",
            measure=measure,
            chance=comparison.chance,
        ),
        f"{name}_layers": figures.layer_position_map(
            found.by_layer[:, None],
            [str(site) for site in found.sites],
            [found.place.name],
            title=f"Where {what} can be read",
            measure=measure,
            chance=comparison.chance,
        ),
    }
    if found.reliability is not None:
        drawn[f"{name}_calibration"] = figures.reliability_curve(found.reliability, title=f"Calibration: {what}")
    return drawn


def length_figures(found: LengthReport) -> dict[str, Figure]:
    """Predicted against true lengths, and the probe beside its baselines."""
    return {"length_prediction": figures.length_prediction(found), "length_scores": figures.length_scores(found)}


def remaining_figures(found: RemainingReport) -> dict[str, Figure]:
    """Predicted against true tokens remaining, and the probe beside its baselines."""
    return {
        "remaining_prediction": figures.remaining_prediction(found),
        "remaining_scores": figures.probe_scores(
            {"probe": found.comparison.score, **found.comparison.baselines},
            title=f"Tokens remaining: the probe and its baselines ({plural(found.n_groups, 'problem')})",
            measure="Spearman correlation",
            chance=0.0,
        ),
    }


def aft_scores(store: TraceStore, traces: Sequence[Trace], found: LengthReport, *, seed: int) -> dict[str, Estimate]:
    """Scores of an accelerated failure time model, which knows which lengths were cut off, on the rows, folds and sites of the probe."""
    data = length_data(store, list(traces))
    chosen = [data.sites.index(site) for site in found.layer]
    predicted = aft_predictions(
        data.features[:, :, 0], data.tokens, data.truncated, data.groups, chosen=chosen, seed=seed
    )

    def concordance(rows: Rows) -> float:
        return concordance_index(data.tokens[rows], data.truncated[rows], predicted[rows])

    return {
        "concordance": resample_groups(concordance, data.groups, n_resamples=200, seed=seed),
        "spearman": cluster_bootstrap(spearman, data.tokens, predicted, data.groups, seed=seed),
    }


def forecast_numbers(model: Model, probe: LinearProbe, prompts: Sequence[str]) -> dict[str, Any]:
    """How many tokens a model will think about each prompt, by a saved length probe.

    Prompts are rendered as `model.prompt` says, and opened as in the probe's run. Raises InputError for a probe of another model.
    """
    probe.check(probe.site, model.fingerprint)
    known = probe.provenance.get("prompt", {})
    opened = {"think": known.get("think", True), "open_tag": known.get("open_tag", False)}
    problems = [Problem(id=prompt, messages=(Message(role="user", content=prompt),)) for prompt in prompts]
    read = [run_with_cache(model, model.encode_prompt(problem, **opened), [probe.site])[1] for problem in problems]
    said = forecast(probe, np.stack([states[probe.site][0, -1].float().cpu().numpy() for states in read]))
    coverage = probe.provenance["interval"]["coverage"]
    return {
        prompt: {
            "thinking_tokens": {"value": float(tokens), "low": float(low), "high": float(high)},
            "coverage": coverage,
        }
        for prompt, tokens, low, high in zip(prompts, said.tokens, said.low, said.high, strict=True)
    }


def forecast_summary(numbers: Mapping[str, Any], *, as_fitted: bool = True) -> Summary:
    """The forecasts of `forecast_numbers` for people; `as_fitted` if the probe says how the prompts of its run were made."""
    coverage = f"{100 * next(iter(numbers.values()))['coverage']:.0f} % interval"
    said = {prompt: one["thinking_tokens"] for prompt, one in numbers.items()}
    tokens = {prompt: f"{one['value']:.0f}" for prompt, one in said.items()}
    ends = {prompt: _ends(one["low"], one["high"]) for prompt, one in said.items()}
    open_end = any(not np.isfinite(one["high"]) for one in said.values())
    notes = (
        ["No upper end: the probe was fitted on too few problems, or too many of its traces were cut off."]
        if open_end
        else []
    )
    if not as_fitted:
        notes.append(
            "This probe does not say how the prompts of its run were made, so these have no system message, no template arguments and "
            "no opening tag; if the run had any, fit the probe again: reasonscope probe length --run RUN"
        )
    if len(said) == 1:
        [prompt] = said
        finding = (
            f"The model will think for about {tokens[prompt]} tokens about {prompt!r} ({coverage}: {ends[prompt]})."
        )
        return Summary(finding=finding, notes=notes)
    longest, shortest = (pick(said, key=lambda prompt: said[prompt]["value"]) for pick in (max, min))
    return Summary(
        finding=f"The model will think longest about {longest!r} (about {tokens[longest]} tokens) and shortest about {shortest!r} "
        f"(about {tokens[shortest]}).",
        columns=("prompt", "thinking tokens", coverage),
        rows=[(prompt, tokens[prompt], ends[prompt]) for prompt in said],
        notes=notes,
    )


def _ends(low: float, high: float) -> str:
    return f"{low:.0f} to {high:.0f}" if np.isfinite(high) else f"at least {low:.0f}"


def _map(shown: LayerMap, title: str) -> Figure:
    layers = [str(site) for site in shown.sites]
    return figures.layer_position_map(
        shown.scores, layers, shown.positions, title=title, measure="AUROC on held-out problems", chance=0.5
    )


def _scores(title: str, scores: Mapping[str, Estimate], comparison: Comparison) -> Figure:
    shown = {**scores, **comparison.baselines}
    return figures.probe_scores(shown, title=title, measure="AUROC on held-out problems", chance=0.5)
