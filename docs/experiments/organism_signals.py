"""Signals along the organism's thinking that need no rollouts, and erasure, for docs/methods, on a run of its own.

`--run` is recorded unless it exists, and gets the figures, which docs/images/draw.py turns into PNG files. Printed are JSON lines:
numbers with their intervals over problems, each with its control. `--only` names some of them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from reasonscope import probes
from reasonscope.analysis.figures import Figure, along, points, probe_scores, value_maps, write_figure
from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study
from reasonscope.analysis.runs.options import EmergentHeadsOptions, TrajectoryOptions
from reasonscope.analysis.runs.registry import ANALYSES
from reasonscope.analysis.statistics import result_of_estimates
from reasonscope.analysis.tokens.entropy import entropy_of_trace
from reasonscope.analysis.tokens.misalignment import misalignment_of_trace
from reasonscope.analysis.traces.reflection import (
    KINDS,
    failed_step_fraction,
    reflection_of_trace,
    review_ratio,
    unused_steps,
    within_question_correlation,
)
from reasonscope.analysis.traces.selection import best_by, majority, short_m, simulate
from reasonscope.analysis.traces.trajectory import published_scores, trajectory_of_trace
from reasonscope.data import Sampling, Trace, TraceStore, load_problems
from reasonscope.data.intervals import Estimate, mean_estimate, resample_groups
from reasonscope.data.organism.reader import read_steps
from reasonscope.data.organism.truth import true_sentences, truths
from reasonscope.data.ranks import auroc
from reasonscope.probes import Model, Site, cluster_bootstrap, load_model, record, rollouts, run_with_cache
from reasonscope.probes.evaluation.grouped_folds import trace_groups
from reasonscope.probes.fitting.erasure import guardedness
from reasonscope.steering import BudgetForcing
from reasonscope.steering.experiments.decoding_responses import other_tokens

BLOCK = 50  # tokens; the paper's 500 would leave one block of the organism's thinking
SAMPLES = 4
Numbers = Mapping[str, object]
Found = tuple[Numbers, Mapping[str, Figure]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/signals"))
    parser.add_argument("--small", action="store_true", help="few problems: says nothing, runs everything")
    parser.add_argument("--only", nargs="*", help="any of the numbers by name")
    given = parser.parse_args()
    few = given.small
    model = load_model("organism")
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    sampling = Sampling(temperature=0.7, max_new_tokens=900, seed=1)
    problems = load_problems("ledger", n=8 if few else 30, seed=1)
    store = record(model, problems, given.run, sites=sites, sampling=sampling, samples=SAMPLES, batch_size=40)
    studies = measured(model, store, sites, requests=40 if few else 200, most=8 if few else 24)
    for name, study in studies.items():
        if given.only and name not in given.only:
            continue
        numbers, figures = study()
        sys.stdout.write(json.dumps({name: numbers}, default=as_list) + "\n")
        sys.stdout.flush()
        (given.run / "figures").mkdir(exist_ok=True)
        for figure_name, figure in figures.items():
            write_figure(figure, given.run / "figures" / f"{figure_name}.json")


def measured(
    model: Model, store: TraceStore, sites: Sequence[Site], *, requests: int, most: int
) -> Mapping[str, Callable[[], Found]]:
    """Every measurement by name: its numbers and its figures."""
    traces = list(store)
    study = Study(store=store, traces=traces, options=TrajectoryOptions(block=BLOCK), results=store.path)
    return {
        "run": lambda: (about(traces), {}),
        "remaining": partial(remaining, store, traces),
        "entropy": lambda: (entropy(traces), {}),
        "reflection": partial(reflection, model, traces),
        "failed steps": partial(failed_steps, model, most),
        "trajectory": partial(trajectory, study, sites),
        "selection": partial(selection, study, sites),
        "misalignment": lambda: (misalignment(model, traces), {}),
        "emergent": partial(emergent, study),
        "erasure": partial(erasure, model, sites[4], requests),
    }


def about(traces: Sequence[Trace]) -> Numbers:
    tokens = [trace.n_thinking_tokens for trace in traces]
    return {"traces": len(traces), "right": sum(bool(t.correct) for t in traces), "thinking tokens": np.mean(tokens)}


def remaining(store: TraceStore, traces: Sequence[Trace]) -> Found:
    found = probes.remaining(store, traces)
    scores = {
        "probe": found.comparison.score,
        "probe, rows equally far": found.within_position,
        "tokens written so far": found.comparison.baselines["elapsed_position"],
        "prompt length": found.comparison.baselines["prompt_length"],
        "words of the prompt": found.comparison.baselines["bag_of_words"],
    }
    title = f"Tokens that remain ({found.n_groups} problems)"
    figure = probe_scores(scores, title=title, measure="Spearman correlation", chance=0.0)
    return {**scores, "above the best": found.comparison.difference}, {"remaining-scores": figure}


def entropy(traces: Sequence[Trace]) -> Numbers:
    found = [entropy_of_trace(trace) for trace in traces]
    every = np.concatenate([result.values for result in found])
    phases = {
        "thinking": [result.numbers["thinking"]["value"] for result in found],
        "answer": [result.numbers["answer"] for result in found],
    }
    means = {name: mean_estimate(values, groups=trace_groups(traces), shares=False) for name, values in phases.items()}
    return {**means, "below .01": np.mean(every < 0.01), "from .672": np.mean(every >= 0.672), "tokens": len(every)}


def reflection(model: Model, traces: Sequence[Trace]) -> Found:
    """Second answers as it writes, and where "Wait" (or a random token) takes the closing tag's place once."""
    own = [second_answers(trace) for trace in traces]
    problems = list({trace.problem.id: trace.problem for trace in traces}.values())
    forcing = BudgetForcing.of(model, rounds=1)
    ways = {"Wait": forcing, "Wait twice": replace(forcing, rounds=2)}
    ways |= {f"random {i}": replace(forcing, wait=other_tokens(model, forcing.wait, i)) for i in range(5)}
    sampling = Sampling(temperature=0.7, max_new_tokens=900, seed=1)
    counts = {"as it is": own[::SAMPLES]}
    for name, way in ways.items():
        written = rollouts(model, problems, sampling, batch_size=64, processors=[way])
        counts[name] = [second_answers(trace) for trace in written]
    shares = {
        name: dict(zip(KINDS, map(mean_estimate, np.array(rows).T), strict=True)) for name, rows in counts.items()
    }
    drawn = [shares.pop(name) for name in list(shares) if name.startswith("random")]
    band = {kind: (min(one[kind].value for one in drawn), max(one[kind].value for one in drawn)) for kind in KINDS}
    result = result_of_estimates(
        shares,
        dict.fromkeys(shares, band),
        method="reflection",
        quantity="share of thinkings whose second answer is",
        null="range of 5 random tokens in the closing tag's place",
    )
    return {"with a second candidate": sum(map(any, own)), "of": len(own), **shares, "random": band}, {
        "reflection": points(result)
    }


