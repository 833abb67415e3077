"""What `reasonscope analyse` runs: each analysis of a run, trace by trace, from the store and, where it needs one, the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reasonscope.analysis import figures
from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.analysis.anchors.published import published_dependencies, published_importances, with_importances
from reasonscope.analysis.anchors.replacement import replacement_effects, resampled_alternatives
from reasonscope.analysis.anchors.rollouts import anchors_of_trace, resample
from reasonscope.analysis.attention.close_attention import close_attention
from reasonscope.analysis.attention.head_profiles import head_table
from reasonscope.analysis.attention.receiver_heads import head_kurtosis, receiver_scores, receivers_of
from reasonscope.analysis.attention.recurrence import recurrence
from reasonscope.analysis.attention.vertical_scores import top_heads
from reasonscope.analysis.causal.suppression import suppression_matrix
from reasonscope.analysis.figures import Figure
from reasonscope.analysis.results import Axis, Band, Result, result_path, undefined
from reasonscope.analysis.runs.comparisons import (
    analyse_cliff,
    analyse_emergent_heads,
    analyse_mi_compare,
    analyse_misalignment,
    analyse_selection,
)
from reasonscope.analysis.runs.context import Options, Study, stored, trace_sentences
from reasonscope.analysis.runs.inspections import analyse_alternatives, analyse_attention_map, analyse_steering_shift
from reasonscope.analysis.runs.per_trace import PerTraceAnalysis, per_trace_analysis
from reasonscope.analysis.statistics import agreement_numbers, dependency_agreement
from reasonscope.analysis.tokens.confidence import confidence_of_trace
from reasonscope.analysis.tokens.entropy import entropy_of_trace
from reasonscope.analysis.tokens.forced_answers import closing_stub, decoder, encoder, forced_answers
from reasonscope.analysis.tokens.mi import mi_of_trace, peak_words, thinking_token_table
from reasonscope.analysis.tokens.token_alternatives import head_effects
from reasonscope.analysis.traces.agreement import METHODS, signal_agreement, signals_of
from reasonscope.analysis.traces.reflection import failed_step_fraction, reflection_of_trace, unused_steps
from reasonscope.analysis.traces.trajectory import trajectory_of_trace
from reasonscope.data.errors import InputError
from reasonscope.data.organism.truth import true_sentences
from reasonscope.data.text.answers import equivalent
from reasonscope.data.text.parse import THINK
from reasonscope.data.trace import Sampling, Sentence, Trace
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site


def _mi(study: Study, trace: Trace) -> Iterator[Result]:
    if not study.sites:
        yield _undefined(trace, "mi", "no residual stream was stored; record with --sites resid_post.*")
        return
    hidden = {site: study.store.activations(trace.id, str(site)) for site in study.sites}
    others = {t.problem.id: t for t in study.traces if t.problem.group != trace.problem.group}
    golds = [study.gold(other) for other in list(others.values())[:20]]
    yield mi_of_trace(
        trace, hidden, study.gold(trace), golds, sentences=trace_sentences(trace), seed=study.options.seed
    )


def _mi_words(study: Study, results: Sequence[Result]) -> Iterator[Result]:
    found = zip(study.traces, results, strict=True)
    words = [(peak_words(trace, r), np.asarray(r.arrays["peaks"])[-1]) for trace, r in found if r.measured]
    if any(mask.any() for _, mask in words):
        yield _word_table(words, study)


# MI peaks of each trace, then the words at the peaks of all of them.
analyse_mi = PerTraceAnalysis(per_trace=_mi, aggregate=_mi_words)


def _word_table(words: Sequence[tuple[Sequence[str], Any]], study: Study) -> Result:
    rows = thinking_token_table([line for line, _ in words], [mask for _, mask in words], seed=study.options.seed)
    shown = rows[:30]
    return Result(
        method="mi",
        quantity="enrichment of a word at peaks",
        unit="1",
        axes=(Axis.of("word", [row.word for row in shown]),),
        values=np.array([row.enrichment for row in shown]),
        null=Band.of(1.0, 1.0, (len(shown),), "the share of peaks among all tokens"),
        numbers={"words": {row.word: asdict(row) for row in shown}},
        provenance={"trace": "all", "seed": study.options.seed},
    )


@per_trace_analysis
def analyse_anchors(study: Study, trace: Trace) -> Iterator[Result]:
    """Published importances where a trace came with them; else rollouts from before every sentence, and the truth where it is known."""
    if trace.meta.get("chunks") or not study.has_model:
        yield published_importances(trace)
        return
    known = trace_sentences(trace)
    study.progress(f"rollouts of {trace.id}: {len(known)} sentences")
    yield from _anchors(study, trace, known, study.options)


def _anchors(study: Study, trace: Trace, known: Sequence[Sentence], options: Options) -> Iterator[Result]:
    """Importances by rollouts; then what each sentence passes on, by the sentences that were written in its place."""
    if len(known) < 2:
        yield anchors_of_trace(trace, known, {})
        return
    sampling = Sampling(temperature=options.temperature, max_new_tokens=options.max_new_tokens, seed=options.seed)
    plan = Allotment(least=min(20, options.rollouts), most=options.rollouts, half_width=options.half_width)
    tags = study.model.tags or THINK
    decode = decoder(study.model.tokenizer_backend)
    continued = resample(study.writer, trace, known, decode, sampling, allotment=plan, tags=tags)
    stub = closing_stub(trace, encoder(study.model.tokenizer_backend), tags=tags)
    cuts = [s.tokens.start for s in known] + [known[-1].tokens.stop]
    forced = forced_answers(
        study.writer, trace, cuts, stub, decode, samples=min(options.rollouts, 20),
        sampling=Sampling(temperature=options.temperature, max_new_tokens=32, seed=options.seed),
    )  # fmt: skip
    found = anchors_of_trace(trace, known, continued, forced=forced, seed=options.seed)
    yield _judged(found, "effects", trace, options.seed)
    if options.server is None:  # a server reads no text for us
        others = resampled_alternatives(known, continued)
        codec = encoder(study.model.tokenizer_backend), decode
        yield _judged(
            replacement_effects(study.model, trace, known, others, *codec, seed=options.seed), "", trace, options.seed
        )


def _judged(found: Result, name: str, trace: Trace, seed: int) -> Result:
    """With how well the effects (an array, or the values) find the true dependencies, where these are known."""
    if "ledger" not in trace.problem.meta or not found.measured:
        return found
    truth = true_sentences(trace)[1]
    found = found.with_numbers(depends_on=[list(row) for row in truth])
    try:
        agreement = dependency_agreement(np.asarray(found.arrays[name] if name else found.values), truth, seed=seed)
    except InputError as error:  # a thinking of two sentences has no pair to tell from another
        return found.with_numbers(dependencies=None, dependencies_missing=str(error))
    return found.with_numbers(dependencies=agreement_numbers(agreement))


@per_trace_analysis
def analyse_trajectory(study: Study, trace: Trace) -> Iterator[Result]:
    """Latent-trajectory signals of each trace at every stored residual stream."""
    sites = [Site.parse(site) for site in study.store.sites if Site.parse(site).point == "resid_post"]
    if study.options.sites:
        sites = list(study.sites)
    if not sites:
        yield _undefined(trace, "trajectory", "no residual stream was stored; record with --sites resid_post.*")
        return
    yield trajectory_of_trace(
        trace,
        partial(stored, study.store, trace.id),
        sites,
        block=study.options.block,
        seed=study.options.seed,
    )


@per_trace_analysis
def analyse_entropy(study: Study, trace: Trace) -> Iterator[Result]:
    """Token entropies of each trace as they were recorded."""
    yield entropy_of_trace(trace, sentences=trace_sentences(trace), seed=study.options.seed)


@per_trace_analysis
def analyse_confidence(study: Study, trace: Trace) -> Iterator[Result]:
    """Confidence of each trace by forced answers at eleven cuts."""
    answers, i = [other.final_answer for other in study.traces], [other.id for other in study.traces].index(trace.id)
    others = [*answers[i + 1 :], *answers[:i]]
    foreign = next((answer for answer in others if answer and not equivalent(answer, trace.final_answer or "")), None)
    yield confidence_of_trace(
        study.writer,
        trace,
        closing_stub(trace, encoder(study.model.tokenizer_backend), tags=study.model.tags or THINK),
        decoder(study.model.tokenizer_backend),
        samples=study.options.samples,
        foreign=foreign,
        sampling=Sampling(temperature=study.options.temperature, max_new_tokens=32, seed=study.options.seed),
    )


@per_trace_analysis
def analyse_reflection(study: Study, trace: Trace) -> Iterator[Result]:
    """Candidate answers of each trace, and what its thinking does behind the first: of the text alone.

    Where the dependencies of its sentences are known, also the share of them that the last one does not hang on.
    """
    found = reflection_of_trace(trace, trace_sentences(trace), seed=study.options.seed)
    depends = known_dependencies(trace)
    yield found.with_numbers(
        failed_step_fraction=failed_step_fraction(unused_steps(depends).tolist()) if depends else None
    )


def known_dependencies(trace: Trace) -> Sequence[Sequence[int]]:
    """The earlier sentences that each sentence depends on: the grammar's, or those that were published; empty where nobody said."""
    if "ledger" in trace.problem.meta:
        return true_sentences(trace)[1]
    return published_dependencies(trace.meta.get("chunks", ()))


