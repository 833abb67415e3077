"""Analyses that compare: heads with random heads, a reasoner with its base model, rules with a single sample."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from reasonscope.analysis.causal.edge_attribution import emergent_heads, opening_pairs
from reasonscope.analysis.causal.probe_write import probe_write_result
from reasonscope.analysis.causal.refusal_heads import HeadTrial, cliff_heads
from reasonscope.analysis.results import Result, result_path, undefined
from reasonscope.analysis.runs.context import Study, stored
from reasonscope.analysis.runs.options import (
    CliffOptions,
    EmergentHeadsOptions,
    MiCompareOptions,
    MisalignmentOptions,
    SelectionOptions,
)
from reasonscope.analysis.runs.per_trace import PerTraceAnalysis, Run, per_trace_analysis
from reasonscope.analysis.tokens.mi import (
    comparison,
    gold_text,
    mi_of_trace,
    representations,
)
from reasonscope.analysis.tokens.misalignment import misalignment_of_trace
from reasonscope.analysis.traces.selection import Rule, best_by, early_stop, majority, short_m, simulate
from reasonscope.analysis.traces.trajectory import segment_length, trajectory_of_trace
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.trace import Sampling, Trace
from reasonscope.data.variants import Region
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import has_cliff
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.recording import as_numpy
from reasonscope.probes.models.model import Model
from reasonscope.probes.properties.refusal_cliff import token_scores
from reasonscope.steering.vectors.scope import Scope

_STOPS = (0.5, 0.7, 0.9)  # of a probe's probability


def _analyse_cliff(study: Study[CliffOptions]) -> Iterator[Result]:
    """Which heads write the refusal probe up or down at the end of the close window, over all requests of the run."""
    path = study.options.probe
    if path is None or not path.exists():
        raise InputError(
            f"{path} does not exist; fit a probe with: reasonscope probe refusal --run RUN, or name one with --probe"
        )
    requests = [t for t in study.traces if "harmful" in t.problem.meta and has_cliff(t)]
    if len(requests) < 2:
        raise InputError(
            f"{len(requests)} requests with closed thinking and an answer among the traces; two or more are needed"
        )
    probe, options = LinearProbe.load(path), study.options
    yield probe_write_result(study.model, probe, requests, seed=options.seed)
    if options.ablate:
        chosen_by, trial = _trial(study, requests)
        scope = Scope.of(study.model, on="close_window") if options.at_close else None
        yield cliff_heads(
            study.model,
            probe,
            chosen_by,
            trial,
            share=options.share,
            scope=scope,
            n_controls=options.n_controls,
            seed=options.seed,
        )


def _random_half(requests: Sequence[Trace], seed: int) -> set[str]:
    """Half of the groups of problems."""
    groups = sorted({trace.problem.group for trace in requests})
    random.Random(seed).shuffle(groups)
    return set(groups[: len(groups) // 2])


def _trial(study: Study[CliffOptions], requests: Sequence[Trace]) -> tuple[Sequence[Trace], HeadTrial]:
    """The traces that choose the heads, and what is asked without these: a file's requests, or half of the run's own.

    The heads are not judged on requests that they were chosen by. Accuracy is that on the run's problems with a gold answer.
    """
    options, by_id = study.options, {trace.problem.id: trace.problem for trace in study.store}
    if options.requests:
        chosen_by, asked = requests, load_problems(options.requests)
    else:
        half = _random_half(requests, options.seed)
        chosen_by = [trace for trace in requests if trace.problem.group not in half]
        asked = [problem for problem in by_id.values() if problem.group in half]
    harmful, benign = ([p for p in asked if p.meta.get("harmful") is which][: options.asked] for which in (True, False))
    if len(harmful) < 2:
        raise InputError(
            f"{len(harmful)} harmful requests to ask without the heads; record more requests, or give a problem file with "
            '"meta": {"harmful": true} or false by --requests'
        )
    solved = [p for p in by_id.values() if "harmful" not in p.meta and p.answer is not None][: options.asked]
    sampling = Sampling(temperature=options.temperature, max_new_tokens=options.max_new_tokens, seed=options.seed)
    benign, solved = (few if len(few) > 1 else [] for few in (benign, solved))
    return chosen_by, HeadTrial(harmful=harmful, benign=benign, solved=solved, sampling=sampling)


def _analyse_emergent_heads(study: Study[EmergentHeadsOptions]) -> Iterator[Result]:
    """Which heads carry more in the model than in its base model, on how each of the two opens the run's problems."""
    if study.options.float32_compute:
        raise InputError("edge attribution needs gradients, which --float32-compute blocks; leave the option out")
    problems = list({trace.problem.id: trace.problem for trace in study.traces}.values())
    pairs = opening_pairs(study.base, study.model, problems)
    yield emergent_heads(study.base, study.model, pairs, seed=study.options.seed)


def _read_by_both(study: Study[MiCompareOptions], trace: Trace) -> Iterator[Result]:
    """The base model's curve of a trace; `numbers` also holds those of the reasoner, under `reasoner`."""
    if reason := missing_thinking(trace, study.options.region):
        common = {"method": "mi_base", "quantity": "MI of the base model", "unit": "1"}
        yield undefined(**common, reason=reason, provenance={"trace": trace.id})
        return
    site = _last(study)
    base, own = (_mi_as_read(model, study, trace, site) for model in (study.base, study.model))
    yield replace(base, method="mi_base").with_numbers(reasoner=own.numbers).with_provenance(model=study.base.name)


