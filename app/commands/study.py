"""`reasonscope study`, a whole study from a plan; `demo`, a shipped one in ten lines; and `verify-claims`, a small one."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.commands.options import JsonOption, ServedAs, TrustServer, check_engine
from reasonscope.app.commands.show import show_summary
from reasonscope.app.interruption import keeping


class _EngineArgument(StrEnum):
    """A server that steers."""

    vllm = "vllm"


def study_command(
    plan: Annotated[str, typer.Argument(help="A plan in YAML, or the name of a shipped one: gsm8k, demo, demo-quick.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder of the study, by default studies/NAME; a second call goes on there.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would run, how long, how much disk, and why. Runs no step, but loads the model for some seconds to measure its "
            "speed.",
        ),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="A step to run, with those that it needs; may be repeated.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the plan's.")] = None,
    problems: Annotated[
        list[str] | None, typer.Option(metavar="SET=SOURCE", help="Another source of a problem set; may be repeated.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="A server, http://host:port, that writes the texts; activations are read here afterwards."),
    ] = None,
    served_as: ServedAs = None,
    backend: Annotated[
        _EngineArgument | None,
        typer.Option(help="vllm: the --server is vLLM with vllm-lens, and writes the arms of sweeps, too."),
    ] = None,
    trust_server: TrustServer = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run steps again that could not be measured.")] = False,
    print_: Annotated[
        bool, typer.Option("--print", help="Print the plan, to copy and change it, and run nothing.")
    ] = False,
) -> None:
    """Run a whole study from a plan: record, probe, steer, analyse, report.

    The same command again goes on; steps whose results still hold are skipped.
    """
    from reasonscope.analysis.studies.lab import Served
    from reasonscope.analysis.studies.plan import changed, plan_text, read_plan
    from reasonscope.analysis.studies.runner import kept, open_lab, outlook_summary, outlooks, study
    from reasonscope.app.terminal import print_summary

    if print_:
        typer.echo(plan_text(plan).rstrip())
        return
    read = changed(read_plan(plan), model=model, sources=problems or ())
    check_engine(backend, server)
    steers = backend is not None
    served = Served(url=server, served_as=served_as, steers=steers, trusted=trust_server) if server else None
    lab = open_lab(read, out, served)
    if dry_run:
        print_summary(outlook_summary(lab, outlooks(lab, only=only or ())))
        return
    with keeping(partial(kept, lab)):
        print_summary(study(read, lab.out, server=served, only=only or (), retry=retry).summary())


def example_command(
    study: Annotated[Path, typer.Argument(help="The folder of a study of gsm8k.")],
    licence: Annotated[Path, typer.Option(help="The licence of the problems, which goes into the examples.")],
    out: Annotated[Path, typer.Option(help="The folder that gets the examples.")] = Path("app"),
) -> None:
    """Make the real examples that the app opens first."""
    from reasonscope.app.demo.real_example import REAL, STEERED, write_real_example

    for line in write_real_example(study, out, licence=licence):
        typer.echo(f"left out, too large: {line}")
    for name in (REAL, STEERED):
        size = sum(file.stat().st_size for file in (out / name).rglob("*") if file.is_file())
        typer.echo(f"{out / name}: {size / 1e6:.2f} MB")


def demo(
    out: Annotated[Path, typer.Option(help="The folder of the run; a second call resumes what is there.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer traces: about two minutes.")] = False,
) -> None:
    """Let the shipped reasoning model think, record it, probe it, steer it, and tell what was found in ten lines."""
    from rich.console import Console
    from rich.table import Table

    from reasonscope.analysis.studies.plan import read_plan
    from reasonscope.analysis.studies.report import REPORT
    from reasonscope.app.demo.demo import run_demo
    from reasonscope.app.demo.summary import SUMMARY
    from reasonscope.app.terminal import printed_cell

    with keeping(lambda: f"recorded traces are kept in {out}; run the same command again to go on."):
        summary = run_demo(read_plan("demo-quick" if quick else "demo"), out)
    told = Table.grid(padding=(0, 1))
    for number, line in enumerate(summary["story"], start=1):
        told.add_row(f"{number}.", printed_cell(line))
    Console().print(told)
    typer.echo(f"report: {out / REPORT}; every number: {out / SUMMARY}")
    typer.echo(f"Next: reasonscope app {out}")


def verify_claims_command(
    model: Annotated[str, typer.Argument(help="A model of the table of findings, such as organism.")] = "organism",
    out: Annotated[
        Path | None, typer.Option(help="The folder of the small study, by default studies/verify-MODEL; goes on there.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where the model is: a folder, or another id.")] = None,
    problems: Annotated[
        list[str] | None, typer.Option(metavar="SET=SOURCE", help="Another source of a problem set; may be repeated.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure a fixed small part of the findings again, in at most half an hour. Exit status 1 if any differs beyond its interval."""
    from reasonscope.analysis.studies.claims import comparison_summary, verify_claims

    folder = out or Path("studies") / f"verify-{model}"
    with keeping(lambda: f"finished steps are kept in {folder}; run the same command again to go on."):
        found = verify_claims(model, folder, source=source, problems=problems or ())
    numbers = {
        one.claim: {
            "published": one.published.to_dict(),
            "again": one.again and one.again.to_dict(),
            "agrees": one.agrees,
        }
        for one in found
    }
    show_summary(comparison_summary(model, found), numbers, json_)
    if any(one.agrees is False for one in found):
        raise typer.Exit(1)
