"""Steps that analyse traces: any analysis of `reasonscope analyse` on chosen traces, and the model without the words of MI peaks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from reasonscope.analysis.figures import of_result, write_figure
from reasonscope.analysis.results import Result, file_name, result_path
from reasonscope.analysis.runs.options import LoadsModel, Writes, make_options
from reasonscope.analysis.runs.questions import QUESTIONS
from reasonscope.analysis.runs.registry import numbers_of
from reasonscope.analysis.runs.runner import AnalysisTask, run_analysis, summarise
from reasonscope.analysis.studies.lab import Lab
from reasonscope.analysis.studies.reading import check_known
from reasonscope.analysis.studies.steps.base import Outcome, Step, Work
from reasonscope.analysis.tokens.thinking_tokens import token_suppression
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import mean_estimate
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.run_folder import RunFolder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_words
from reasonscope.data.trace import Trace
from reasonscope.steering.experiments.held_out import sampling_of_run

_SENTENCES = 25  # of a trace, for the estimate
_ANSWER = 24  # tokens of a forced answer


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Which traces to analyse, in the order of their ids.

    Attributes:
        n: At most so many.
        correct: Only right ones, or only wrong ones.
        state: Only those whose thinking is closed, truncated or absent.
        least: With at least so many thinking tokens.
        most: With at most so many.
    """

    n: int | None = None
    correct: bool | None = None
    state: str | None = None
    least: int = 0
    most: int | None = None

    def of(self, store: TraceStore) -> list[Trace]:
        """The chosen traces. Raises InputError if no trace fits."""
        found = sorted((trace for trace in store if self._fits(trace)), key=lambda trace: trace.id)[: self.n]
        if not found:
            raise InputError(f"no trace of {store.path} is as asked for ({self}); ask for less")
        return found

    def _fits(self, trace: Trace) -> bool:
        long_enough = self.least <= trace.n_thinking_tokens <= (self.most or trace.n_thinking_tokens)
        right = self.correct is None or trace.correct is self.correct
        return long_enough and right and self.state in (None, trace.state)


