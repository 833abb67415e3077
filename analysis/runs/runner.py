"""Run an analysis over a run, in this process or by workers of Ray. What is finished is noted, so that a killed analysis can be resumed.

    RUN/results/<method>/<trace>.safetensors    results, with their figures in RUN/figures if asked for: written as soon as a trace is done
    RUN/unfinished/<name>-<key>/<trace>.json    during the analysis: the files of each finished trace, with their checksums
    RUN/unfinished/<name>-<key>/written/        and what a server wrote for the others

The key is made of what the results depend on: traces, options, and the files that are read. A trace whose files have changed since they
were noted (another analysis has replaced them) is analysed again.
"""

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from reasonscope.analysis.results import Result, file_name, result_path
from reasonscope.analysis.runs.context import Study
from reasonscope.analysis.runs.options import AnalysisOptions, LoadsModel, make_options
from reasonscope.analysis.runs.per_trace import PerTraceAnalysis
from reasonscope.analysis.runs.questions import Question
from reasonscope.analysis.runs.registry import ANALYSES
from reasonscope.analysis.wording import measured, undefined_result_notes, without_columns
from reasonscope.data.errors import InputError
from reasonscope.data.progress import working
from reasonscope.data.storage.durable import make_folder, sha256_of, write_text_durably
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.run_folder import RunFolder, run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary
from reasonscope.data.trace import Trace
from reasonscope.probes.generation.cluster import Cluster, work_on


@dataclass(frozen=True, kw_only=True)
class AnalysisTask:
    """An analysis of a run, as it is sent to workers.

    Attributes:
        run: The folder of the run.
        name: One of `ANALYSES`.
        options: Options of the class that this analysis takes.
        traces: Ids of the traces to analyse; all of them if None.
    """

    run: Path
    name: str
    options: AnalysisOptions
    traces: tuple[str, ...] | None = None

    @classmethod
    def of(cls, run: str | Path, name: str, *, traces: Sequence[str] | None = None, **options: Any) -> "AnalysisTask":
        """The task of an analysis by name, its options given by name. Raises InputError for a name or value that is not allowed."""
        if name not in ANALYSES:
            raise InputError(f"unknown analysis {name!r}; choose one of {', '.join(ANALYSES)}")
        told = make_options(ANALYSES[name].question.options, options)
        return cls(run=Path(run), name=name, options=told, traces=None if traces is None else tuple(traces))

    @cached_property
    def where(self) -> RunFolder:
        return run_folder(self.run)

    def study(self) -> Study[Any]:
        """The run, opened."""
        store = TraceStore.open(self.where.store)
        chosen = list(store) if self.traces is None else [store.trace(id) for id in self.traces]
        options = self.options.for_run(self.where)
        return Study(store=store, traces=chosen, options=options, results=self.where.analyses)


def run_analysis(task: AnalysisTask, *, cluster: Cluster | None = None) -> Iterator[Result]:
    """Save every result of the analysis, with its figures if asked for, and give each as it was saved, in the order of the traces.

    With a `cluster` its workers share the traces, and each loads the model once; an analysis that looks at all traces together goes to
    one worker. The files are the same as those of one process. Raises what the analysis raises, and what `work_on` raises.
    """
    analysis, study = ANALYSES[task.name].run, task.study()
    if isinstance(analysis, PerTraceAnalysis):
        yield from _trace_by_trace(task, analysis, study, cluster)
    elif cluster is None:
        with working(task.name):
            yield from (_saved(task.where, study, result) for result in analysis(study))
    else:
        notes = _Notes.of(task, analysis, study)
        notes.clear()
        work_on(cluster, partial(_Whole, task, notes), ["all"])
        yield from map(Result.load, notes.results("all"))
        notes.clear()


def analyse(
    name: str,
    run: str | Path,
    *,
    traces: Sequence[str] | None = None,
    cluster: Cluster | None = None,
    **options: Any,
) -> list[Result]:
    """Run an analysis over a run, as `reasonscope analyse NAME` does.

    Args:
        name: One of `analyses()`.
        run: The folder of a run.
        traces: Ids of the traces to analyse; all of them if None.
        cluster: Workers that share the traces; this process alone if None.
        **options: Options of this analysis, such as `sites="resid_post.20"` or `seed=1`: those of the command line, with underscores.

    Returns:
        The results. They are also saved in RUN/results, and with `figures=True` drawn in RUN/figures.

    Raises:
        InputError: The analysis, a trace or an option does not exist, or the run lacks what the analysis needs.

    Example:
        for result in analyse("entropy", "runs/mine"):
            print(result.provenance["trace"], result.numbers)
    """
    task = AnalysisTask.of(run, name, traces=traces, **options)
    return list(run_analysis(task, cluster=cluster))


