"""Files that somebody else may have written: whatever is wrong with one is a single error that names it, never a foreign exception."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from reasonscope.data.errors import InputError, ReasonscopeError

# How a zip archive (which torch writes) and a plain pickle begin.
_PICKLES = (b"PK\x03\x04", b"\x80")
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


@contextmanager
def well_formed(where: object, kind: type[ReasonscopeError] = InputError) -> Iterator[None]:
    """Inside, a value that is missing, or not of the kind that the format says, raises `kind` naming `where`.

    For code that takes a foreign file apart, and for nothing else: elsewhere these exceptions are mistakes of ours.
    """
    try:
        yield
    except ReasonscopeError:
        raise
    except _WRONG as error:
        raise kind(
            f"{where} is damaged, or not what it says it is ({type(error).__name__}: {error}); make it again, or restore it from a copy"
        ) from error


def read_arrays(
    path: str | Path, key: str, what: str, *, version: int, fields: Mapping[str, type]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The tensors by name of a safetensors file that we wrote, and the JSON object that its header keeps under `key`.

    The object has to hold a `version` up to ours, and `fields`, each of its type. Raises InputError for any other file; a pickle is not
    opened, and the library itself refuses headers of more than 100 MB and tensors that reach beyond the file.
    """
    try:
        with Path(path).open("rb") as opened:
            start = opened.read(9)
        # The length of a safetensors header may begin with the same byte; only there an object follows.
        if start.startswith(_PICKLES) and start[8:] != b"{":
            raise InputError(
                f"{path} is no {what} but a pickle, which can run code and is not opened; save it as safetensors"
            )
        with safe_open(path, framework="numpy") as file:
            header = parse_json((file.metadata() or {}).get(key, "null"), f"the header of {path}")
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        if isinstance(error, ReasonscopeError):
            raise
        raise InputError(f"{path} is no {what}: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} is a safetensors file, but no {what} of reasonscope")
    check_fields(header, {"version": int}, f"{what} {path}")
    if not 1 <= header["version"] <= version:
        raise InputError(f"{path} has version {header['version']}, newer than {version}; upgrade reasonscope")
    check_fields(header, fields, f"{what} {path}")
    return tensors, header


def check_fields(values: Mapping[str, Any], fields: Mapping[str, type], where: str) -> None:
    """Raise InputError where one of `fields` is missing or of another type (a bool is no int here)."""
    for name, kind in fields.items():
        value = values.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{where} is damaged: its {name} is {value!r:.60}, and no {kind.__name__}; make it again, or restore it from a copy"
            )
