"""Files that somebody else may have written: any fault in one is a single error that names it, never a foreign
exception."""

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
    """The value in `raw`. Raises InputError if it is not JSON, is nested too deep, or holds half of a surrogate pair."""
    try:
        value = json.loads(raw)
        if ("\\ud" if isinstance(raw, str) else b"\\ud") in raw.lower():  # type: ignore[operator]  # both are str or both bytes
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a text holds half a surrogate pair, which is invalid Unicode: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    return value


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a JSONL file that is not blank: the place to name in an error, and the value. Raises InputError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_json(line, where)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSONL file") from error


def parse_yaml(text: str, where: str) -> Any:
    """The value in a YAML text, without Python objects and without aliases. Raises InputError if it is not YAML."""
    import yaml

    class WithoutAliases(yaml.SafeLoader):  # type: ignore[misc]  # of a library without types
        """Refuses aliases: a few aliases of aliases expand to more than any memory holds."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.YAMLError(f"the alias *{event.anchor} {event.start_mark}; write out what it stands for")
            return super().compose_node(parent, index)

    try:
        return WithoutAliases(text).get_single_data()
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the plan {where}: {error}") from error


@contextmanager
def wrap_errors(where: object, kind: type[ReasonscopeError] = InputError) -> Iterator[None]:
    """Inside, a value that is missing or not of the type that the format requires raises `kind`, whose message names
    `where`.

    Only for code that takes a foreign file apart: elsewhere these exceptions are mistakes of ours.
    """
    try:
        yield
    except ReasonscopeError as error:
        if kind is InputError or isinstance(error, kind):
            raise
        raise kind(f"{where}: {error}") from error
    except _WRONG as error:
        raise kind(
            f"{where} is damaged or of another format ({type(error).__name__}: {error}); make it again, or restore it from a copy"
        ) from error


def check_fields(values: Mapping[str, Any], fields: Mapping[str, type], where: str) -> None:
    """Raise InputError if one of `fields` is missing or has another type (a bool does not count as an int here)."""
    for name, kind in fields.items():
        value = values.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{where} is damaged: its {name} must be {kind.__name__}, got {value!r:.60}; make it again, or restore it "
                f"from a copy"
            )
