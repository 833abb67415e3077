"""Heads by the name of a result of the run: `from:analyse/heads@top10`."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from reasonscope.analysis.results import Result, load_results
from reasonscope.analysis.runs.questions import QUESTIONS
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.storage.run_folder import RunFolder
from reasonscope.probes.architecture.heads import Head

_NAME = re.compile(r"from:analyse/([\w-]+)(?:\.([\w -]+))?(?:@(top|bottom)(\d+))?")
_AXES = ("layer", "head")


def named_heads(where: RunFolder, name: str) -> list[Head]:
    """The heads that `from:analyse/NAME[.LINE][@topN]` names.

    NAME is an analysis, or one of the results that it writes; LINE is a metric or a list of a result that has several. `@top10` takes the
    ten highest values, averaged over traces, and `@bottom10` the ten lowest; without it, a result that lists heads gives its list.

    Args:
        where: The folders of the run.
        name: The name.

    Returns:
        The heads, best first.

    Raises:
        InputError: For a name of another form, or a result that does not exist, says nothing of heads, or has fewer heads.

    Example:
        run = rs.open_run("runs/mine")
        heads = rs.analysis.named_heads(run.where, "from:analyse/heads@top10")
        plan = rs.analysis.head_plan(heads)
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise InputError(
            f"{name!r:.80} names no heads; write from:analyse/NAME@top10, such as from:analyse/heads@top10 or from:analyse/receivers"
        )
    asked, line, end, n = match.group(1).replace("-", "_"), match.group(2), match.group(3), match.group(4)
    results = _results(where, asked)
    listed = next((found for found in (_list(one, line or "heads") for one in results) if found), None)
    if n is None and listed is not None:
        return listed
    if n is None:
        raise InputError(f"{name}: {asked} ranks heads but lists none; say how many, such as {name}@top10")
    scores = next(_scores(results, line), None)
    if scores is None:
        raise InputError(f"{name}: {_without(results, line)}")
    return _best(scores, int(n), name, lowest=end == "bottom")


def heads_of(where: RunFolder, text: str) -> tuple[str, list[Head]]:
    """Heads as the command line takes them, `2.1,3.0` or a name of a result, and what to call them."""
    if text.startswith("from:"):
        return text.removeprefix("from:analyse/"), named_heads(where, text)
    return "heads", [Head.parse(one.strip()) for one in text.split(",") if one.strip()]


def _results(where: RunFolder, asked: str) -> list[Result]:
    """The results of an analysis or of one of its methods. Raises InputError, with the command that makes them, if it has none."""
    owner = next((key for key, question in QUESTIONS.items() if asked in (key, *question.writes)), None)
    if owner is None:
        raise InputError(f"no analysis is called {asked!r}; choose one of {', '.join(QUESTIONS)}")
    methods = [asked] if asked in QUESTIONS[owner].writes and asked != owner else list(QUESTIONS[owner].writes)
    found = [one for method in methods for one in load_results(where.analyses, method) if one.measured]
    if not found:
        command = f"reasonscope analyse {owner.replace('_', '-')} --run {where.store}"
        raise InputError(f"{where.results} has no result of {asked}; write it with: {command}")
    return found


def _list(result: Result, name: str) -> list[Head] | None:
    """The heads that a result lists under a name."""
    listed = result.numbers.get(name)
    if not isinstance(listed, list) or not all(isinstance(one, str) and "." in one for one in listed):
        return None
    return [Head.parse(one) for one in listed]


def _scores(results: Sequence[Result], line: str | None) -> Iterator[Values]:
    """Scores (layer, head) of each method that has them, averaged over traces."""
    for method in dict.fromkeys(one.method for one in results):
        own = [one for one in results if one.method == method]
        names = tuple(axis.name for axis in own[0].axes)
        if line is None and names == _AXES:
            yield _mean([one.values for one in own])
        elif line is not None and names[1:] == _AXES and line in own[0].axes[0].labels:
            yield _mean([one.values[own[0].axes[0].labels.index(line)] for one in own])


def _mean(values: Sequence[Values]) -> Values:
    """The mean over traces; NaN for heads that a model lacks."""
    return np.asarray(np.mean(np.stack(values), axis=0))


def _best(scores: Values, n: int, name: str, *, lowest: bool) -> list[Head]:
    flat = scores.ravel() if lowest else -scores.ravel()
    order = [int(i) for i in np.argsort(flat, kind="stable") if np.isfinite(flat[i])]
    if not 1 <= n <= len(order):
        raise InputError(f"{name}: {n} heads are asked for, and the result ranks {len(order)}")
    return [Head(layer=i // scores.shape[1], index=i % scores.shape[1]) for i in order[:n]]


def _without(results: Sequence[Result], line: str | None) -> str:
    """Why no scores were found, with what could be named instead."""
    lines = [
        label for one in results if [axis.name for axis in one.axes][1:] == list(_AXES) for label in one.axes[0].labels
    ]
    lists = [key for one in results for key in one.numbers if _list(one, key)]
    there = ", ".join(dict.fromkeys([*lines, *lists]))
    if not there:
        return "this result says nothing of heads; choose heads, receivers, emergent-heads or cliff"
    return f"this result has no {line!r}; it has {there}" if line else f"name one of its lines after a dot: {there}"
