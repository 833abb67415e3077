"""`reasonscope demo`: record, probe and steer the shipped model, end to end."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="The folder of the run; what is there already is not made again.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer traces: under a minute.")] = False,
) -> None:
    """Let the shipped reasoning model think, store it, probe it, steer it, and write a summary and a report."""
    from rich.console import Console

    from reasonscope.app.demo.demo import QUICK, Size, run_demo
    from reasonscope.app.demo.summary import REPORT, table

    summary = run_demo(out, size=QUICK if quick else Size())
    Console().print(table(summary, leave_out=("model",)))
    typer.echo(f"report: {out / REPORT}")
    typer.echo(f"in the browser: reasonscope app {out}")