def _kurtosis(study: Study, trace: Trace) -> Iterator[Result]:
    yield head_kurtosis(study.model, trace)


def _receivers(study: Study, results: Sequence[Result]) -> Iterator[Result]:
    yield receivers_of(results, seed=study.options.seed)


def _looked_at(found: Sequence[Result]) -> PerTraceAnalysis:
    heads = top_heads(found[0].values, from_layer=1) if found[0].measured else []
    return PerTraceAnalysis(per_trace=partial(_receiver_scores, heads))


def _receiver_scores(heads: Sequence[Head], study: Study, trace: Trace) -> Iterator[Result]:
    if heads:
        yield receiver_scores(study.model, trace, heads, seed=study.options.seed)


# How peaked each head is on each trace, the receiver heads over all of them, then how much these look at each sentence of each trace.
analyse_receivers = PerTraceAnalysis(per_trace=_kurtosis, aggregate=_receivers, next_stage=_looked_at)


@per_trace_analysis
def analyse_suppression(study: Study, trace: Trace) -> Iterator[Result]:
    """What each sentence owes to each earlier one, by keeping it out of sight."""
    yield suppression_matrix(study.model, trace, seed=study.options.seed)


@per_trace_analysis
def analyse_heads(study: Study, trace: Trace) -> Iterator[Result]:
    """What each head looks at, trace by trace, and what is foretold without it; what the closing tag looks at, what is looked at again."""
    known = trace_sentences(trace)
    yield head_table(study.model, trace, known, seed=study.options.seed)
    yield head_effects(study.model, trace, known, seed=study.options.seed)
    yield close_attention(study.model, trace)
    yield recurrence(study.model, trace, known, seed=study.options.seed)


