"""The numbers of a run as a table for the terminal, and the name of the demo's summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from reasonscope.app.terminal import printed_cell
from reasonscope.data.summary import number_rows

SUMMARY = "summary.json"


def table(summary: Mapping[str, Any], *, leave_out: Sequence[str] = ()) -> Table:
    """The numbers as a table for the terminal, save those under the names in `leave_out`."""
    shown = Table("number", "value")
    for name, text in number_rows({key: value for key, value in summary.items() if key not in leave_out}):
        shown.add_row(printed_cell(name), printed_cell(text))
    return shown
