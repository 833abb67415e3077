"""`reasonscope demo`: record, probe and steer the shipped model, end to end."""

from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.interruption import keeping


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
