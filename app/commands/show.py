"""How commands show what they found: numbers as a table or JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from reasonscope.app.terminal import print_summary

if TYPE_CHECKING:
    from reasonscope.data.summary import Summary


def _show(numbers: Mapping[str, Any], as_json: bool) -> None:
    """Write nested numbers; in JSON, what is not a number is null."""
    from rich.console import Console

    from reasonscope.app.demo.summary import table
    from reasonscope.data.arrays import plain

    if as_json:
        typer.echo(json.dumps(plain(numbers), indent=2, allow_nan=False))
    else:
        Console().print(table(numbers))


def show_summary(summary: "Summary | Sequence[Summary]", numbers: Mapping[str, Any], as_json: bool) -> None:
    """Write the finding for people (several, one after the other), or every number as JSON."""
    if as_json:
        _show(numbers, as_json)
        return
    for one in summary if isinstance(summary, Sequence) else [summary]:
        print_summary(one)
