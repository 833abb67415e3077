"""`reasonscope probe`: fit and judge the probes on a run, keep them, and score every token with one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from reasonscope.analysis.figures import Figure
    from reasonscope.app.places import Places
    from reasonscope.probes.linear import LinearProbe

probe = typer.Typer(help="Fit and judge probes on a run, and score tokens with them.", no_args_is_help=True)

Run = Annotated[Path, typer.Option(help="The folder of a run, or of the demo.")]
Folds = Annotated[int, typer.Option(min=2, help="Parts that the problems are split into.")]
Seed = Annotated[int, typer.Option(help="Of the folds and the resamples.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]


@probe.command()
def length(run: Run, folds: Folds = 5, seed: Seed = 0, json_: Json = False) -> None:
    """How long will it think? Reads the traces before their first token of thinking; requests (see refusal) are left out."""
    from reasonscope.app.places import places
    from reasonscope.app.probing import length_figures, length_numbers
    from reasonscope.data.store import TraceStore
    from reasonscope.probes.length import length_probe

    where = places(run)
    store = TraceStore.open(where.store)
    traces = [trace for trace in store if "harmful" not in trace.problem.meta]
    found = length_probe(store, traces, folds=folds, seed=seed)
    _keep(where, {"length": found.probe}, length_figures(found))
    show(length_numbers(found), json_)


@probe.command()
def refusal(
    run: Run,
    plateau: Annotated[float, typer.Option(help="The share of the thinking, from its end, that is the plateau.")] = 0.5,
    directions: Annotated[int, typer.Option(min=100, help="Random directions of the null.")] = 100,
    folds: Folds = 5,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Does it mean to refuse? Reads the requests of a run: those whose problem says in its meta whether it is harmful."""
    from reasonscope.app.places import places
    from reasonscope.app.probing import refusal_figures, refusal_numbers
    from reasonscope.data.store import TraceStore
    from reasonscope.probes.refusal import refusal_probe

    where = places(run)
    store = TraceStore.open(where.store)
    traces = [trace for trace in store if "harmful" in trace.problem.meta]
    found = refusal_probe(store, traces, plateau=plateau, directions=directions, folds=folds, seed=seed)
    _keep(where, found.probes, refusal_figures(found, traces))
    show(refusal_numbers(found), json_)


@probe.command()
def correctness(run: Run, folds: Folds = 5, seed: Seed = 0, json_: Json = False) -> None:
    """Will the answer be right? Reads the traces that have a gold answer, at six positions from the prompt to the answer."""
    from reasonscope.app.places import places
    from reasonscope.app.probing import correctness_figures, correctness_numbers
    from reasonscope.data.store import TraceStore
    from reasonscope.probes.correctness import correctness_probe
    from reasonscope.probes.trajectory import POSITIONS

    where = places(run)
    store = TraceStore.open(where.store)
    traces = list(store)
    found = [correctness_probe(store, traces, position=at, folds=folds, seed=seed) for at in POSITIONS]
    _keep(where, {"correctness": found[-1].probe}, correctness_figures(found))
    show(correctness_numbers(found), json_)


@probe.command()
def apply(
    probe: Annotated[
        Path, typer.Argument(help="A probe that one of these commands kept, RUN/probes/NAME.safetensors.")
    ],
    run: Run,
) -> None:
    """Score every token of every trace of a run; the scores lie beside the store, in RUN/scores."""
    from reasonscope.app.places import places
    from reasonscope.data.store import TraceStore
    from reasonscope.probes.linear import LinearProbe
    from reasonscope.probes.scores import write_scores

    where = places(run)
    path = where.scores / f"{probe.stem}.safetensors"
    count = write_scores(LinearProbe.load(probe), TraceStore.open(where.store), path, name=probe.stem)
    typer.echo(f"scores of {count} traces in {path}")


def _keep(where: "Places", probes: "Mapping[str, LinearProbe]", figures: "Mapping[str, Figure]") -> None:
    """Save probes and figures under their names."""
    from reasonscope.analysis.figures import to_html

    where.probes.mkdir(parents=True, exist_ok=True)
    where.figures.mkdir(parents=True, exist_ok=True)
    for name, fitted in probes.items():
        fitted.save(where.probes / f"{name}.safetensors")
    for name, figure in figures.items():
        (where.figures / f"{name}.html").write_text(to_html(figure, with_library=True), encoding="utf-8")
    typer.echo(f"probes in {where.probes}, figures in {where.figures}", err=True)


def show(numbers: Mapping[str, Any], json_: bool) -> None:
    """Write nested numbers; in JSON, what is not a number is null."""
    from rich.console import Console

    from reasonscope.app.summary import table

    if json_:
        typer.echo(json.dumps(_plain(numbers), indent=2, allow_nan=False))
    else:
        Console().print(table(numbers))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