def _summary(study: Study, trace: Trace) -> Iterator[Result]:
    known = trace_sentences(trace)
    results = {path.parent.name: Result.load(path) for path in _signals(study, trace)}
    yield signal_agreement(trace, known, signals_of(results, known), seed=study.options.seed)


def _signals(study: Study, trace: Trace) -> Iterator[Path]:
    paths = (result_path(study.results, method, trace.id) for method in METHODS)
    return (path for path in paths if path.exists())


# The signals that were saved of each trace, side by side by sentence, and where they agree.
analyse_agreement = PerTraceAnalysis(per_trace=_summary, depends_on=_signals)


ANALYSES: Mapping[str, Callable[[Study], Iterator[Result]]] = {
    "mi": analyse_mi,
    "anchors": analyse_anchors,
    "receivers": analyse_receivers,
    "suppression": analyse_suppression,
    "heads": analyse_heads,
    "cliff": analyse_cliff,
    "emergent_heads": analyse_emergent_heads,
    "mi_compare": analyse_mi_compare,
    "selection": analyse_selection,
    "misalignment": analyse_misalignment,
    "trajectory": analyse_trajectory,
    "entropy": analyse_entropy,
    "confidence": analyse_confidence,
    "reflection": analyse_reflection,
    "alternatives": analyse_alternatives,
    "steering_shift": analyse_steering_shift,
    "attention_map": analyse_attention_map,
    "agreement": analyse_agreement,
}


def analyses() -> dict[str, str]:
    """Every analysis that `analyse` runs, with one line on what it measures."""
    return {name: (analysis.__doc__ or "").split("\n")[0] for name, analysis in ANALYSES.items()}


def exportable(traces: Iterable[Trace], folder: Path) -> Iterator[Trace]:
    """The traces with the importances that were measured here, as the published layout has them; others as they are."""
    for trace in traces:
        path = result_path(folder, "anchors", trace.id)
        if trace.meta.get("chunks") or not path.exists():
            yield trace
            continue
        result = Result.load(path)
        yield with_importances(trace, trace_sentences(trace), result) if result.measured else trace


def figures_of(result: Result) -> dict[str, Figure]:
    """The figures of a result by name; none where nothing was measured."""
    return {} if not result.measured else figures.of_result(result)


def numbers_of(result: Result) -> dict[str, Any]:
    """What the command shows of a result: which trace, what was measured, and its numbers, without its long texts."""
    long = ("texts", "tags", "answers", "depends_on", "resampled", "pieces")
    shown = {key: value for key, value in result.numbers.items() if key not in long}
    return {
        "method": result.method,
        "quantity": result.quantity,
        "unit": result.unit,
        "state": "measured" if result.measured else "undefined",
        **({"reason": result.reason} if result.reason else {}),
        "null": result.null.what if result.null else result.null_missing or "none",
        "mean": {label: float(np.nanmean(line)) for label, line in _lines(result)} if result.measured else None,
        **shown,
    }


def _lines(result: Result) -> Iterator[tuple[str, Any]]:
    """Each line of a result along its last axis, those without a number left out."""
    labels = result.axes[0].labels if len(result.axes) > 1 else (result.quantity,)
    for label, line in zip(labels, result.values.reshape(len(labels), -1), strict=True):
        if np.isfinite(line).any():
            yield label, line


def _undefined(trace: Trace, method: str, reason: str) -> Result:
    return undefined(method=method, quantity=method, unit="1", reason=reason, provenance={"trace": trace.id})
