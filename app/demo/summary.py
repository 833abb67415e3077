"""The summary of a run: `summary.json` as the demo writes it, and its numbers as rows for a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from reasonscope.app.terminal import printed_cell

SUMMARY = "summary.json"
REPORT = "report.html"


def summary_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of every number, names dotted: `("seal.tokens_base", "41.2")`.

    A list under `ci` or `…_ci` is an interval, `[0.8, 0.86]`; any other list of three numbers is a value with its interval,
    `0.572 [0.454, 0.657]`, unless its name begins with `random`; whatever else is in a list stands with commas between, `351, 357`.
    """
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", text) for inner, text in summary_rows(value))
        elif isinstance(value, list):
            yield name, _list_text(name, value)
        else:
            yield name, _text(value)


def table(summary: Mapping[str, Any], *, leave_out: Sequence[str] = ()) -> Table:
    """The numbers as a table for the terminal, save those under the names in `leave_out`."""
    shown = Table("number", "value")
    for name, text in summary_rows({key: value for key, value in summary.items() if key not in leave_out}):
        shown.add_row(printed_cell(name), printed_cell(text))
    return shown


def _list_text(name: str, values: Sequence[object]) -> str:
    texts = list(map(_text, values))
    if name == "ci" or name.endswith("_ci"):
        return f"[{', '.join(texts)}]"
    if len(texts) == 3 and not name.startswith("random"):
        return f"{texts[0]} [{texts[1]}, {texts[2]}]"
    return ", ".join(texts)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