def finished_traces(task: AnalysisTask) -> tuple[list[str], int]:
    """The ids of the traces that an interrupted analysis has finished and will not do again, and how many traces there are in all."""
    analysis, study = ANALYSES[task.name].run, task.study()
    if not isinstance(analysis, PerTraceAnalysis):
        return [], len(study.traces)
    notes = _Notes.of(task, analysis, study)
    return [trace.id for trace in study.traces if notes.finished(trace.id)], len(study.traces)


def summarise(task: AnalysisTask, results: Sequence[Result]) -> Summary:
    """What the results of an analysis tell: the finding, a table with nulls, the text that matters, and where to see it.

    Args:
        task: The analysis that was run.
        results: What it gave.

    Returns:
        A finding for people; what is undefined is named with its reason.
    """
    analysis, missing = ANALYSES[task.name], undefined_result_notes(results)
    if measured(results, next(iter(analysis.question.writes))):
        study = task.study()
        found = analysis.summarise(results, study.traces)
        found = without_columns(found, {"trace"} if len(study.traces) == 1 else set())
    else:
        same = len({result.reason for result in results}) == 1
        why = results[0].reason if same else f"none of {len(results)} results could be measured"
        found, missing = Summary(finding=f"There is nothing to say: {why}."), [] if same else missing
    missing = [*missing, *_steered_note(task)]
    methods = list(dict.fromkeys(result.method for result in results))
    drawn = f"; figures: {task.where.figures}" if task.options.figures else ""
    files = f"Results: {task.where.analyses} ({', '.join(methods)}){drawn}"
    return replace(found, notes=[*found.notes, *missing], files=[files], next_command=_look(task, analysis.question))


def _steered_note(task: AnalysisTask) -> list[str]:
    """Says that a model which reads steered traces again is steered as it was."""
    study = task.study()
    if study.recipe is None:
        return []
    name = f"{study.recipe.name} ({study.recipe.hash})"
    again = ", and so is the model that reads them again" if isinstance(task.options, LoadsModel) else ""
    return [f"The traces were steered by {name}{again}."]


def _look(task: AnalysisTask, question: Question) -> str:
    """The command that opens the app, and the address of the page."""
    page = "" if question.page == "overview" else question.page
    trace = f"?{urlencode({'trace': task.traces[0]})}" if task.traces and len(task.traces) == 1 else ""
    return f"reasonscope app {shlex.quote(str(task.run))}  # then open http://127.0.0.1:8501/{page}{trace}"


def _trace_by_trace(
    task: AnalysisTask, analysis: PerTraceAnalysis, study: Study[Any], cluster: Cluster | None
) -> Iterator[Result]:
    stages: list[_Notes] = []
    following = analysis
    while True:
        notes = _Notes.of(task, following, study, stage=len(stages))
        stages.append(notes)
        over = yield from _stage(task, following, notes, study, cluster)
        if following.next_stage is None:
            break
        following = following.next_stage(over)
    for notes in stages:
        notes.clear()


def _stage(
    task: AnalysisTask, analysis: PerTraceAnalysis, notes: "_Notes", study: Study[Any], cluster: Cluster | None
) -> Generator[Result, None, list[Result]]:
    """The results of the traces, noted ones included, then those over all traces, which are also returned."""
    left = [trace.id for trace in study.traces if not notes.finished(trace.id)]
    if cluster is None:
        analyst = _Analyst(task, analysis.per_trace, notes, study)
        n = len(study.traces)
        with working(task.name, total=n, done=n - len(left), unit="traces") as work:
            for id in left:
                work.detail = id
                analyst(id)
                work.advance()
    else:
        work_on(cluster, partial(_Analyst, task, analysis.per_trace, notes), left)
    found = []
    for path in (path for trace in study.traces for path in notes.results(trace.id)):
        result = Result.load(path)
        if analysis.aggregate is not None:
            found.append(result)
        yield result
    over = []
    for result in analysis.aggregate(study, found) if analysis.aggregate is not None else ():
        over.append(_saved(task.where, study, result))
        yield over[-1]
    return over


