"""Plans of ablation experiments, in YAML:

n_controls: 20                  # random ablations for each, at least 20
traces: 32                      # how many traces of the run are read; all if not given
problems: 16                    # how many problems the ablated model answers again; none if not given
n_regeneration_controls: 5      # random ablations that answer them too (of heads, MLPs and layers)
seed: 0
ablations:
  - name: two heads
    heads: ["2.1", "3.0"]        # layer.head, in quotes
    how: mean                    # zero (the default), mean or resample
    scope: {on: think}           # the fields of Scope; every token if not given
  - {name: an MLP, mlps: [3]}
  - {name: a layer, layers: [3], how: resample}
  - name: doubts
    tokens: {on: think, words: ["Wait"]}      # words of one token, with or without a leading space
  - name: the answer does not see the thinking
    edges: {readers: {on: answer}, read: {on: think}, layers: [3, 4]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import parse_yaml, wrap_errors
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.ablation import Ablation
from reasonscope.steering.ablation.knockout import Edges
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.thinking import single_tokens

_NUMBERS = ("n_controls", "traces", "problems", "n_regeneration_controls", "seed")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ablations to run on the same traces, and how; see the module for the fields."""

    ablations: tuple[Ablation, ...]
    n_controls: int = 20
    traces: int | None = None
    problems: int = 0
    n_regeneration_controls: int = 5
    seed: int = 0


def read_plan(path: Path, model: Model) -> Plan:
    """Read a plan. Raises InputError for an invalid one, saying which entry is wrong and what is allowed there."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the plan {path}: {error}") from error
    with wrap_errors(path):
        return _plan(content, path, model)


def _plan(content: object, path: Path, model: Model) -> Plan:
    entries = _mapping(content, str(path), ("ablations", *_NUMBERS))
    listed = entries.get("ablations")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path} has no ablations; list at least one under `ablations:`")
    known = {name: _integer(entries[name], f"{path}, {name}") for name in _NUMBERS if entries.get(name) is not None}
    ablations = tuple(_ablation(entry, f"{path}, ablation {i + 1}", model) for i, entry in enumerate(listed))
    return Plan(ablations=ablations, **known)


def _ablation(entry: object, where: str, model: Model) -> Ablation:
    given = _mapping(entry, where, [field.name for field in fields(Ablation)])
    if "name" not in given:
        raise InputError(f"{where} has no name; add one")
    changed: dict[str, Any] = {"name": str(given["name"])}
    for key in given.keys() - {"name"}:
        value = given[key]
        if key == "heads":
            changed[key] = tuple(_head(head, where) for head in _listed(value, f"{where}, {key}"))
        elif key in ("mlps", "layers"):
            changed[key] = _integers(value, f"{where}, {key}")
        elif key in ("tokens", "scope"):
            changed[key] = _scope(value, f"{where}, {key}", model)
        elif key == "edges":
            ends = _mapping(value, f"{where}, edges", ("readers", "read", "layers"))
            scopes = {end: _scope(ends.get(end), f"{where}, edges.{end}", model) for end in ("readers", "read")}
            layers = ends.get("layers")
            changed[key] = Edges(
                **scopes, layers=None if layers is None else _integers(layers, f"{where}, edges.layers")
            )
        else:
            changed[key] = value
    return Ablation(**changed)


def _head(value: object, where: str) -> Head:
    if not isinstance(value, str):
        raise InputError(
            f'{where}: {value!r:.60} is not a head; write layer.head in quotes, as "3.10" (3.10 alone is the number 3.1)'
        )
    try:
        return Head.parse(value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _scope(value: object, where: str, model: Model) -> Scope:
    given = dict(_mapping(value, where, [*(field.name for field in fields(Scope) if field.name != "marks"), "words"]))
    if "words" in given:
        words = _listed(given.pop("words"), f"{where}, words")
        given["tokens"] = list(single_tokens(model, [str(word) for word in words]))
    plain: dict[str, Any] = {}
    for key, item in given.items():
        is_set = key == "tokens" or key.endswith("_tokens")
        if is_set or key.endswith("_positions"):
            numbers = _integers(item, f"{where}, {key}")
            plain[key] = frozenset(numbers) if is_set else numbers
        elif key.endswith("_window"):
            plain[key] = _window(item, f"{where}, {key}")
        else:
            plain[key] = item
    needs_marks = plain.get("on", "all") != "all" or plain.get("steps") is not None
    return Scope.of(model, **plain) if needs_marks else Scope(**plain)


def _window(value: object, where: str) -> tuple[int, int | None]:
    match _listed(value, where):
        case [start]:
            return _integer(start, where), None
        case [start, stop]:
            return _integer(start, where), None if stop is None else _integer(stop, where)
    raise InputError(f"{where}: {value!r:.60} is not a window; write [start, stop] (stop excluded), or [start]")


def _integers(value: object, where: str) -> tuple[int, ...]:
    return tuple(_integer(item, where) for item in _listed(value, where))


def _integer(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise InputError(f"{where}: {value!r:.60} is not a whole number")
    return value


def _listed(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where}: {value!r:.60} is not a list; write it in brackets")
    return value


def _mapping(value: object, where: str, allowed: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {value!r:.60}; give names with values, any of {', '.join(allowed)}")
    value = {"on" if key is True else key: item for key, item in value.items()}  # YAML 1.1 reads the word "on" as true
    if unknown := [key for key in value if key not in allowed]:
        raise InputError(f"{where}: unknown name {unknown[0]!r}; allowed are {', '.join(allowed)}")
    return value
