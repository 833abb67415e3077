"""What `reasonscope analyse` runs: each analysis of a run, from its store and, if it needs one, the model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from reasonscope.analysis.anchors import summaries as anchors
from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.analysis.anchors.published import published_dependencies, published_importances, with_importances
from reasonscope.analysis.anchors.replacement import replacement_effects, resampled_alternatives
from reasonscope.analysis.anchors.rollouts import anchors_of_trace, resample
from reasonscope.analysis.attention import summaries as attention
from reasonscope.analysis.attention.close_attention import close_attention
from reasonscope.analysis.attention.head_profiles import head_table
from reasonscope.analysis.attention.receiver_heads import head_kurtosis, receiver_scores, receivers_of
from reasonscope.analysis.attention.recurrence import recurrence
from reasonscope.analysis.attention.vertical import top_heads
from reasonscope.analysis.causal import summaries as causal
from reasonscope.analysis.causal.attribution_patching import head_attribution, heads_are_few
from reasonscope.analysis.causal.suppression import suppression_matrix
from reasonscope.analysis.results import Axis, Band, Result, result_path, undefined
from reasonscope.analysis.runs.comparisons import COMPARISONS, missing_thinking
from reasonscope.analysis.runs.context import Study, stored
from reasonscope.analysis.runs.inspections import INSPECTIONS
from reasonscope.analysis.runs.options import (
    AnchorsOptions,
    ConfidenceOptions,
    HeadsOptions,
    MiOptions,
    ReadsThroughModel,
    ReceiversOptions,
    Seeded,
    TrajectoryOptions,
)
from reasonscope.analysis.runs.per_trace import PerTraceAnalysis, Run, per_trace_analysis
from reasonscope.analysis.runs.questions import QUESTIONS, Question
from reasonscope.analysis.statistics import agreement_numbers, dependency_agreement
from reasonscope.analysis.tokens import summaries as tokens
from reasonscope.analysis.tokens.confidence import confidence_of_trace
from reasonscope.analysis.tokens.entropy import entropy_of_trace
from reasonscope.analysis.tokens.mi import MOST_OTHERS, mi_of_trace, peak_words, thinking_token_table
from reasonscope.analysis.tokens.token_alternatives import head_effects, with_entropies
from reasonscope.analysis.traces import summaries as traces
from reasonscope.analysis.traces.agreement import METHODS, signal_agreement, signals_of
from reasonscope.analysis.traces.reflection import failed_step_fraction, reflection_of_trace, unused_steps
from reasonscope.analysis.traces.trajectory import segment_length, trajectory_of_trace
from reasonscope.analysis.wording import Summarise
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import counted, say, working
from reasonscope.data.sentence_cut import cut_hash, cut_trace, trace_sentences
from reasonscope.data.text.answers import equivalent
from reasonscope.data.trace import Sampling, Sentence, Trace
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.forced_answers import closing_stub, forced_answers


def _mi(study: Study[MiOptions], trace: Trace) -> Iterator[Result]:
    if not study.sites:
        yield _undefined(trace, "mi", "no residual stream was stored; record with --sites resid_post.*")
        return
    if reason := missing_thinking(trace, study.options.region):
        yield _undefined(trace, "mi", reason)
        return
    hidden = {site: study.store.activations(trace.id, str(site)) for site in study.sites}
    with working("reading answers", total=MOST_OTHERS, unit="answers") as work:
        golds = list(islice(counted(_foreign_golds(study, trace), work), MOST_OTHERS))
    yield mi_of_trace(
        trace,
        hidden,
        study.gold(trace),
        golds,
        sentences=trace_sentences(trace),
        region=study.options.region,
        seed=study.options.seed,
    )


def _foreign_golds(study: Study[MiOptions], trace: Trace) -> Iterator[Mapping[Site, Values]]:
    """Answers of other problems, from all that the run holds, also when one trace is analysed; those without an answer are left out."""
    seen = {trace.problem.group}
    for other in study.store:
        if other.problem.group not in seen:
            seen.add(other.problem.group)
            with suppress(InputError):
                yield study.gold(other)


def _mi_words(study: Study[MiOptions], results: Sequence[Result]) -> Iterator[Result]:
    found = zip(study.traces, results, strict=True)
    words = [(peak_words(trace, r), np.asarray(r.arrays["peaks"])[-1]) for trace, r in found if r.measured]
    if any(mask.any() for _, mask in words):
        yield _word_table(words, study)


# MI peaks of each trace, then the words at the peaks of all traces.
_analyse_mi = PerTraceAnalysis(per_trace=_mi, aggregate=_mi_words)


def _word_table(words: Sequence[tuple[Sequence[str], Any]], study: Study[MiOptions]) -> Result:
    rows = thinking_token_table([line for line, _ in words], [mask for _, mask in words], seed=study.options.seed)[:30]
    common: dict[str, Any] = {"method": "mi", "quantity": "enrichment of a word at peaks", "unit": "1"}
    provenance = {"trace": "all", "seed": study.options.seed}
    if not rows:
        reason = "no word stands three times or more among the tokens that were looked at"
        return undefined(**common, reason=reason, axis="word", provenance=provenance)
    return Result(
        **common,
        axes=(Axis.of("word", [row.word for row in rows]),),
        values=np.array([row.enrichment for row in rows]),
        null=Band.of(1.0, 1.0, (len(rows),), "the share of peaks among all tokens"),
        numbers={"words": {row.word: asdict(row) for row in rows}},
        provenance=provenance,
    )


@per_trace_analysis
def _analyse_anchors(study: Study[AnchorsOptions], trace: Trace) -> Iterator[Result]:
    """The importances published with a trace, or by rollouts from before every sentence, and the truth if it is known."""
    if trace.meta.get("chunks") or not study.has_model:
        yield published_importances(trace)
        return
    known = trace_sentences(trace)
    yield from _anchors(study, trace, known, study.options)


def _anchors(
    study: Study[AnchorsOptions], trace: Trace, known: Sequence[Sentence], options: AnchorsOptions
) -> Iterator[Result]:
    """Importances by rollouts; then how far each sentence moves later ones, by the sentences written in its place."""
    if len(known) < 2:
        yield anchors_of_trace(trace, known, {})
        return
    sampling = Sampling(temperature=options.temperature, max_new_tokens=options.max_new_tokens, seed=options.seed)
    plan = Allotment(least=min(20, options.rollouts), most=options.rollouts, half_width=options.half_width)
    thinking = study.model.thinking
    decode = study.model.decode
    continued = resample(study.writer, trace, known, decode, sampling, allotment=plan, thinking=thinking)
    stub = closing_stub(trace, study.model.encode_continuation, thinking=thinking)
    cuts = [s.tokens.start for s in known] + [known[-1].tokens.stop]
    forced = forced_answers(
        study.writer, trace, cuts, stub, decode, samples=min(options.rollouts, 20),
        sampling=Sampling(temperature=options.temperature, max_new_tokens=32, seed=options.seed),
    )  # fmt: skip
    found = anchors_of_trace(trace, known, continued, forced=forced, seed=options.seed)
    yield _judged(found, "effects", trace, options.seed)
    if options.server is None:  # a server writes, but gives no states
        others = resampled_alternatives(known, continued)
        yield _judged(
            replacement_effects(study.model, trace, known, others, seed=options.seed), "", trace, options.seed
        )


def _judged(found: Result, name: str, trace: Trace, seed: int) -> Result:
    """Add how well the effects (an array, or the values) find the true dependencies, if these are known."""
    truth = cut_trace(trace).depends_on
    if truth is None or not found.measured:
        return found
    found = found.with_numbers(depends_on=[list(row) for row in truth])
    try:
        agreement = dependency_agreement(np.asarray(found.arrays[name] if name else found.values), truth, seed=seed)
    except InputError as error:  # two sentences have one pair, and nothing to compare it with
        return found.with_numbers(dependencies=None, dependencies_missing=str(error))
    return found.with_numbers(dependencies=agreement_numbers(agreement))


@per_trace_analysis
def _analyse_trajectory(study: Study[TrajectoryOptions], trace: Trace) -> Iterator[Result]:
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
        block=study.options.block or segment_length(study.store),
        seed=study.options.seed,
    )


@per_trace_analysis
def _analyse_entropy(study: Study[ReadsThroughModel], trace: Trace) -> Iterator[Result]:
    """Token entropies of each trace as they were recorded, or as the model reads them if a server wrote the trace."""
    recorded = trace.entropies is not None and np.isfinite(trace.entropies).any()
    if not recorded and study.store.meta.get("server"):
        trace = with_entropies(study.model, trace)
    yield entropy_of_trace(trace, sentences=trace_sentences(trace), seed=study.options.seed)


@per_trace_analysis
def _analyse_confidence(study: Study[ConfidenceOptions], trace: Trace) -> Iterator[Result]:
    """Confidence of each trace by forced answers at eleven cuts."""
    yield confidence_of_trace(
        study.writer,
        trace,
        closing_stub(trace, study.model.encode_continuation, thinking=study.model.thinking),
        study.model.decode,
        samples=study.options.samples,
        foreign=_foreign_answer(study, trace),
        sampling=Sampling(temperature=study.options.temperature, max_new_tokens=32, seed=study.options.seed),
    )


def _foreign_answer(study: Study[ConfidenceOptions], trace: Trace) -> str | None:
    """The answer of the next trace that has another one: of those that were chosen, else of the run."""
    at = [other.id for other in study.traces].index(trace.id)
    others = chain(study.traces[at + 1 :], study.traces[:at], study.store)
    answers = (other.final_answer for other in others)
    return next((answer for answer in answers if answer and not equivalent(answer, trace.final_answer or "")), None)


@per_trace_analysis
def _analyse_reflection(study: Study[Seeded], trace: Trace) -> Iterator[Result]:
    """Candidate answers of each trace, and what its thinking does after the first one. Needs the text only.

    If the dependencies of its sentences are known, also the share of sentences that the last one does not depend on.
    """
    found = reflection_of_trace(trace, trace_sentences(trace), seed=study.options.seed)
    depends = _known_dependencies(trace)
    yield found.with_numbers(
        failed_step_fraction=failed_step_fraction(unused_steps(depends).tolist()) if depends else None
    )


def _known_dependencies(trace: Trace) -> Sequence[Sequence[int]]:
    """The earlier sentences that each sentence depends on, by the grammar or as published; empty if they are not known."""
    known = cut_trace(trace).depends_on
    return published_dependencies(trace.meta.get("chunks", ())) if known is None else known


def _kurtosis(study: Study[ReceiversOptions], trace: Trace) -> Iterator[Result]:
    yield head_kurtosis(study.attention, trace)


def _receivers(study: Study[ReceiversOptions], results: Sequence[Result]) -> Iterator[Result]:
    yield receivers_of(results, seed=study.options.seed)


def _looked_at(found: Sequence[Result]) -> PerTraceAnalysis:
    heads = top_heads(found[0].values, from_layer=1) if found[0].measured else []
    return PerTraceAnalysis(per_trace=partial(_receiver_scores, heads))


def _receiver_scores(heads: Sequence[Head], study: Study[ReceiversOptions], trace: Trace) -> Iterator[Result]:
    if heads:
        yield receiver_scores(study.attention, trace, heads, seed=study.options.seed)


# How peaked each head is on each trace, then the receiver heads over all traces, then how much these look at each sentence.
_analyse_receivers = PerTraceAnalysis(per_trace=_kurtosis, aggregate=_receivers, next_stage=_looked_at)


@per_trace_analysis
def _analyse_suppression(study: Study[ReadsThroughModel], trace: Trace) -> Iterator[Result]:
    """What each sentence owes to each earlier one, by hiding the earlier one from it."""
    yield suppression_matrix(study.model, trace, seed=study.options.seed)


@per_trace_analysis
def _analyse_heads(study: Study[HeadsOptions], trace: Trace) -> Iterator[Result]:
    """What each head looks at and what is predicted without it; what the closing tag looks at, and what is looked at again."""
    known = trace_sentences(trace)
    yield head_table(study.attention, trace, known, seed=study.options.seed)
    if study.options.server is None:
        yield _without_heads(study, trace, known)
    yield close_attention(study.attention, trace)
    if study.options.server is None:
        yield recurrence(study.model, trace, known, seed=study.options.seed)
    elif trace.id == study.traces[0].id:
        say(_NOT_IN_ENGINE)


def _without_heads(study: Study[HeadsOptions], trace: Trace, known: Sequence[Sentence]) -> Result:
    """What is predicted without each head: exactly if they are few, or if that is asked for."""
    if study.options.exact or heads_are_few(study.model, trace):
        return head_effects(study.model, trace, known, seed=study.options.seed)
    return head_attribution(study.model, trace, known)


# What `heads` leaves out if vLLM reads.
_NOT_IN_ENGINE = (
    "vLLM reads what heads look at. What changes without a head (head_effects, head_attribution) needs the weights, and tokens that are "
    "looked at again (recurrence) need all heads together; both take --backend hooks."
)


def _agreement(study: Study[Seeded], trace: Trace) -> Iterator[Result]:
    known = trace_sentences(trace)
    results = {path.parent.name: Result.load(path) for path in _signals(study, trace)}
    signals = signals_of(results, known)
    yield signal_agreement(trace, known, signals.lines, left_out=signals.left_out, seed=study.options.seed)


def _signals(study: Study[Seeded], trace: Trace) -> Iterator[Path]:
    paths = (result_path(study.results, method, trace.id) for method in METHODS)
    return (path for path in paths if path.exists())


# The saved signals of each trace, sentence by sentence, and how far they agree.
_analyse_agreement = PerTraceAnalysis(per_trace=_agreement, depends_on=_signals)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """An analysis of a run: the question, and the code that answers it.

    Attributes:
        name: Its name on the command line (with dashes) and in `analyse`.
        question: What it asks, its options, and what it writes.
        run: Gives the results of a study; a `PerTraceAnalysis` can be shared out and resumed trace by trace.
        summarise: Says what the results tell, if those that the finding is about could be measured.
    """

    name: str
    question: Question
    run: Run
    summarise: Summarise

    def __call__(self, study: Study[Any]) -> Iterator[Result]:
        return self.run(study)


_RUNS: Mapping[str, Run] = {
    **COMPARISONS,
    **INSPECTIONS,
    "mi": _analyse_mi,
    "anchors": _analyse_anchors,
    "receivers": _analyse_receivers,
    "suppression": _analyse_suppression,
    "heads": _analyse_heads,
    "trajectory": _analyse_trajectory,
    "entropy": _analyse_entropy,
    "confidence": _analyse_confidence,
    "reflection": _analyse_reflection,
    "agreement": _analyse_agreement,
}
_SUMMARIES: Mapping[str, Summarise] = {
    name: summarise
    for room in (anchors, attention, causal, tokens, traces)
    for name, summarise in room.SUMMARIES.items()
}
ANALYSES: Mapping[str, Analysis] = {
    name: Analysis(name=name, question=question, run=_RUNS[name], summarise=_SUMMARIES[name])
    for name, question in QUESTIONS.items()
}


def exportable(traces: Iterable[Trace], folder: Path) -> Iterator[Trace]:
    """The traces, with the importances that were measured here in the published layout.

    Raises InputError for importances over another cut of the trace into sentences.
    """
    for trace in traces:
        path = result_path(folder, "anchors", trace.id)
        if trace.meta.get("chunks") or not path.exists():
            yield trace
            continue
        result, known = Result.load(path), trace_sentences(trace)
        if result.measured and result.provenance.get("cut") != cut_hash(known):
            raise InputError(
                f"the importances of {trace.id!r} are over another cut of the trace into sentences, or of a version that did not say over "
                f"which; run `reasonscope analyse anchors` again, or move {path} away"
            )
        yield with_importances(trace, known, result) if result.measured else trace


_MOST_VALUES = 1000  # of a result, in JSON; the file beside the run has all of them


def numbers_of(result: Result) -> dict[str, Any]:
    """A result as JSON: what was measured, its null, its values by label and its numbers, without long texts."""
    long = ("texts", "tags", "answers", "depends_on", "resampled", "pieces")
    shown = {key: value for key, value in result.numbers.items() if key not in long}
    return {
        "method": result.method,
        "quantity": result.quantity,
        "unit": result.unit,
        "state": "measured" if result.measured else "undefined",
        **({"reason": result.reason} if result.reason else {}),
        "null": result.null.what if result.null else result.null_missing or "none",
        "values": _by_label(result) if result.measured else None,
        **shown,
    }


def _by_label(result: Result) -> Any:
    """The values by the labels of each axis, with their interval and null; the shape alone if they are many."""
    if result.values.size > _MOST_VALUES:
        return {"shape": {axis.name: len(axis) for axis in result.axes}}
    bands = {"interval": result.interval, "null": result.null}

    def told(at: tuple[int, ...]) -> Any:
        if len(at) < len(result.axes):
            return {label: told((*at, i)) for i, label in enumerate(result.axes[len(at)].labels)}
        ends = {name: [float(band.low[at]), float(band.high[at])] for name, band in bands.items() if band is not None}
        return {"value": float(result.values[at]), **ends}

    return told(())


def _undefined(trace: Trace, method: str, reason: str) -> Result:
    return undefined(method=method, quantity=method, unit="1", reason=reason, provenance={"trace": trace.id})
