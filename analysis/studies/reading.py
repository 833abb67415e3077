"""From plain data, as YAML gives it, to frozen dataclasses: one line says what does not fit, and what was probably meant."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from reasonscope.data.errors import InputError

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def build(kind: type[T], given: object, where: str) -> T:
    """A `kind` from a mapping of its fields. Raises InputError for an unknown or missing field, or a value of another type."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]  # a dataclass
    values = mapping(given, where)
    for name in values:
        check_known(name, known, f"{where}: unknown option")
    needed = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{where}: {missing[0]} is missing; add it")
    return kind(**{name: _value(value, hints[name], f"{where}, {name}") for name, value in values.items()})


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """`value`, if it is a mapping. Raises InputError otherwise."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: write names with values, not {value!r:.60}")
    return {str(key): item for key, item in value.items()}


def check_known(name: str, known: Iterable[str], what: str) -> None:
    """Raise InputError if `name` is not one of `known`, with the nearest of them."""
    names = sorted(known)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{what} {name!r}; {meant}choose from {', '.join(names) or 'nothing'}")


def _value(value: Any, hint: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None and NoneType in inner else _value(value, _not_none(inner), where)
    if origin is Literal:
        if value not in inner:
            raise InputError(f"{where}: {value!r:.60}; choose from {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(item, inner[0], where) for item in items)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _value(item, inner[1], f"{where}, {key}") for key, item in mapping(value, where).items()}
    if hint in _WORDS:
        return _plain(value, hint, where)
    return build(cast(type[Any], hint), value, where)


def _not_none(hints: tuple[Any, ...]) -> Any:
    return next(hint for hint in hints if hint is not NoneType)


def _plain(value: Any, hint: type[Any], where: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: is_number and value == int(value),
        float: is_number,
        str: isinstance(value, str) or is_number,
        Path: isinstance(value, str | Path),
    }
    if not fits[hint]:
        raise InputError(f"{where}: {value!r:.60} is not {_WORDS[hint]}")
    return hint(value)
