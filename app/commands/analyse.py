"""`reasonscope analyse`: run an analysis over a run. Results go beside the store, into RUN/results.

There is one command per analysis, made of its question and of the fields of its options.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from reasonscope.analysis.runs.options import AnalysisOptions
from reasonscope.analysis.runs.questions import QUESTIONS, Question
from reasonscope.app.commands.loading import LOADING
from reasonscope.app.interruption import keeping

if TYPE_CHECKING:
    from reasonscope.analysis.runs.runner import AnalysisTask

analyse = typer.Typer(help="Ask what matters in a trace: tokens, sentences, heads, whole traces.", no_args_is_help=True)


def _common(
    *,
    run: Annotated[Path, typer.Option(help="The folder of a run, or of the demo.")],
    trace: Annotated[
        list[str] | None, typer.Option(help="Id of a trace to analyse; may be repeated. All traces if not given.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Share the traces out by Ray Data: local, auto (the cluster of this machine) or an address. An analysis of all "
            "traces together goes to one worker."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers of Ray; as many as fit if not given.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="Accelerators of each worker; give --device too.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Write every number as JSON.")] = False,
) -> None:
    """The options that every analysis has."""


def _parameters(kind: type[AnalysisOptions]) -> Iterator[inspect.Parameter]:
    """The options of an analysis: its own first, then those that it shares with others."""
    hints = get_type_hints(kind)
    known = {told.name: told for told in fields(kind)}
    for owner in kind.__mro__:
        for name in (name for name in inspect.get_annotations(owner) if name in known):
            told = known.pop(name)
            annotation = LOADING[name].annotation if name in LOADING else Annotated[hints[name], _option(told)]
            yield inspect.Parameter(name, _KEYWORD, default=told.default, annotation=annotation)


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _option(told: Field[Any]) -> Any:
    about = told.metadata
    flags = (about["flag"],) if about["flag"] else ()
    return typer.Option(*flags, help=about["help"], min=about["min"], max=about["max"])


def _command(name: str, question: Question) -> Callable[..., None]:
    def command(**given: Any) -> None:
        common = {key: given.pop(key) for key in inspect.signature(_common).parameters}
        _run(name, question.options(**given), **common)

    shared = inspect.signature(_common).parameters.values()
    parameters = [shared_ for shared_ in shared if shared_.name in ("run", "trace")]
    parameters += [*_parameters(question.options), *(one for one in shared if one.name not in ("run", "trace"))]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _help(question: Question) -> str:
    written = "; ".join(f"{method} ({what})" for method, what in question.writes.items())
    return f"{question.asks}\n\nWrites into RUN/results: {written}."


for _name, _question in QUESTIONS.items():
    analyse.command(_name.replace("_", "-"), help=_help(_question), short_help=_question.asks)(
        _command(_name, _question)
    )


def _finished(task: "AnalysisTask") -> str:
    """Which traces an interrupted analysis has finished, and how to go on."""
    from reasonscope.analysis.runs.runner import finished_traces

    ids, n_traces = finished_traces(task)
    if not ids:
        return "no trace was finished; run the same command again to start over."
    others = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return f"{len(ids)} of {n_traces} traces are finished ({', '.join(ids[:5])}{others}); run the same command again to go on."


def _run(
    name: str,
    options: AnalysisOptions,
    *,
    run: Path,
    trace: list[str] | None,
    ray: str | None,
    workers: int | None,
    gpus: float,
    json: bool,
) -> None:
    """Analyse, by workers of Ray if `ray` names a cluster, and say what was found."""
    from reasonscope.analysis.runs.registry import numbers_of
    from reasonscope.analysis.runs.runner import AnalysisTask, run_analysis, summarise
    from reasonscope.app.commands.show import show_summary
    from reasonscope.probes.generation.cluster import Cluster

    task = AnalysisTask(run=run, name=name, options=options, traces=tuple(trace) if trace else None)
    cluster = None if ray is None else Cluster(address=ray, workers=workers, gpus=gpus)
    with keeping(partial(_finished, task)):
        results = list(run_analysis(task, cluster=cluster))
    numbers: dict[str, Any] = {}
    for result in results:
        of = str(result.provenance.get("trace", "all"))
        numbers[f"{of}, {result.method}" if of in numbers else of] = numbers_of(result)
    show_summary(summarise(task, results), numbers, json)
