"""How findings are worded: numbers over traces, ranges of chance, tokens in their context, and why something is undefined."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from reasonscope.analysis.results import Result
from reasonscope.data.intervals import Estimate, mean_estimate
from reasonscope.data.summary import Summary, in_hundredths, in_words, plural
from reasonscope.data.trace import Trace

# From the results of an analysis, and the traces that were analysed, to what they tell.
Summarise = Callable[[Sequence[Result], Sequence[Trace]], Summary]

MOST_ROWS = 10
MOST_QUOTES = 5
FEW_QUOTES = 3
BY_CHANCE = 0.025  # of values that are as good as chance, above a 95 % range of many draws
PERMUTED = "permuted coordinates"  # of an answer: the null of MI if there are too few other answers
_AROUND = 30  # characters on each side of a token
_LONGEST = 160  # characters of a quoted sentence


def measured(results: Sequence[Result], method: str) -> list[Result]:
    """The results of a method that hold a number."""
    return [result for result in results if result.method == method and result.measured]


def trace_of(result: Result, traces: Sequence[Trace]) -> Trace:
    """The trace of a result."""
    return next(trace for trace in traces if trace.id == result.provenance["trace"])


def sentence_named(sentence: int | str, result: Result, traces: Sequence[Trace]) -> str:
    """`sentence 5`, with its trace if there are several: `sentence 5 of ledger-1/0`."""
    return f"sentence {sentence}" + ("" if len(traces) == 1 else f" of {result.provenance['trace']}")


def labelled_sentence(result: Result, i: int, traces: Sequence[Trace]) -> str:
    """`sentence_named` by the label of sentence `i`: published sentences keep their published numbers."""
    return sentence_named(result.axes[-1].labels[i], result, traces)


def sentence_pairs(found: Sequence[Result]) -> list[tuple[float, tuple[Result, int, int]]]:
    """Every pair (target, source) of sentences that was measured, with its value."""
    return [
        (float(one.values[target, source]), (one, int(target), int(source)))
        for one in found
        for target, source in zip(*np.nonzero(np.isfinite(one.values)), strict=True)
    ]


def head_named(at: Sequence[int]) -> str:
    """`3.5` for head 5 of layer 3."""
    return f"{at[0]}.{at[1]}"


def groups_of(results: Sequence[Result], traces: Sequence[Trace]) -> list[str]:
    """The problem of each result's trace."""
    return [trace_of(result, traces).problem.group for result in results]


def estimate_of(number: Mapping[str, Any]) -> Estimate:
    """A number of a result: `value`, and the ends of its interval if it has one."""
    low, high = number.get("ci") or (number.get("low"), number.get("high"))
    return Estimate(value=float_of(number["value"]), low=float_of(low), high=float_of(high))


def over_traces(values: ArrayLike, groups: Sequence[str], *, shares: bool = True, least: float = -np.inf) -> Estimate:
    """The mean over traces with its interval over problems; one problem has no interval. No value can be below `least`."""
    known = np.asarray(values, dtype=np.float64)
    kept = np.isfinite(known)
    problems = [group for group, keep in zip(groups, kept, strict=True) if keep]
    if len(set(problems)) > 1:
        found = mean_estimate(known[kept], groups=problems, shares=shares)
        return Estimate(value=found.value, low=max(found.low, least), high=found.high)
    mean = float(known[kept].mean()) if kept.any() else float("nan")
    return Estimate(value=mean, low=float("nan"), high=float("nan"))


def times(n: int) -> str:
    """`once`, or `3 times`."""
    return "once" if n == 1 else f"{n} times"


def mean_of(n: int) -> str:
    """What follows a number over traces: ` (mean of 6 traces)`, nothing for one trace."""
    return "" if n == 1 else f" (mean of {n} traces)"


def short(number: Estimate | float | None) -> str:
    """A number of any unit with three digits, `−0.12 [−0.2, −0.03]`; what is nearly zero is `< 0.001`."""
    if isinstance(number, Estimate):
        value, low, high = (short(one) for one in (number.value, number.low, number.high))
        return value if np.isnan(number.low) or value == low == high else f"{value} [{low}, {high}]"
    if number is not None and 0 < abs(number) < 0.0005:
        return "< 0.001" if number > 0 else "> −0.001"
    return in_words(number).replace("-", "−")


