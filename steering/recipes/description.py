"""Scopes and operators in words that need no model: as a recipe's file and its table show them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from reasonscope.data.errors import InputError
from reasonscope.steering.vectors.operators import OPERATORS, Clamp, Operator
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.token_regions import ThinkTokenIds

if TYPE_CHECKING:
    from reasonscope.probes.models.prompting import Prompting

_CLAMP = "clamp"
_REGIONS = {"think": "the thinking", "close_window": "the end of the thinking", "answer": "the answer"}
_FIELDS = {field.name: field.default for field in fields(Scope) if field.name != "marks"}
# A scope cannot be made without the ids of the tags; these stand in for them while a description is checked.
_ANY = ThinkTokenIds(opens=(0,), closes=(1,))


def describe_scope(scope: Scope) -> dict[str, Any]:
    """The fields of a scope that are set, as JSON; `marks` are left out, since every model has its own."""
    set_ = {name: getattr(scope, name) for name, default in _FIELDS.items() if getattr(scope, name) != default}
    return {name: _plain(value) for name, value in set_.items()}


def scope_for(description: Mapping[str, Any], model: "Prompting") -> Scope:
    """The scope that a description means for `model`. Raises InputError if it needs think tags that the model lacks."""
    return scope_with(description, ThinkTokenIds.of(model) if needs_tags(description) else None)


def scope_with(description: Mapping[str, Any], marks: ThinkTokenIds | None) -> Scope:
    """The scope that a description means with these tags and separators."""
    return Scope(**_fields(description), marks=marks)


def check_scope(description: Mapping[str, Any]) -> None:
    """Raise InputError for a field that a scope does not have, or a value that it does not take."""
    Scope(**_fields(description), marks=_ANY)


def needs_tags(description: Mapping[str, Any]) -> bool:
    """Whether the scope is a part of the thinking, so that a model needs think tags."""
    return description.get("on", "all") != "all" or description.get("steps") is not None


def describe_operator(operator: Operator) -> dict[str, Any]:
    """`{"name": …}` with the parameters of the operator. Raises InputError for one that a file cannot hold, such as a random control's."""
    if isinstance(operator, Clamp):
        return {"name": _CLAMP, "to": float(operator.to)}
    for name, known in OPERATORS.items():
        if operator is known:
            return {"name": name}
    raise InputError(f"a recipe holds the operators {', '.join(OPERATORS)} and clamp, not {operator!r:.80}")


def operator_for(description: Mapping[str, Any]) -> Operator:
    """The operator of a description. Raises InputError for an unknown name or parameters."""
    name, parameters = description.get("name"), {key: v for key, v in description.items() if key != "name"}
    if name == _CLAMP and parameters.keys() == {"to"} and isinstance(parameters["to"], int | float):
        return Clamp(to=float(parameters["to"]))
    if not isinstance(name, str) or name not in OPERATORS or parameters:
        raise InputError(
            f"no operator is {dict(description)!r:.80}; choose from {', '.join(OPERATORS)}, or clamp with `to`"
        )
    return OPERATORS[name]


def scope_in_words(description: Mapping[str, Any]) -> str:
    """`separators of the thinking`, `last prompt token, every generated token`."""
    rest = dict(description)
    region, steps = rest.pop("on", "all"), rest.pop("steps", None)
    named = [_named(name, value) for name, value in rest.items()]
    if steps is not None:
        named.insert(0, "separators" if steps == "separators" else f"{steps} steps")
    where = f" of {_REGIONS[region]}" if region != "all" else " of the thinking" if steps is not None else ""
    return f"{', '.join(named) or 'every token'}{where}"


def operator_in_words(description: Mapping[str, Any]) -> str:
    """`add`, or `clamp to −1.2`."""
    return str(description["name"]) + "".join(
        f" {key} {value:.4g}" for key, value in description.items() if key != "name"
    )


def may_share_a_token(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two scopes may choose the same token; False only if no token can be in both."""
    regions = {_region(first), _region(second)} - {"all"}
    phases = _phases(first) & _phases(second)
    return len(regions) < 2 and bool(phases)


def _region(description: Mapping[str, Any]) -> str:
    return "think" if description.get("steps") is not None else str(description.get("on", "all"))


def _phases(description: Mapping[str, Any]) -> set[str]:
    """`prompt` and `generation`, the parts of a sequence that hold chosen tokens."""
    named = {phase for phase in ("prompt", "generation") for name in description if name.startswith(phase)}
    return named or {"prompt", "generation"}


def _fields(description: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(description) - set(_FIELDS)):
        raise InputError(f"a scope has no field {unknown[0]!r}; choose from {', '.join(_FIELDS)}")
    return {name: _value(name, value) for name, value in description.items()}


def _value(name: str, value: Any) -> Any:
    """The value of a field from JSON, where tuples and sets are lists."""
    if name in ("on", "steps", "variant"):
        return value
    whole = isinstance(value, Sequence) and all(isinstance(one, int) or one is None for one in value)
    if not whole or (name.endswith("window") and len(value) != 2):
        raise InputError(f"{name} = {value!r:.60}: a scope takes whole numbers, two (start, end or null) for a window")
    return frozenset(value) if name.endswith("tokens") else tuple(value)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _named(name: str, value: Any) -> str:
    if name == "prompt_positions" and value == [-1]:
        return "last prompt token"
    if name == "generation_window" and value == [0, None]:
        return "every generated token"
    return f"{name.replace('_', ' ')} {value}"
