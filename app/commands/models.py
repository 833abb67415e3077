"""Commands on models: verify one, and measure the shipped organism."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.commands.loading import Load, loads_model

organism = typer.Typer(help="The small reasoning model that the package ships.", no_args_is_help=True)


@loads_model
def verify_command(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, organism or organism-base.")],
    load: Load,
    backend: Annotated[str, typer.Option(help="hooks, transformer_lens or nnsight.")] = "hooks",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 …; the checkpoint's where not given.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")] = False,
) -> None:
    """Check on your own model that what is read and written is what the names say. Exit status 1 if a check fails."""
    from reasonscope.app.terminal import print_summary
    from reasonscope.probes.checks.summaries import verification_summary
    from reasonscope.probes.checks.verification import verify as run_checks
    from reasonscope.probes.models.model import load_model

    checks = run_checks(load_model(model, backend=backend, dtype=dtype, **load))
    if json_:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print_summary(verification_summary(model, checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@organism.command("evaluate")
def _evaluate(
    model: Annotated[str, typer.Option(help="The organism, or a folder with one that you trained.")] = "organism",
    n: Annotated[int, typer.Option(min=20, help="Held-out problems.")] = 500,
    seed: Annotated[int, typer.Option()] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")] = False,
    card: Annotated[Path | None, typer.Option(help="Also write the card of MODEL and of MODEL-base here.")] = None,
) -> None:
    """Measure every number of the organism's card on held-out problems. Exit status 1 where one is out of its bounds."""
    from rich.console import Console
    from rich.table import Table

    from reasonscope.analysis.organism import evaluate_organism
    from reasonscope.app.demo.card import write_card
    from reasonscope.probes.models.loading import locate
    from reasonscope.probes.models.model import load_model

    measures = evaluate_organism(load_model(model), n=n, seed=seed)
    if card is not None:
        folders = [Path(locate(f"{model}-base")), Path(locate(model))]
        write_card(card, folders, measures, n=n, seed=seed)
    if json_:
        typer.echo(json.dumps({m.name: {**asdict(m), "met": m.met} for m in measures}, indent=2))
    else:
        table = Table("number", "value", "at least", "at most", "met")
        for m in measures:
            bounds = ["" if bound is None else f"{bound:g}" for bound in (m.low, m.high)]
            table.add_row(m.name, f"{m.value:.3f}", *bounds, "yes" if m.met else "NO")
        Console().print(table)
    if not all(m.met for m in measures):
        raise typer.Exit(1)


@organism.command("example")
def _example(
    out: Annotated[Path, typer.Option(help="The folder to write; what it holds is replaced.")] = Path("app/example"),
) -> None:
    """Record the example run that the app opens where no run is given. Do it again after the organism was trained anew."""
    from reasonscope.app.demo.bundled import write_example

    write_example(out)
    typer.echo(f"{out}: {sum(file.stat().st_size for file in out.rglob('*') if file.is_file()) / 1e6:.2f} MB")
