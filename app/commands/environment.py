"""`reasonscope doctor` and `reasonscope version`: what is installed here."""

import json
from dataclasses import asdict
from importlib.metadata import version as installed_version
from typing import Annotated

import typer


def doctor(json_: Annotated[bool, typer.Option("--json", help="Write every number as JSON.")] = False) -> None:
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
