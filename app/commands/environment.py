"""`reasonscope doctor` and `reasonscope version`: what is installed here."""

import json
from dataclasses import asdict
from importlib.metadata import version as installed_version
from typing import Annotated

import typer


def doctor(json_: Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")] = False) -> None:
    """Say which versions, devices, extras and shipped models are there, and what to do about each that is not.

    Exit status 1 where a needed package or a shipped model is missing; a missing extra is no fault.
    """
    from reasonscope.probes.checks.doctor import examine, tables

    examination = examine()
    if json_:
        typer.echo(json.dumps({**asdict(examination), "sound": examination.sound}, indent=2))
    else:
        from rich.console import Console

        Console().print(*tables(examination), sep="\n")
    if not examination.sound:
        raise typer.Exit(1)


def version() -> None:
    """Write the version of reasonscope."""
    typer.echo(installed_version("reasonscope"))