def span(low: float | None, high: float | None, *, share: bool = False) -> str:
    """What chance gives: `−0.03 to 0.02`, one number if both ends are the same, `–` if it is not known."""
    if low is None or high is None or np.isnan([low, high]).any():
        return "–"
    say = in_hundredths if share else short
    return " to ".join(dict.fromkeys([say(low), say(high)]))


def side_of(value: float, low: float, high: float) -> str:
    """`inside` or `outside`, of what chance gives."""
    return "inside" if low <= value <= high else "outside"


def null_at(result: Result, at: tuple[int, ...]) -> tuple[float, float]:
    """The ends of the null of one value; NaN without a null."""
    null = result.null
    return (float("nan"), float("nan")) if null is None else (float(null.low[at]), float(null.high[at]))


def value_at(result: Result, at: tuple[int, ...]) -> Estimate:
    """One value of a result with its interval."""
    low, high = (np.nan, np.nan) if result.interval is None else (result.interval.low[at], result.interval.high[at])
    return Estimate(value=float(result.values[at]), low=float(low), high=float(high))


def quoted(text: str) -> str:
    """A text in quotation marks on one line, shortened."""
    line = " ".join(text.split())
    return f"“{line if len(line) <= _LONGEST else line[: _LONGEST - 1].rstrip() + '…'}”"


def in_context(trace: Trace, token: int) -> str:
    """A generated token between the characters around it: `…Eve takes out »8«, four times…`."""
    start, stop = (int(end) for end in trace.offsets[token])
    written = int(trace.offsets[trace.n_prompt_tokens][0]) if trace.n_prompt_tokens < len(trace.offsets) else 0
    piece = trace.text[start:stop]
    shown = piece.strip() or piece.encode("unicode_escape").decode()
    before = trace.text[max(written, start - _AROUND) : start] + piece[: len(piece) - len(piece.lstrip())]
    return f"…{_one_line(before)}»{shown}«{_one_line(trace.text[stop : stop + _AROUND])}…"


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def undefined_result_notes(results: Sequence[Result], most: int = 3) -> list[str]:
    """Why results are undefined: one line for all reasons that differ in their numbers only."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if not result.measured:
            found.setdefault((result.method, re.sub(r"\d+", "#", result.reason)), []).append(result)
    lines = [_undefined_line(alike) for alike in found.values()]
    more = [f"{len(lines) - most} more reasons are in --json."] if len(lines) > most else []
    return lines[:most] + more


def _undefined_line(alike: Sequence[Result]) -> str:
    first, traces = alike[0], {str(result.provenance.get("trace", "all")): result.reason for result in alike}
    trace = next(iter(traces))
    if len(traces) == 1:
        return f"Undefined ({first.method}) for {trace}: {first.reason}."
    example = "" if len(set(traces.values())) == 1 else f" {trace}:"
    return f"Undefined ({first.method}) for {plural(len(traces), 'trace')}:{example} {first.reason}."


def left_out(shown: int, of: int, what: str) -> list[str]:
    """A note that a table shows a part."""
    return [f"The table shows {shown} of {of} {what}; --json has all."] if of > shown else []


def without_columns(summary: Summary, named: Set[str]) -> Summary:
    """The summary without the columns of these names, and without those that hold nothing but `–`."""
    kept = [
        i
        for i, column in enumerate(summary.columns)
        if column not in named and any(row[i] != "–" for row in summary.rows)
    ]
    rows = [[row[i] for i in kept] for row in summary.rows]
    return replace(summary, columns=[summary.columns[i] for i in kept], rows=rows)


def strongest(scores: Sequence[tuple[float, Any]], most: int) -> Iterator[Any]:
    """What scores highest, the highest first; NaN is left out."""
    known = [(score, i) for i, (score, _) in enumerate(scores) if np.isfinite(score)]
    for _, i in sorted(known, key=lambda pair: (-pair[0], pair[1]))[:most]:
        yield scores[i][1]


def float_of(value: Any) -> float:
    """A number of a result; NaN for null."""
    return float("nan") if value is None else float(value)
