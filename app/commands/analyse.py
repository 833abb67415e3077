"""`reasonscope analyse`: run an analysis over a run. Results go beside the store, into RUN/results.

There is one command per analysis, made of its question and of the fields of its options.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from reasonscope.analysis.runs.options import AnalysisOptions
from reasonscope.analysis.runs.questions import QUESTIONS, Question
from reasonscope.app.commands.options import JsonOption, Load, RayOptions, options_of, signed
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
    json: JsonOption = False,
) -> None:
    """The options that every analysis has."""


_COMMON = inspect.signature(_common).parameters
_LOADING = {one.name: one for one in options_of(Load)}


def _parameters(kind: type[AnalysisOptions]) -> Iterator[inspect.Parameter]:
    """The options of an analysis: its own first, then those that it shares with others."""
    hints = get_type_hints(kind)
    known = {told.name: told for told in fields(kind)}
    for owner in kind.__mro__:
        for name in (name for name in inspect.get_annotations(owner) if name in known):
            told = known.pop(name)
            annotation = _LOADING[name].annotation if name in _LOADING else Annotated[hints[name], _option(told)]
            yield inspect.Parameter(name, _KEYWORD, default=told.default, annotation=annotation)


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _option(told: Field[Any]) -> Any:
    about = told.metadata
    flags = (about["flag"],) if about["flag"] else ()
    return typer.Option(*flags, help=about["help"], min=about["min"], max=about["max"])


def _command(name: str, question: Question) -> Callable[..., None]:
    def command(**given: Any) -> None:
        common = {key: given.pop(key) for key in _COMMON}
        ray = RayOptions(**{each.name: given.pop(each.name) for each in fields(RayOptions)})
        _run(name, question.options(**given), ray=ray, **common)

    run, trace, json = _COMMON.values()
    return signed(command, [run, trace, *_parameters(question.options), *options_of(RayOptions), json])


def _help(question: Question) -> str:
    written = "; ".join(f"{method} ({what})" for method, what in question.writes.items())
    return f"{question.asks}\n\nWrites into RUN/results: {written}."


for _name, _question in QUESTIONS.items():
    analyse.command(_name.replace("_", "-"), help=_help(_question), short_help=_question.asks)(
        _command(_name, _question)
    )


@analyse.command("compare")
def _compare(
    plain: Annotated[Path, typer.Argument(help="The run of the plain model.")],
    steered: Annotated[Path, typer.Argument(help="The run of the same problems that `record --steer` wrote.")],
    probe: Annotated[
        Path | None, typer.Option(help="A probe whose mean score over the thinking is compared as well.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    json_: JsonOption = False,
) -> None:
    """What does steering change? Pairs the traces of two runs: the first token that differs, length, accuracy, and what a probe and MI say.

    Writes into STEERED/numbers and STEERED/figures: compare.
    """
    from reasonscope.analysis.figures import lengths_of_pairs
    from reasonscope.analysis.runs.saved_numbers import save_numbers
    from reasonscope.analysis.traces.steered_pairs import compare_runs
    from reasonscope.app.commands.show import show_summary
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.fitting.linear_probes import LinearProbe

    folders = run_folder(plain), run_folder(steered)
    found = compare_runs(
        *(TraceStore.open(folder.store) for folder in folders),
        results=(folders[0].analyses, folders[1].analyses),
        probe=None if probe is None else LinearProbe.load(probe),
        seed=seed,
    )
    drawn = {"compare": lengths_of_pairs([one.id for one in found.partings], found.lengths, found.outcomes)}
    command = f"reasonscope analyse compare {plain} {steered} --seed {seed}" + (f" --probe {probe}" if probe else "")
    save_numbers(folders[1], "compare", found.to_dict(), command=command, seed=seed, figures=drawn)
    files = [f"Numbers: {folders[1].numbers / 'compare.json'}; figure: {folders[1].figures / 'compare.html'}"]
    shown = replace(
        found.summary(),
        files=files,
        next_command=f"reasonscope app {steered}  # then open http://127.0.0.1:8501/steering",
    )
    show_summary(shown, found.to_dict(), json_)


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
    ray: RayOptions,
    json: bool,
) -> None:
    """Analyse, by workers of Ray if one is named, and say what was found."""
    from reasonscope.analysis.runs.registry import numbers_of
    from reasonscope.analysis.runs.runner import AnalysisTask, run_analysis, summarise
    from reasonscope.app.commands.show import show_summary

    task = AnalysisTask(run=run, name=name, options=options, traces=tuple(trace) if trace else None)
    with keeping(partial(_finished, task)):
        results = list(run_analysis(task, cluster=ray.cluster()))
    numbers: dict[str, Any] = {}
    for result in results:
        of = str(result.provenance.get("trace", "all"))
        numbers[f"{of}, {result.method}" if of in numbers else of] = numbers_of(result)
    show_summary(summarise(task, results), numbers, json)