class _Analyst:
    """Analyses one trace after another with the model loaded once; writes the results of each and a note."""

    def __init__(
        self,
        task: AnalysisTask,
        each: Callable[[Study[Any], Trace], Iterator[Result]],
        notes: "_Notes",
        study: Study[Any] | None = None,
    ) -> None:
        self._each, self._notes, self._where = each, notes, task.where
        self._study = replace(study or task.study(), kept=notes.folder / "written")
        self._traces = {trace.id: trace for trace in self._study.traces}

    def __call__(self, id: str) -> None:
        if self._notes.finished(id):  # by a worker that died afterwards
            return
        results = self._each(self._study, self._traces[id])
        self._notes.write(id, [_save(self._where, self._study, result) for result in results])


class _Whole:
    """Runs an analysis of all traces together; writes its results and a note."""

    def __init__(self, task: AnalysisTask, notes: "_Notes") -> None:
        self._task, self._notes, self._study = task, notes, task.study()

    def __call__(self, id: str) -> None:
        results = ANALYSES[self._task.name].run(self._study)
        self._notes.write(id, [_save(self._task.where, self._study, result) for result in results])


@dataclass(frozen=True, kw_only=True)
class _Notes:
    """Which traces are finished: a note of each in `folder`, with paths relative to `root`."""

    folder: Path
    root: Path

    @classmethod
    def of(
        cls,
        task: AnalysisTask,
        analysis: Callable[[Study[Any]], Iterator[Result]],
        study: Study[Any],
        *,
        stage: int = 0,
    ) -> "_Notes":
        root, name = task.where.results.absolute(), task.name if not stage else f"{task.name}-{stage + 1}"
        return cls(folder=root / "unfinished" / f"{name}-{_key(analysis, study)}", root=root)

    def write(self, id: str, saved: Sequence[Sequence[Path]]) -> None:
        """Note the files of each result of a trace, the result itself first."""
        make_folder(self.folder)
        noted = [{self._name(path): sha256_of(path) for path in paths} for paths in saved]
        write_text_durably(self._of(id), json.dumps(noted))

    def finished(self, id: str) -> bool:
        """Whether the trace was noted and no file of it has changed since."""
        return self._of(id).exists() and all(
            (self.root / name).exists() and sha256_of(self.root / name) == digest
            for files in self._read(id)
            for name, digest in files.items()
        )

    def results(self, id: str) -> list[Path]:
        return [self.root / next(iter(files)) for files in self._read(id)]

    def clear(self) -> None:
        """Remove the notes: nothing is unfinished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.exists() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _of(self, id: str) -> Path:
        return self.folder / f"{file_name(id)}.json"

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.root).as_posix()

    def _read(self, id: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self._of(id).read_text(encoding="utf-8"))
        return found


def _saved(where: RunFolder, study: Study[Any], result: Result) -> Result:
    """The result as it was saved."""
    return Result.load(_save(where, study, result)[0])


def _save(where: RunFolder, study: Study[Any], result: Result) -> list[Path]:
    """Write a result, and its figures if they were asked for; gives their paths, the result's first."""
    trace = str(result.provenance.get("trace", "all"))
    named = result.with_provenance(run=str(study.store.path.name))
    saved = named.save(result_path(where.analyses, result.method, trace))
    drawn = _draw(where, result, saved.stem) if study.options.figures and result.measured else []
    return [saved, *drawn]


def _draw(where: RunFolder, result: Result, stem: str) -> list[Path]:
    """Write each figure of a result as a page that needs no network; gives their paths."""
    from reasonscope.analysis.figures import of_result, to_html

    make_folder(where.figures)
    pages = {where.figures / f"{result.method}-{stem}-{kind}.html": each for kind, each in of_result(result).items()}
    for path, figure in pages.items():
        write_text_durably(path, to_html(figure, with_library=True))
    return list(pages)


def _key(analysis: Callable[[Study[Any]], Iterator[Result]], study: Study[Any]) -> str:
    """A hash of everything that the results depend on."""
    told = study.options.key()
    reads = analysis.depends_on if isinstance(analysis, PerTraceAnalysis) else lambda *_: ()
    read = {path for trace in study.traces for path in reads(study, trace)}
    files = {study.store.path / NAME} | read | {value for value in told.values() if isinstance(value, Path)}
    digests = sorted((str(path), sha256_of(path)) for path in files if path.exists())
    chosen = [trace.id for trace in study.traces]
    return hashlib.sha256(json.dumps([told, chosen, digests], default=str).encode()).hexdigest()[:16]
