"""Files that somebody else may have written: whatever is wrong with one is a single error that names it, never a foreign exception."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from reasonscope.data.errors import InputError, ReasonscopeError

_WRONG = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
)


def parse_json(raw: str | bytes, where: str) -> Any:
    """The value in `raw`. Raises InputError for what is no JSON, is nested too deep, or holds half of a surrogate pair."""
    try:
        value = json.loads(raw)
        if ("\\ud" if isinstance(raw, str) else b"\\ud") in raw.lower():  # type: ignore[operator]  # of the same kind
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a text holds half a surrogate pair, which is no Unicode: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON: {error}") from error
    return value


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The value of each line of a JSONL file that is not blank, behind the place to name in an error. Raises InputError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_json(line, where)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSONL file") from error


@contextmanager
def wrap_errors(where: object, kind: type[ReasonscopeError] = InputError) -> Iterator[None]:
    """Inside, a value that is missing, or not of the kind that the format says, raises `kind` naming `where`.

    For code that takes a foreign file apart, and for nothing else: elsewhere these exceptions are mistakes of ours.
    """
    try:
        yield
    except ReasonscopeError as error:
        if kind is InputError or isinstance(error, kind):
            raise
        raise kind(f"{where}: {error}") from error
    except _WRONG as error:
        raise kind(
            f"{where} is damaged, or not what it says it is ({type(error).__name__}: {error}); make it again, or restore it from a copy"
        ) from error


def check_fields(values: Mapping[str, Any], fields: Mapping[str, type], where: str) -> None:
    """Raise InputError where one of `fields` is missing or of another type (a bool is no int here)."""
    for name, kind in fields.items():
        value = values.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{where} is damaged: its {name} is {value!r:.60}, and no {kind.__name__}; make it again, or restore it from a copy"
            )