def second_answers(trace: Trace) -> list[float]:
    """Whether the thinking confirms, corrects, breaks or changes an answer that it has stated: (kind,)."""
    result = reflection_of_trace(trace, true_sentences(trace)[0])
    return [0.0] * len(KINDS) if not result.measured else [float(count > 0) for count in result.values]


def failed_steps(model: Model, n: int) -> Found:
    """Long ledgers at temperature 1, eight samples of each: what goes with being right among samples of the same problem."""
    drawn = load_problems("ledger", n=4 * n, seed=2)
    problems = [problem for problem in drawn if (problem.difficulty or 0) >= 5][:n]
    sampling = Sampling(temperature=1.0, max_new_tokens=900, seed=1)
    traces = [t for t in rollouts(model, problems, sampling, samples=8, batch_size=192) if t.state == "closed"]
    right = [float(bool(trace.correct)) for trace in traces]
    measures: dict[str, list[float]] = {
        "steps that claim what is wrong (FSF)": [wrong_steps(trace) for trace in traces],
        "sentences on which the end does not depend": [
            failed_step_fraction(unused_steps(true_sentences(trace)[1])) for trace in traces
        ],
        "review": [review_ratio(true_sentences(trace)[0]) for trace in traces],
        "tokens": [float(trace.n_thinking_tokens) for trace in traces],
    }
    names = [trace.problem.id for trace in traces]
    found = {name: within_question_correlation(values, right, names) for name, values in measures.items()}
    intervals = {name: within_interval(values, right, names) for name, values in measures.items()}
    quantity = "correlation with being right, by problem"
    result = result_of_estimates(
        {name: {quantity: one} for name, one in intervals.items()},
        {name: {quantity: tuple(np.quantile(one.null, [0.025, 0.975]))} for name, one in found.items()},
        method="failed_steps",
        quantity=quantity,
        null="shuffled within problems, 95 % of 1000",
    )
    numbers = {
        name: {"correlation": intervals[name], "p": one.p_value, "mean": np.mean(measures[name])}
        for name, one in found.items()
    }
    return {**numbers, "traces": len(traces), "right": sum(right), "problems": len(problems)}, {
        "failed-steps": points(result)
    }


def wrong_steps(trace: Trace) -> float:
    return failed_step_fraction([not step.right for step in read_steps(trace.thinking, truths(trace))])


def within_interval(values: Sequence[float], right: Sequence[float], problems: Sequence[str]) -> Estimate:
    """The correlation with its 95 % interval over problems."""
    x, y, names = np.array(values), np.array(right), np.array(problems)

    def statistic(rows: np.ndarray) -> float:
        return within_question_correlation(x[rows], y[rows], list(names[rows]), n_resamples=1).value

    return resample_groups(statistic, problems, n_resamples=300)


