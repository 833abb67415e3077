"""What a probe is to predict: a field of the traces' metadata or a file of labels, as classes or as numbers."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.label_files import labels_of, read_labels
from reasonscope.data.trace import Trace

LabelTask = Literal["classification", "regression"]
# A field such as "meta.topic", a file of labels, or labels by the id of a trace or a problem.
Label: TypeAlias = str | Path | Mapping[str, Any]
# Pairs of words of which the second is what is asked for.
_YES = (("false", "true"), ("no", "yes"), ("0", "1"), ("wrong", "right"), ("incorrect", "correct"))
_FIELD = "meta."


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Traces with a target each.

    Attributes:
        name: What the label is called.
        traces: Traces that have a label.
        targets: Its value, (row,): a number, or 1 for the positive class and 0 for the others.
        positive: The positive class; empty for a regression.
        counts: Number of traces of each class; empty for a regression.
    """

    name: str
    traces: Sequence[Trace]
    targets: Values
    positive: str
    counts: Mapping[str, int]


def label_values(label: Label, traces: Sequence[Trace]) -> tuple[str, list[Any]]:
    """The name of a label, and its value for each trace (None without one).

    A field is looked up in the trace's own `meta`, then in its problem's. Raises InputError if no trace has a label.
    """
    if isinstance(label, Mapping):
        return "label", labels_of(label, traces)
    if not str(label).startswith(_FIELD) or Path(label).is_file():
        if not Path(label).is_file():
            raise InputError(f"label {str(label)!r} is neither a file nor a field of the run; {_fields(traces)}")
        return Path(label).stem, labels_of(read_labels(label), traces)
    path = str(label).removeprefix(_FIELD).split(".")
    values = [
        next((v for meta in (t.meta, t.problem.meta) if (v := _at(meta, path)) is not None), None) for t in traces
    ]
    if all(value is None for value in values):
        raise InputError(f"none of the {len(traces)} traces has the field {label}; {_fields(traces)}")
    return str(label), values


def labelled(label: Label, traces: Sequence[Trace], task: LabelTask, positive: str | None = None) -> Labelled:
    """The traces that have a label, with a target each. Raises InputError for values that do not suit the task."""
    name, values = label_values(label, traces)
    kept = [(trace, value) for trace, value in zip(traces, values, strict=True) if value is not None]
    own, given = [trace for trace, _ in kept], [value for _, value in kept]
    if task == "regression":
        return Labelled(name=name, traces=own, targets=_numbers(name, own, given), positive="", counts={})
    words = [_word(value) for value in given]
    counts = Counter(words)
    chosen = _positive_class(name, counts, positive)
    targets = np.array([word == chosen for word in words], dtype=np.float64)
    return Labelled(name=name, traces=own, targets=targets, positive=chosen, counts=counts)


def label_task(text: str) -> LabelTask:
    """The task of that name. Raises InputError for any other."""
    for task in get_args(LabelTask):
        if text == task:
            return task  # type: ignore[no-any-return]  # one of its arguments
    raise InputError(f"unknown task {text!r}; choose one of {', '.join(get_args(LabelTask))}")


def file_name(label: str) -> str:
    """A name for the files of a probe of `label`: a file's stem, or the last part of a field."""
    field = label.removeprefix(_FIELD) if label.startswith(_FIELD) else Path(label).stem
    return re.sub(r"[^\w-]+", "_", field) or "label"


def _positive_class(name: str, counts: Mapping[str, int], asked: str | None) -> str:
    """The class that the probe predicts: the one that was asked for, or of two the affirmative one, else the later by name.

    Raises InputError for one class, more than two with none asked for, or a class that does not occur.
    """
    shown = ", ".join(f"{word!r} {n}" for word, n in sorted(counts.items(), key=lambda item: -item[1])[:8])
    if asked is not None:
        by_lower = {word.lower(): word for word in counts}
        if asked.lower() not in by_lower:
            raise InputError(f"no trace has {name} = {asked!r}; its classes are: {shown}")
        asked = by_lower[asked.lower()]
    if len(counts) < 2:
        raise InputError(
            f"all {sum(counts.values())} traces have {name} = {shown.rpartition(' ')[0]}; label some of another class"
        )
    if asked is None and len(counts) > 2:
        many = (
            "; or, if they are quantities, ask for --task regression"
            if all(_is_number(word) for word in counts)
            else ""
        )
        raise InputError(f"{name} has {len(counts)} classes ({shown}); name the one to predict with --positive{many}")
    if asked is not None:
        return asked
    for pair in _YES:
        if {word.lower() for word in counts} == set(pair):
            return next(word for word in counts if word.lower() == pair[1])
    return max(counts)


def _word(value: Any) -> str:
    """A class by name; 1.0 and 1 are the same class."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value).strip()


def _numbers(name: str, traces: Sequence[Trace], values: Sequence[Any]) -> Values:
    for trace, value in zip(traces, values, strict=True):
        if isinstance(value, (Mapping, list)) or not _is_number(value):
            raise InputError(
                f"trace {trace.id!r} has {name} = {value!r:.60}, which is not a finite number; "
                "a regression needs numbers, so correct it or ask for --task classification"
            )
    numbers = np.array([float(value) for value in values])
    if len(numbers) and not np.ptp(numbers):
        raise InputError(
            f"{name} is {numbers[0]:g} for all {len(numbers)} traces; a regression needs labels that differ"
        )
    return numbers


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _at(meta: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = meta
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _fields(traces: Sequence[Trace]) -> str:
    """What could be given instead."""
    known = sorted({key for trace in traces for meta in (trace.meta, trace.problem.meta) for key in meta})
    there = ", ".join(f"{_FIELD}{key}" for key in known[:12]) or "none"
    return f"give a CSV or JSONL file with id and label, or one of the run's fields: {there}"
