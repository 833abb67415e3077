"""What a command tells its reader: the finding in one sentence, a small table, the text that matters, and where to look
next."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from reasonscope.data.intervals import Estimate


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finding for people.

    Attributes:
        finding: One sentence that answers the question that was asked.
        columns: Names of the columns of the table.
        rows: One text per column; a number stands as `in_words` writes it.
        quotes: Sentences or tokens of the traces that matter most, each with what is said of it.
        notes: What a reader has to know, such as why a number is undefined, one line each.
        files: What was written, one line each.
        next_command: The command that shows it in the app, or the step that follows.
    """

    finding: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    quotes: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    files: Sequence[str] = ()
    next_command: str = ""

    def __str__(self) -> str:
        """Plain text, the columns aligned."""
        table = [list(self.columns), *map(list, self.rows)] if self.rows else []
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))] if table else []
        lines = [self.finding, ""]
        lines += [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines += [""] * bool(table)
        lines += [f"{said}: {quote}" for quote, said in self.quotes]
        lines += [*self.notes, *self.files]
        lines += [f"Next: {self.next_command}"] if self.next_command else []
        return "\n".join(lines).rstrip()


def in_words(number: Estimate | float | int | None, digits: int = 3) -> str:
    """A number as a table shows it: `0.572 [0.454, 0.657]`, `353`, or `–` if it is undefined."""
    if isinstance(number, Estimate):
        ends = f" [{in_words(number.low, digits)}, {in_words(number.high, digits)}]"
        return in_words(number.value, digits) + (ends if number.low == number.low else "")
    if number is None or number != number:
        return "–"
    if isinstance(number, int) or abs(number) >= 10**digits:
        return f"{number:.0f}"
    return f"{number:.{digits}g}"


def plural(n: int, thing: str) -> str:
    """`1 trace`, `6 traces`, `1,024 tokens`."""
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def in_percent(number: Estimate | float) -> str:
    """A change in whole percent: `−27 % [−33, −21]`."""
    if isinstance(number, Estimate):
        ends = (
            ""
            if number.low != number.low
            else f" [{_minus(f'{100 * number.low:.0f}')}, {_minus(f'{100 * number.high:.0f}')}]"
        )
        return in_percent(number.value) + ends
    if number != number:
        return "–"
    return f"{_minus(f'{100 * number:.0f}')} %"


def in_hundredths(number: Estimate | float, *, signed: bool = False) -> str:
    """A share, a score or the difference of two with two decimals: `0.68`, `−0.15 [−0.30, −0.03]`; `signed` puts a plus before a gain."""
    if isinstance(number, Estimate):
        ends = "" if number.low != number.low else f" [{in_hundredths(number.low)}, {in_hundredths(number.high)}]"
        return in_hundredths(number.value, signed=signed) + ends
    if number != number:
        return "–"
    # By its decimal digits, since 33 of 40 is 0.825 to a reader and a little less in binary.
    text = _minus(str(Decimal(str(number)).quantize(Decimal("0.01"), ROUND_HALF_UP)))
    return f"+{text}" if signed and number > 0 else text


def shortest_range(texts: Sequence[str]) -> str:
    """`0.60 to 1.00` for the first and the last of some texts, `0.83` if they are the same."""
    return " to ".join(dict.fromkeys([texts[0], texts[-1]]))


def _minus(text: str) -> str:
    """With a minus sign in place of the hyphen, and no sign before a zero."""
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def number_rows(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of every number, names dotted: `("seal.tokens_base", "41.2")`.

    A list under `ci` or `…_ci` is an interval, `[0.8, 0.86]`; any other list of three numbers is a value with its interval,
    `0.572 [0.454, 0.657]`, unless its name begins with `random`; whatever else is in a list stands with commas between, `351, 357`.
    """
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", text) for inner, text in number_rows(value))
        elif isinstance(value, list):
            yield name, _list_text(name, value)
        else:
            yield name, _number_text(value)


def _list_text(name: str, values: Sequence[object]) -> str:
    texts = list(map(_number_text, values))
    if name == "ci" or name.endswith("_ci"):
        return f"[{', '.join(texts)}]"
    if len(texts) == 3 and not name.startswith("random"):
        return f"{texts[0]} [{texts[1]}, {texts[2]}]"
    return ", ".join(texts)


def _number_text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
