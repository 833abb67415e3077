"""Text of others on a terminal: shown, and never obeyed."""

from rich.text import Text


def printable(text: str) -> str:
    """`text` with what is no visible character (escapes of the terminal, line ends, marks of direction) as Python writes it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printed_cell(text: str) -> Text:
    """`text` for a table, in which brackets are no markup."""
    return Text(printable(text))
