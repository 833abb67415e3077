"""Commands on models and what they need: verify, organism, doctor and version."""

import json
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.commands.options import JsonOption, Load, grouped

organism = typer.Typer(help="The small reasoning model that the package ships.", no_args_is_help=True)


@grouped
def verify_command(
    model: Annotated[str, typer.Argument(help="The model: a Hugging Face id, a folder, organism or organism-base.")],
    load: Load,
    backend: Annotated[
        str, typer.Option(help="What reads and edits activations: hooks, transformer_lens or nnsight.")
    ] = "hooks",
    json_: JsonOption = False,
) -> None:
    """Check on your own model that activations are read and edited correctly. Exit status 1 if a check fails."""
    from reasonscope.app.terminal import print_summary
    from reasonscope.probes.checks.summaries import verification_summary
    from reasonscope.probes.checks.verification import verify as run_checks
    from reasonscope.probes.models.model import load_model

    checks = run_checks(load_model(model, backend=backend, **load))
    if json_:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print_summary(verification_summary(model, checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@organism.command("evaluate")
def _evaluate(
    model: Annotated[str, typer.Option(help="The organism, or the folder of one that you trained.")] = "organism",
    n: Annotated[int, typer.Option(min=20, help="How many held-out problems.")] = 500,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    json_: JsonOption = False,
    card: Annotated[
        Path | None, typer.Option(help="Write the model card of MODEL and of MODEL-base to this file, too.")
    ] = None,
) -> None:
    """Measure every number of the organism's card on held-out problems. Exit status 1 if one is out of bounds."""
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
    out: Annotated[Path, typer.Option(help="The folder to write; its contents are replaced.")] = Path("app/example"),
    begun: Annotated[
        Path, typer.Option(help="What is finished of it; if interrupted, the same command goes on from there.")
    ] = Path("runs/example-begun"),
) -> None:
    """Make the organism's example run, which the app offers after the real one. Repeat it after retraining the organism."""
    from reasonscope.app.demo.bundled import write_example
    from reasonscope.app.interruption import keeping

    with keeping(lambda: f"what is finished is in {begun}; run the same command again to go on."):
        write_example(out, begun=begun)
    typer.echo(f"{out}: {sum(file.stat().st_size for file in out.rglob('*') if file.is_file()) / 1e6:.2f} MB")


def doctor(json_: JsonOption = False) -> None:
    """Show which packages, extras, devices and shipped models are there, and what to do about each that is missing.

    Exit status 1 if a required package or a shipped model is missing; extras may be missing.
    """
    from reasonscope.app.terminal import print_summary
    from reasonscope.probes.checks.doctor import examine
    from reasonscope.probes.checks.summaries import doctor_summary

    examination = examine()
    if json_:
        typer.echo(json.dumps({**asdict(examination), "sound": examination.sound}, indent=2))
    else:
        print_summary(doctor_summary(examination))
    if not examination.sound:
        raise typer.Exit(1)


def version() -> None:
    """Write the version of reasonscope."""
    typer.echo(installed_version("reasonscope"))
