"""`reasonscope verify-claims`: measure a small part of the published findings again."""

from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.commands.show import show_summary
from reasonscope.app.interruption import keeping


def verify_claims_command(
    model: Annotated[str, typer.Argument(help="A model of the table of findings, such as organism.")] = "organism",
    out: Annotated[
        Path | None, typer.Option(help="The folder of the small study, by default studies/verify-MODEL; goes on there.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where the model is: a folder, or another id.")] = None,
    problems: Annotated[
        list[str] | None, typer.Option(metavar="SET=SOURCE", help="Another source of a problem set; may be repeated.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write every number as JSON.")] = False,
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