def _mi_as_read(model: Model, study: Study[MiCompareOptions], trace: Trace, site: Site) -> Result:
    gold = representations(model, [gold_text(trace, study.options.gold)], [site])[0]
    (seen,) = replay(model, [trace.token_ids.tolist()], [site])
    states = {site: as_numpy(seen[site])}
    options = study.options
    return mi_of_trace(trace, states, gold, sentences=trace_sentences(trace), region=options.region, seed=options.seed)


def missing_thinking(trace: Trace, region: Region) -> str:
    """Why there is nothing to look at in a region of a trace; empty if there is something."""
    if region == "generated" or trace.state in ("closed", "truncated"):
        return ""
    return f"the trace has no thinking ({trace.state}); --region generated looks at all that was generated"


def _compared(study: Study[MiCompareOptions], results: Sequence[Result]) -> Iterator[Result]:
    measured = [base for base in results if base.measured]
    own = [replace(base, numbers=base.numbers["reasoner"]) for base in measured]
    yield comparison(measured, own, site=str(_last(study)), seed=study.options.seed)


def _last(study: Study[MiCompareOptions]) -> Site:
    return Site("resid_post", study.model.n_layers - 1)


# MI of the same traces, read by the base model and by the reasoner.
_analyse_mi_compare = PerTraceAnalysis(per_trace=_read_by_both, aggregate=_compared)


def _analyse_selection(study: Study[SelectionOptions]) -> Iterator[Result]:
    """Accuracy and tokens of selection rules on the stored samples. Needs several samples of each problem.

    With a probe, all rules are judged on the problems that it did not learn from.
    """
    probe = None if study.options.probe is None else LinearProbe.load(study.options.probe)
    if probe is not None:
        study = replace(study, traces=probe.unseen(study.traces))
    rules: dict[str, Rule] = {"majority": majority}
    rules |= {f"short-{m}": short_m(m) for m in sorted({1, max(study.options.k // 2, 1)})}
    scores = {trace.id: _straight(study, trace) for trace in study.traces} if study.sites else {}
    if any(np.isfinite(value) for value in scores.values()):
        rules["straightest trajectory"] = best_by(lambda trace: scores[trace.id])
    if probe is not None:
        rules |= _early_stops(study, probe)
    yield simulate(study.traces, rules, k=study.options.k, seed=study.options.seed)


def _early_stops(study: Study[SelectionOptions], probe: LinearProbe) -> dict[str, Rule]:
    """Stop where the probe is first above a threshold, with the answers that `analyse confidence` forced there.

    The control stops by the scores of another trace: as often and as early, but at places that mean nothing.
    """
    scores: dict[str, Values] = {}
    answers: dict[str, list[str | None]] = {}
    for trace in study.traces:
        kept = result_path(study.results, "confidence", trace.id)
        if not kept.exists():
            raise InputError(
                f"forced answers of {trace.id!r} are missing; make them with: reasonscope analyse confidence --run RUN"
            )
        found = Result.load(kept)
        cuts = np.asarray(found.arrays.get("cuts", ()), dtype=np.int64)[1:]  # empty if confidence was not measured
        scores[trace.id] = token_scores(probe, study.store, trace)[cuts - 1]
        answers[trace.id] = [row[0] for row in found.numbers.get("answers", ())][1:]
    ids = list(scores)
    other = dict(zip(ids, [*ids[len(ids) // 2 :], *ids[: len(ids) // 2]], strict=True))

    def stop(threshold: float, of: Mapping[str, str]) -> Rule:
        def told(trace: Trace) -> Values:
            return (
                scores[of[trace.id]] if answers[trace.id] else np.zeros(0)
            )  # a trace without thinking cannot be stopped

        return early_stop(told, threshold, lambda trace, at: answers[trace.id][at])

    rules = {f"stop above {threshold}": stop(threshold, {id: id for id in ids}) for threshold in _STOPS}
    return rules | {f"stop above {threshold}, another trace's scores": stop(threshold, other) for threshold in _STOPS}


def _straight(study: Study[SelectionOptions], trace: Trace) -> float:
    """Aligned change over the stored streams; NaN if the thinking has fewer than two segments."""
    found = trajectory_of_trace(
        trace,
        partial(stored, study.store, trace.id),
        study.sites,
        block=study.options.block or segment_length(study.store),
        n_controls=2,
    )
    line = found.at(signal="aligned")
    return float(np.nanmean(line)) if np.isfinite(line).any() else float("nan")


@per_trace_analysis
def _analyse_misalignment(study: Study[MisalignmentOptions], trace: Trace) -> Iterator[Result]:
    """How much of a trace the base model would have written otherwise."""
    yield misalignment_of_trace(study.base, study.model, trace, trace_sentences(trace))


COMPARISONS: Mapping[str, Run] = {
    "cliff": _analyse_cliff,
    "emergent_heads": _analyse_emergent_heads,
    "mi_compare": _analyse_mi_compare,
    "selection": _analyse_selection,
    "misalignment": _analyse_misalignment,
}
