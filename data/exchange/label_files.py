"""Labels of a user's own: a CSV or JSONL file that names traces or problems, and says one thing of each."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import json_lines
from reasonscope.data.trace import Trace

_IDS = ("trace_id", "trace", "id", "problem_id", "problem")
_LABELS = ("label", "value", "target")


def read_labels(path: str | Path) -> dict[str, Any]:
    """The label of each id in a CSV or JSONL file; an id is that of a trace, or of a problem and then of all its samples.

    Ids are in the column `trace_id`, `trace`, `id`, `problem_id` or `problem`, labels in `label`, or in the only other column. Rows
    without a label are left out. Raises InputError, the line named, for a row without an id, or an id with two labels.
    """
    given = Path(path)
    rows = _csv_rows(given) if given.suffix.lower() in (".csv", ".tsv") else json_lines(given)
    labels: dict[str, Any] = {}
    for where, row in rows:
        id, label = _pair(row, where)
        if label in (None, ""):
            continue
        if labels.setdefault(id, label) != label:
            raise InputError(f"{where}: {id!r} is {label!r} here and {labels[id]!r} before; keep one of the two labels")
    if not labels:
        raise InputError(f"{given} has no labels; write a line for each trace, with the columns id and label")
    return labels


def labels_of(labels: Mapping[str, Any], traces: Sequence[Trace]) -> list[Any]:
    """The label of each trace, by its own id or else its problem's; None if there is neither.

    Raises InputError if no label belongs to any trace.
    """
    found = [labels.get(trace.id, labels.get(trace.problem.id)) for trace in traces]
    if traces and all(label is None for label in found):
        raise InputError(
            f"none of the {len(labels)} labels (the first is for {next(iter(labels))!r}) is for a trace or a problem of this run; "
            f"its ids look like {traces[0].id!r} and {traces[0].problem.id!r}"
        )
    return found


def _pair(row: Any, where: str) -> tuple[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object with id and label, got {type(row).__name__}")
    name = next((name for name in _IDS if row.get(name) not in (None, "")), None)
    if name is None:
        raise InputError(f"{where}: names no trace or problem; give one of the columns {', '.join(_IDS)}")
    others = [key for key in row if key not in _IDS]
    column = next((key for key in _LABELS if key in row), others[0] if len(others) == 1 else None)
    if column is None:
        raise InputError(f"{where}: has the columns {', '.join(map(str, row))}; call the one with the labels `label`")
    return str(row[name]), row[column]


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as CSV ({error}); give a CSV or JSONL file with id and label"
        ) from error
