"""Signals along the organism's thinking that need no rollouts, and erasure: what docs/methods says of them, on a run of its own.

`--run` is recorded where it is not there yet. Printed are JSON lines: numbers with their intervals over problems, each with its control.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from reasonscope.analysis.entropy import entropy_of_trace
from reasonscope.analysis.misalignment import misalignment_of_trace
from reasonscope.analysis.reflection import reflection_of_trace
from reasonscope.analysis.selection import best_by, majority, short_m, simulate
from reasonscope.analysis.statistics import mean_estimate
from reasonscope.analysis.trajectory import published_scores, trajectory_of_trace
from reasonscope.data import Problem, Sampling, Trace, TraceStore, load_problems
from reasonscope.data.organism.truth import true_sentences
from reasonscope.probes import Estimate, Model, Site, cluster_bootstrap, load_model, record, run_with_cache
from reasonscope.probes.erasure import guardedness
from reasonscope.probes.evaluate import trace_groups
from reasonscope.probes.metrics import auroc
from reasonscope.probes.remaining import remaining_probe

BLOCK = 50  # tokens; the paper's 500 would leave one block of the organism's thinking
SAMPLES = 4
Numbers = Mapping[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/signals"))
    parser.add_argument("--small", action="store_true", help="few problems: says nothing, runs everything")
    given = parser.parse_args()
    few = given.small
    model = load_model("organism")
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    sampling = Sampling(temperature=0.7, max_new_tokens=900, seed=1)
    problems = load_problems("ledger", n=8 if few else 30, seed=1)
    store = record(model, problems, given.run, sites=sites, sampling=sampling, samples=SAMPLES, batch_size=40)
    for name, numbers in measured(model, store, sites, requests=40 if few else 200):
        sys.stdout.write(json.dumps({name: numbers}, default=as_list) + "\n")
        sys.stdout.flush()


def measured(model: Model, store: TraceStore, sites: Sequence[Site], *, requests: int) -> Iterator[tuple[str, Numbers]]:
    traces = list(store)
    right = [trace.correct for trace in traces]
    tokens = [trace.n_thinking_tokens for trace in traces]
    yield "run", {"traces": len(traces), "right": sum(map(bool, right)), "thinking tokens": np.mean(tokens)}
    yield "remaining", remaining(store, traces)
    yield "entropy", entropy(traces)
    yield "reflection", reflection(traces)
    yield "trajectory", (moved := trajectory(store, traces, sites))[0]
    yield "selection", selection(traces, moved[1])
    yield "misalignment", misalignment(model, traces)
    yield "erasure", erasure(model, sites[4], requests)


def remaining(store: TraceStore, traces: Sequence[Trace]) -> Numbers:
    found = remaining_probe(store, traces)
    return {
        "spearman": found.spearman,
        "baselines": found.baselines,
        "above the best": found.difference,
        "within position": found.within_position,
    }


def entropy(traces: Sequence[Trace]) -> Numbers:
    found = [entropy_of_trace(trace) for trace in traces]
    every = np.concatenate([result.values for result in found])
    phases = {
        "thinking": [result.numbers["thinking"]["value"] for result in found],
        "answer": [result.numbers["answer"] for result in found],
    }
    means = {name: mean_estimate(values, groups=trace_groups(traces)) for name, values in phases.items()}
    return {**means, "below .01": np.mean(every < 0.01), "from .672": np.mean(every >= 0.672), "tokens": len(every)}


def reflection(traces: Sequence[Trace]) -> Numbers:
    found = [reflection_of_trace(trace, true_sentences(trace)[0]) for trace in traces]
    return {"with a second candidate": sum(bool(result.values.sum() > 0) for result in found), "of": len(found)}


def trajectory(
    store: TraceStore, traces: Sequence[Trace], sites: Sequence[Site]
) -> tuple[Numbers, Mapping[str, Mapping[str, float]]]:
    """AUROC of each signal against being right, beside that of the length, and the aligned change beside a random walk's."""
    results = [
        trajectory_of_trace(trace, lambda site, trace=trace: store.activations(trace.id, str(site)), sites, block=BLOCK)
        for trace in traces
    ]
    scores = published_scores(results)
    right = np.array([trace.correct for trace in traces], dtype=np.float64)
    judged = {**scores, "shortness": -np.array([trace.n_thinking_tokens for trace in traces], dtype=np.float64)}
    numbers = {name: cluster_bootstrap(auroc, right, np.array(v), trace_groups(traces)) for name, v in judged.items()}
    aligned = [(result.values[2], result.null) for result in results]
    above = sum(bool((values > null.high[2]).any()) for values, null in aligned if null is not None)
    walk = [(null.low[2].mean(), null.high[2].mean()) for _, null in aligned if null is not None]
    means = {"mean aligned": np.mean(scores["aligned"]), "of a random walk": np.mean(walk, axis=0), "above it": above}
    ids = [trace.id for trace in traces]
    return {**numbers, **means}, {name: dict(zip(ids, map(float, v), strict=True)) for name, v in scores.items()}


def selection(traces: Sequence[Trace], scores: Mapping[str, Mapping[str, float]]) -> Numbers:
    rules = {"majority": majority, "short-1": short_m(1), "short-2": short_m(2)}
    rules["straightest"] = best_by(lambda trace: scores["aligned"][trace.id])
    found = simulate(traces, rules, k=SAMPLES)
    assert found.interval is not None
    rows = zip(found.axes[0].labels, found.values, found.interval.low, found.interval.high, strict=True)
    return {name: {"accuracy, tokens": value, "low": low, "high": high} for name, value, low, high in rows}


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


def erasure(model: Model, site: Site, requests: int) -> Numbers:
    """Harmful requests against their benign twins at the last token of the prompt, and hard ledgers against easy ones."""
    asked = [*load_problems("requests:harmful", n=requests), *load_problems("requests:twin", n=requests)]
    ledgers = load_problems("ledger", n=2 * requests)
    labels = {
        "harmful": (asked, [bool(problem.meta["harmful"]) for problem in asked]),
        "more than 4 steps": (ledgers, [(problem.difficulty or 0) > 4 for problem in ledgers]),
    }
    return {name: guarded(model, site, problems, label) for name, (problems, label) in labels.items()}


def guarded(model: Model, site: Site, problems: Sequence[Problem], labels: Sequence[bool]) -> Numbers:
    states = [run_with_cache(model, model.encode_prompt(problem), [site])[1][site][0, -1] for problem in problems]
    groups = [problem.group for problem in problems]
    found = guardedness(np.array([state.numpy() for state in states]), np.array(labels), groups)
    return {"before": found.before, "after": found.after, "rows": len(problems), "groups": found.n_groups}


def as_list(value: object) -> object:
    if isinstance(value, Estimate):
        return [round(end, 4) for end in (value.value, value.low, value.high)]
    return np.asarray(value).tolist()


if __name__ == "__main__":
    main()
