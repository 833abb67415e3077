"""Findings on a terminal; text from outside is shown, and never obeyed."""

import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from reasonscope.data.summary import Summary

_FILE_WIDTH = 120  # of output that goes to a file or a pipe, in which no column need be cut


def printable(text: str) -> str:
    """`text` with invisible characters (escapes of the terminal, line ends, marks of direction) as Python writes it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printed_cell(text: str) -> Text:
    """`text` for a table, in which brackets are not read as markup."""
    return Text(printable(text))


def print_summary(summary: "Summary", console: Console | None = None) -> None:
    """Print the finding, its table, the quoted text, and where to look next."""
    out = console or _console()
    out.print(Text(printable(summary.finding), style="bold"))
    if summary.rows:
        table = Table(*(Column(escape(printable(name)), overflow="fold") for name in summary.columns))
        for row in summary.rows:
            table.add_row(*map(printed_cell, row))
        out.print(table)
    for quote, said in summary.quotes:
        out.print(printed_cell(f"  {said}: {quote}"))
    for line in summary.notes:
        out.print(printed_cell(line))
    # Paths and commands are copied from here, so no line end is put into them.
    for line in (*summary.files, *([f"Next: {summary.next_command}"] if summary.next_command else [])):
        out.print(printed_cell(line), soft_wrap=True)


def _console() -> Console:
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=_FILE_WIDTH)