def trajectory(study: Study, sites: Sequence[Site]) -> Found:
    """AUROC of each signal against being right, beside that of the length, and the aligned change beside a random walk's."""
    traces = study.traces
    results = trajectories(study, sites)
    scores = published_scores(results)
    right = np.array([trace.correct for trace in traces], dtype=np.float64)
    judged = {**scores, "shortness": -np.array([trace.n_thinking_tokens for trace in traces], dtype=np.float64)}
    numbers = {name: cluster_bootstrap(auroc, right, np.array(v), trace_groups(traces)) for name, v in judged.items()}
    aligned = [(result.values[2], result.null) for result in results]
    above = sum(bool((values > null.high[2]).any()) for values, null in aligned if null is not None)
    walk = [(null.low[2].mean(), null.high[2].mean()) for _, null in aligned if null is not None]
    means = {"mean aligned": np.mean(scores["aligned"]), "of a random walk": np.mean(walk, axis=0), "above it": above}
    return {**numbers, **means}, {"trajectory": along(next(iter(ANALYSES["trajectory"](study))))}


def trajectories(study: Study, sites: Sequence[Site]) -> list[Result]:
    store = study.store
    return [
        trajectory_of_trace(trace, lambda site, trace=trace: store.activations(trace.id, str(site)), sites, block=BLOCK)
        for trace in study.traces
    ]


def selection(study: Study, sites: Sequence[Site]) -> Found:
    aligned = published_scores(trajectories(study, sites))["aligned"]
    straightness = dict(zip([trace.id for trace in study.traces], map(float, aligned), strict=True))
    rules = {"majority": majority, "short-1": short_m(1), "short-2": short_m(2)}
    rules["straightest"] = best_by(lambda trace: straightness[trace.id])
    found = simulate(study.traces, rules, k=SAMPLES)
    assert found.interval is not None
    rows = zip(found.axes[0].labels, found.values, found.interval.low, found.interval.high, strict=True)
    numbers = {name: {"accuracy, tokens": value, "low": low, "high": high} for name, value, low, high in rows}
    return numbers, {"selection": points(found)}


def misalignment(model: Model, traces: Sequence[Trace]) -> Numbers:
    base = load_model("organism-base")
    one = list({trace.problem.id: trace for trace in traces}.values())
    found = [misalignment_of_trace(base, model, trace, true_sentences(trace)[0]) for trace in one]
    rates = {"base": "rate", "reasoner on its own text": "rate_of_reasoner"}
    numbers = {name: mean_estimate([result.numbers[key] for result in found]) for name, key in rates.items()}
    places = {
        "by tenth": np.mean([result.values for result in found], axis=0),
        "by place in the sentence": np.nanmean([result.arrays["by_index"] for result in found], axis=0),
    }
    return {**numbers, **places, "traces": len(found)}


def emergent(study: Study) -> Found:
    eight = list({trace.problem.id: trace for trace in study.traces}.values())[:8]
    found = next(iter(ANALYSES["emergent_heads"](replace(study, traces=eight, options=EmergentHeadsOptions()))))
    return found.numbers, {"emergent": value_maps(found)}


def erasure(model: Model, site: Site, requests: int) -> Found:
    """Harmful requests against their benign twins at the last token of the prompt, and hard ledgers against easy ones; labels shuffled
    over the problems are the control."""
    asked = [*load_problems("requests:harmful", n=requests), *load_problems("requests:twin", n=requests)]
    ledgers = load_problems("ledger", n=2 * requests)
    labels = {
        "harmful or twin": (asked, [bool(problem.meta["harmful"]) for problem in asked]),
        "more than 4 steps": (ledgers, [(problem.difficulty or 0) > 4 for problem in ledgers]),
    }
    found: dict[str, dict[str, Estimate]] = {}
    chance: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (problems, label) in labels.items():
        states = np.array(
            [run_with_cache(model, model.encode_prompt(one), [site])[1][site][0, -1].numpy() for one in problems]
        )
        groups = [problem.group for problem in problems]
        shuffled = np.random.default_rng(0).permutation(np.array(label))
        real, control = (guardedness(states, np.array(given), groups) for given in (label, shuffled))
        found[name] = {"before": real.before, "after": real.after}
        chance[name] = {key: getattr(control, key).interval for key in ("before", "after")}
    result = result_of_estimates(
        found, chance, method="erasure", quantity="AUROC of a fresh probe", null="shuffled labels, 95 % over problems"
    )
    return {**found, "shuffled": chance, "rows": 2 * requests}, {"erasure": points(result)}


def as_list(value: object) -> object:
    if isinstance(value, Estimate):
        return [round(end, 4) for end in (value.value, value.low, value.high)]
    return np.asarray(value).tolist()


if __name__ == "__main__":
    main()
