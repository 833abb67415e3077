"""How commands show what they found: numbers as a table or JSON, and figures as pages of their own."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from reasonscope.analysis.figures import Figure


def show(numbers: Mapping[str, Any], as_json: bool) -> None:
    """Write nested numbers; in JSON, what is not a number is null."""
    from rich.console import Console

    from reasonscope.app.summary import table

    if as_json:
        typer.echo(json.dumps(_plain(numbers), indent=2, allow_nan=False))
    else:
        Console().print(table(numbers))


def keep_figures(folder: Path, figures: "Mapping[str, Figure]") -> None:
    """Write each figure under its name, one page that needs no network."""
    from reasonscope.analysis.figures import to_html

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (folder / f"{name}.html").write_text(to_html(figure, with_library=True), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
