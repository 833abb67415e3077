"""`reasonscope probe`: fit and judge the probes on a run, keep them, and score every token with one."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonscope.app.commands.loading import Load, loads_model
from reasonscope.app.commands.show import show

if TYPE_CHECKING:
    from reasonscope.analysis.figures import Figure
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.data.trace import Trace
    from reasonscope.probes.fitting.linear_probes import LinearProbe

probe = typer.Typer(help="Fit and judge probes on a run, and score tokens with them.", no_args_is_help=True)

RunOption = Annotated[Path, typer.Option(help="The folder of a run, or of the demo.")]
Folds = Annotated[int, typer.Option(min=2, help="Parts that the problems are split into.")]
SeedOption = Annotated[int, typer.Option(help="Of the folds and the resamples.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]


@probe.command()
def length(
    run: RunOption,
    aft: Annotated[
        bool, typer.Option("--aft", help="Beside it, an accelerated failure time model, for truncated traces.")
    ] = False,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """How long will it think? Reads the traces before their first token of thinking; requests (see refusal) are left out."""
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import aft_numbers, length_figures, length_numbers

    store, traces = _traces(run, requests=False)
    found = probes.length(store, traces, folds=folds, seed=seed)
    numbers = length_numbers(found)
    if aft:
        numbers["aft"] = aft_numbers(store, traces, found, folds=folds, seed=seed)
    kept = {"length": found.probe}
    _keep("length", run, numbers, length_figures(found), kept, json_, aft=aft, folds=folds, seed=seed)


@probe.command()
def remaining(
    run: RunOption,
    per_trace: Annotated[int, typer.Option(min=1, help="Positions of each trace, spread over its thinking.")] = 8,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """How much thinking is left? Reads positions all along the thinking, against what the position alone tells."""
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import remaining_figures, remaining_numbers

    store, traces = _traces(run, requests=False)
    found = probes.remaining(store, traces, per_trace=per_trace, folds=folds, seed=seed)
    numbers, drawn, kept = remaining_numbers(found), remaining_figures(found), {"remaining": found.probe}
    _keep("remaining", run, numbers, drawn, kept, json_, per_trace=per_trace, folds=folds, seed=seed)


@probe.command()
@loads_model
def forecast(
    probe: Annotated[Path, typer.Argument(help="What `probe length` kept, RUN/probes/length.safetensors.")],
    prompts: Annotated[list[str], typer.Argument(help="Questions, as a user asks them.")],
    load: Load,
    model: Annotated[
        str | None, typer.Option(help="The model that the probe reads; by its name where not given.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """How long will it think about a new prompt? In tokens, with an interval, before the first of them."""
    from reasonscope.analysis.runs.probe_reports import forecast_numbers
    from reasonscope.probes.fitting.linear_probes import LinearProbe
    from reasonscope.probes.models.model import load_model

    kept = LinearProbe.load(probe)
    show(forecast_numbers(load_model(model or str(kept.model.get("name")), **load), kept, prompts), json_)


@probe.command()
def refusal(
    run: RunOption,
    plateau: Annotated[float, typer.Option(help="The share of the thinking, from its end, that is the plateau.")] = 0.5,
    directions: Annotated[int, typer.Option(min=100, help="Random directions of the null.")] = 100,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Does it mean to refuse? Reads the requests of a run: those whose problem says in its meta whether it is harmful."""
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import refusal_figures, refusal_numbers
    from reasonscope.probes.properties.refusal_probe import refusal_maps

    store, traces = _traces(run, requests=True)
    found = probes.refusal(store, traces, plateau=plateau, n_controls=directions, folds=folds, seed=seed)
    drawn = refusal_figures(found, traces, refusal_maps(store, traces, folds=folds, seed=seed))
    options = {"plateau": plateau, "directions": directions, "folds": folds, "seed": seed}
    _keep("refusal", run, refusal_numbers(found), drawn, found.probes, json_, **options)


@probe.command()
def correctness(run: RunOption, folds: Folds = 5, seed: SeedOption = 0, json_: JsonOption = False) -> None:
    """Will the answer be right? Reads the traces that have a gold answer, at six positions from the prompt to the answer."""
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import correctness_figures, correctness_numbers
    from reasonscope.probes.fitting.positions import POSITIONS

    store, traces = _traces(run)
    found = [probes.correctness(store, traces, position=at, folds=folds, seed=seed) for at in POSITIONS]
    numbers, drawn, kept = correctness_numbers(found), correctness_figures(found), {"correctness": found[-1].probe}
    _keep("correctness", run, numbers, drawn, kept, json_, folds=folds, seed=seed)


@probe.command()
def apply(
    probe: Annotated[
        Path, typer.Argument(help="A probe that one of these commands kept, RUN/probes/NAME.safetensors.")
    ],
    run: RunOption,
) -> None:
    """Score every token of every trace of a run; the scores lie beside the store, in RUN/scores."""
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.fitting.linear_probes import LinearProbe
    from reasonscope.probes.properties.scores import write_scores

    where = run_folder(run)
    path = where.scores / f"{probe.stem}.safetensors"
    count = write_scores(LinearProbe.load(probe), TraceStore.open(where.store), path, name=probe.stem)
    typer.echo(f"scores of {count} traces in {path}")


def _traces(run: Path, *, requests: bool | None = None) -> "tuple[TraceStore, list[Trace]]":
    """The store of a run, and its traces: of requests alone, of all but these, or all of them."""
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore

    store = TraceStore.open(run_folder(run).store)
    return store, [trace for trace in store if requests in (None, "harmful" in trace.problem.meta)]


def _keep(
    name: str,
    run: Path,
    numbers: "Mapping[str, Any]",
    drawn: "Mapping[str, Figure]",
    probes: "Mapping[str, LinearProbe]",
    json_: bool,
    **options: float,
) -> None:
    """Keep what was found beside the store, with the line that measures the same again, and show its numbers."""
    from reasonscope.analysis.runs.saved_numbers import save_numbers
    from reasonscope.data.storage.run_folder import run_folder

    where = run_folder(run)
    named = {f"--{key.replace('_', '-')}": value for key, value in options.items()}
    given = [key if value is True else f"{key} {value}" for key, value in named.items() if value is not False]
    command = " ".join([f"reasonscope probe {name} --run {run}", *given])
    save_numbers(where, name, numbers, command=command, seed=int(options["seed"]), figures=drawn, probes=probes)
    typer.echo(f"probes in {where.probes}, figures in {where.figures}", err=True)
    show(numbers, json_)