@dataclass(frozen=True, kw_only=True)
class AnalyseStep(Step):
    """Run an analysis of `reasonscope analyse` over a run.

    Attributes:
        analyse: The analysis, such as mi, receivers, suppression, anchors, agreement.
        run: The step that recorded the run.
        traces: Which traces; all if not given.
        options: Options of this analysis, with underscores.
    """

    kind: ClassVar[str] = "analyse"

    analyse: str
    run: str
    traces: _Choice = _Choice()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_known(self.analyse, QUESTIONS, "unknown analysis")
        make_options(QUESTIONS[self.analyse].options, self.options)

    def work(self, lab: Lab) -> Work:
        recorded: Any = lab.plan.steps[self.run]
        n = int(len(lab.problems(recorded.problems)) * recorded.samples)
        return self._per_trace(recorded.max_new_tokens) * min(n, self.traces.n or n)

    def _per_trace(self, tokens: int) -> Work:
        told: Any = make_options(QUESTIONS[self.analyse].options, self.options)
        if self.analyse == "anchors":
            most = min(told.max_new_tokens, tokens)
            return Work(written=_SENTENCES * told.rollouts * most / 2.0, read=_SENTENCES * tokens, disk=20e6)
        if self.analyse == "confidence":
            return Work(written=11.0 * told.samples * _ANSWER, read=11.0 * tokens, disk=5e6)
        passes = {"suppression": _SENTENCES, "heads": _SENTENCES, "mi": 2}.get(self.analyse, 1)
        return Work(read=float(passes * tokens) if QUESTIONS[self.analyse].needs_model else 0.0, disk=10e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        lab.drop_model()  # the analysis loads its own
        store, where = lab.store(self.run), lab.where(self.run)
        chosen = [trace.id for trace in self.traces.of(store)]
        told = {**self._loading(lab), **self.options}
        task = AnalysisTask.of(where.results, self.analyse, traces=chosen, **told)
        results = list(run_analysis(task))
        if not any(result.measured for result in results):
            raise InputError(next((result.reason for result in results if result.reason), "no result"))
        numbers: dict[str, Any] = {f"{_of(result)}, {result.method}": numbers_of(result) for result in results}
        numbers["mean"] = _over_traces(results, {id: store.trace(id).problem.group for id in chosen})
        files = [result_path(where.analyses, result.method, _of(result)) for result in results]
        drawn = _drawn(where, results)
        return Outcome(summaries=(summarise(task, results),), numbers=numbers, files=(*files, *drawn), figures=drawn)

    def _loading(self, lab: Lab) -> dict[str, Any]:
        """The options that say how the model is loaded, and which server writes."""
        kind = QUESTIONS[self.analyse].options
        known = {told.name for told in fields(LoadsModel)} if issubclass(kind, LoadsModel) else set()
        loading = {name: value for name, value in lab.plan.load.items() if name in known}
        if issubclass(kind, LoadsModel):
            loading["model"] = lab.plan.model
        if issubclass(kind, Writes) and lab.server is not None:
            loading |= {"server": lab.server.url, "served_as": lab.server.served_as}
        return {"seed": lab.plan.seed, **loading} if "seed" in {told.name for told in fields(kind)} else loading


@dataclass(frozen=True, kw_only=True)
class SuppressWordsStep(Step):
    """Forbid the words that are more frequent at MI peaks than elsewhere, next to random tokens of equal frequency.

    Attributes:
        words_of: The step that analysed mi.
        run: The run whose sampling is used.
        problems: What is judged on: sets or parts.
        most: At most so many words, those with the highest enrichment.
        n_controls: Random sets of tokens.
        batch_size: Completions that are written together.
    """

    kind: ClassVar[str] = "suppress_words"

    words_of: str
    run: str
    problems: tuple[str, ...]
    most: int = 10
    n_controls: int = 5
    batch_size: int = 32

    def work(self, lab: Lab) -> Work:
        recorded: Any = lab.plan.steps[self.run]
        arms = 2 + self.n_controls
        return Work(written=float(len(lab.problems(self.problems)) * recorded.max_new_tokens * arms), disk=6e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        where = lab.where(self.run)
        words = self._words(Result.load(result_path(where.analyses, "mi", "all")))
        found = token_suppression(
            lab.model_of(self.run),
            lab.problems(self.problems),
            sampling_of_run(lab.store(self.run), lab.plan.seed),
            words=words,
            n_controls=self.n_controls,
            batch_size=self.batch_size,
            seed=lab.plan.seed,
        ).with_numbers(words=list(words))
        paths = [found.save(result_path(where.analyses, found.method, "all"))]
        drawn = _drawn(where, [found])
        return Outcome(
            summaries=(_suppression_summary(found, words),),
            numbers=numbers_of(found),
            files=(*paths, *drawn),
            figures=tuple(drawn),
        )

    def _words(self, found: Result) -> tuple[str, ...]:
        """The words at peaks whose enrichment is significant, or the most enriched if none is."""
        table = found.numbers.get("words", {})
        above = [word for word, row in table.items() if row["enrichment"] > 1]
        sure = [word for word in above if _is_sure(table[word])]
        chosen = (sure or above)[: self.most]
        if not chosen:
            raise InputError("no word stands more often at MI peaks than elsewhere; there is nothing to forbid")
        return tuple(chosen)


def _is_sure(row: Mapping[str, Any]) -> bool:
    """Whether a word is more frequent at peaks than chance makes it, after correction for the number of words."""
    return bool(row.get("q_value", 1.0) <= 0.05)


def _suppression_summary(found: Result, words: Sequence[str]) -> Summary:
    arms = found.axes[0].labels
    metrics = found.axes[1].labels
    rows = [(arm, *(in_words(float(found.values[i, j])) for j in range(len(metrics)))) for i, arm in enumerate(arms)]
    return Summary(
        finding=f"The model without {', '.join(repr(word.strip()) for word in words)}, beside the model without random tokens.",
        columns=("arm", *metrics),
        rows=rows,
    )


def _drawn(where: RunFolder, results: Sequence[Result]) -> tuple[Path, ...]:
    """The figures of the first result of each method, written as JSON."""
    make_folder(where.figures)
    first = {result.method: result for result in reversed(results) if result.measured}
    found = []
    for result in first.values():
        for kind, figure in of_result(result).items():
            found.append(where.figures / f"{result.method}-{file_name(_of(result))}-{kind}.json")
            write_figure(figure, found[-1])
    return tuple(found)


def _over_traces(results: Sequence[Result], groups: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The mean over traces of each number of each method, with its interval over groups of problems, if two groups have it."""
    values: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for result in results:
        if result.measured and _of(result) in groups:
            for name, number in _scalars(result.numbers):
                values.setdefault((result.method, name), []).append((groups[_of(result)], number))
    found: dict[str, dict[str, Any]] = {}
    for (method, name), pairs in values.items():
        if len({group for group, _ in pairs}) > 1:
            mean = mean_estimate([number for _, number in pairs], groups=[group for group, _ in pairs])
            found.setdefault(method, {})[name] = {**mean.to_dict(), "n": len(pairs)}
    return found


def _scalars(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers by name, such as `resid_post.22 share_above_null`; of an estimate its value."""
    for key, value in numbers.items():
        if isinstance(value, Mapping):
            inner = value.get("value")
            yield from _scalars(
                {key: inner} if isinstance(inner, int | float) else value,
                f"{prefix}{key} " if inner is None else prefix,
            )
        elif isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            yield f"{prefix}{key}", float(value)


def _of(result: Result) -> str:
    return str(result.provenance.get("trace", "all"))
