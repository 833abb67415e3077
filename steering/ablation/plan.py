"""Plans of experiments that remove or patch, in YAML:

n_controls: 20                  # random ablations for each, at least 20
n_matched: 20                   # random directions that move each state as far
traces: 32                      # how many traces of the run are read; all if not given
problems: 16                    # how many problems the ablated model answers again; none if not given
n_regeneration_controls: 5      # random ablations that answer them too
seed: 0
ablations:
  - name: two heads
    heads: ["2.1", "3.0"]        # layer.head, in quotes; or from:analyse/heads@top10, which reads a result of the run
    how: mean                    # zero (the default), mean or resample
    scope: {on: think}           # the fields of Scope; every token if not given
  - {name: an MLP, mlps: [3]}
  - {name: a layer, layers: [3], how: resample}
  - {name: neurons, neurons: ["3.17", "3.40"]}
  - {name: an expert, experts: ["3.1"]}
  - {name: a direction, directions: seal.recipe.safetensors}   # a recipe, a vector or a probe; or {file: …, site: resid_post.3}
  - {name: latents, latents: {file: sae_weights.safetensors, site: resid_post.3, chosen: [17, 40]}}
  - name: doubts
    tokens: {on: think, words: ["Wait"]}      # words of one token, with or without a leading space
  - name: the answer does not see the thinking
    edges: {readers: {on: answer}, read: {on: think}, layers: [3, 4]}
  - name: one MLP after the other
    mlps: [layer]
    sweep: {layer: [0, 1, 2, 3]}              # one ablation for each; or {strength: [0.5, 1]}. At the top it is for all of them
patches:
  - name: twelve or fifteen
    clean: {question: "…", prefill: "…", answer: " 12"}     # or prompt: as it stands, or trace: its id, up to its final answer
    corrupted: {question: "…", prefill: "…", answer: " 15"}
    at: resid_pre               # resid_mid, resid_post, attn_out, mlp_out: by layer and token; heads: by layer and head
    last: 8                     # only the last tokens, for texts that differ in length
    n_controls: 3               # unrelated traces whose states are patched in
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.storage.untrusted import parse_yaml, wrap_errors
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.dictionaries import Dictionary, Latents
from reasonscope.steering.ablation.directions import Directions
from reasonscope.steering.ablation.interventions import check_part
from reasonscope.steering.ablation.knockout import Edges
from reasonscope.steering.ablation.patching import At
from reasonscope.steering.ablation.targets import Ablation, Neuron
from reasonscope.steering.methods.expert_routing import Expert
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.thinking import single_tokens

_NUMBERS = ("n_controls", "n_matched", "traces", "problems", "n_regeneration_controls", "seed")
_SWEPT = ("layer", "strength")
_FROM = "from:"
# From a name such as from:analyse/heads@top10 to heads.
HeadsFrom = Callable[[str], Sequence[Head]]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two texts of a patch: a trace of the run by its id, a raw prompt, or a question for the chat template."""

    trace: str | None = None
    prompt: str | None = None
    question: str | None = None
    prefill: str = ""
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Activation patching between two texts; see `patch_activations`."""

    name: str
    clean: Side
    corrupted: Side
    at: At = "resid_pre"
    last: int | None = None
    n_controls: int = 3


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The ablations of one entry, by the layer or strength that each stands for."""

    over: str
    values: tuple[float, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ablations and patches of the same traces, and how; see the module for the fields.

    Attributes:
        ablations: What to remove, one after the other.
        patches: What to patch.
        sweeps: By name, which of the ablations belong to one sweep.
        n_controls: Random ablations for each ablation, at least 20.
        n_matched: Random directions for each ablation that move states as far.
        traces: How many traces of the run are read; all if None.
        problems: How many problems the ablated model answers again.
        n_regeneration_controls: Random ablations that answer them too.
        seed: Seed of everything that is drawn.
    """

    ablations: tuple[Ablation, ...] = ()
    patches: tuple[Patch, ...] = ()
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    n_controls: int = 20
    n_matched: int = 20
    traces: int | None = None
    problems: int = 0
    n_regeneration_controls: int = 5
    seed: int = 0

    def check(self, model: Model) -> None:
        """Raise InputError or SiteError, before anything runs, if the model lacks what an ablation names."""
        for ablation in self.ablations:
            for site, indices in ablation.parts.items():
                check_part(model, ablation, site, indices)
            for layer in (ablation.edges.layers or ()) if ablation.edges else ():
                model.layout.module(model.hf, Site("attn_probs", layer))


def read_plan(path: Path, model: Model, *, heads_from: HeadsFrom | None = None) -> Plan:
    """Read a plan. `heads_from` finds the heads of a name such as from:analyse/heads@top10.

    Raises InputError for an invalid one, saying which entry is wrong and what is allowed there; SiteError for a layer that the model lacks.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the plan {path}: {error}") from error
    with wrap_errors(path):
        plan = _Reader(path=path, model=model, heads_from=heads_from).plan(content)
    plan.check(model)
    return plan


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads a plan for a model; files are looked for next to the plan, then where the command runs."""

    path: Path
    model: Model
    heads_from: HeadsFrom | None

    def plan(self, content: object) -> Plan:
        entries = _mapping(content, str(self.path), ("ablations", "patches", "sweep", *_NUMBERS))
        if not (entries.get("ablations") or entries.get("patches")):
            raise InputError(
                f"{self.path} has no ablations; list at least one under `ablations:`, or one under `patches:`"
            )
        known = {
            name: _count(entries[name], f"{self.path}, {name}", least=1 if name == "traces" else 0)
            for name in _NUMBERS
            if entries.get(name) is not None
        }
        ablations, sweeps = list[Ablation](), dict[str, Sweep]()
        for i, entry in enumerate(_listed(entries.get("ablations") or [], f"{self.path}, ablations"), start=1):
            where = f"{self.path}, ablation {i}"
            found = [self.ablation(one, where) for one in _swept(entry, entries.get("sweep"), where)]
            ablations += [one for one, _ in found]
            if (sweep := _sweep_of(found)) is not None:
                sweeps[str(entry["name"])] = sweep
        listed = _listed(entries.get("patches") or [], f"{self.path}, patches")
        patches = tuple(_patch(entry, f"{self.path}, patch {i}") for i, entry in enumerate(listed, start=1))
        _check_names([*(one.name for one in ablations), *(one.name for one in patches)], self.path)
        return Plan(ablations=tuple(ablations), patches=patches, sweeps=sweeps, **known)

    def ablation(self, entry: "_Entry", where: str) -> tuple[Ablation, "_Entry"]:
        given = _mapping(entry.content, where, [field.name for field in fields(Ablation)])
        if "name" not in given:
            raise InputError(f"{where} has no name; add one")
        changed: dict[str, Any] = {"name": str(given["name"]) + entry.suffix}
        changed |= {key: self._field(key, given[key], f"{where}, {key}", where) for key in given.keys() - {"name"}}
        return Ablation(**changed), entry

    def _field(self, key: str, value: object, at: str, where: str) -> Any:
        match key:
            case "heads":
                return self._heads(value, at, where)
            case "neurons":
                return tuple(Neuron(layer=a, index=b) for a, b in _units(value, at, where, "neuron"))
            case "experts":
                return tuple(Expert(a, b) for a, b in _units(value, at, where, "expert"))
            case "mlps" | "layers":
                return _integers(value, at)
            case "tokens" | "scope":
                return _scope(value, at, self.model)
            case "edges":
                return self._edges(value, at)
            case "directions":
                return self._directions(value, at)
            case "latents":
                return self._latents(value, at)
            case "strength":
                return _number(value, at)
        return value

    def _heads(self, value: object, at: str, where: str) -> tuple[Head, ...]:
        if isinstance(value, str) and value.startswith(_FROM):
            if self.heads_from is None:
                raise InputError(f"{at}: {value!r:.60} names a result, but no run is given; write the heads out")
            return tuple(self.heads_from(value))
        return tuple(_head(head, where) for head in _listed(value, at))

    def _edges(self, value: object, at: str) -> Edges:
        ends = _mapping(value, at, ("readers", "read", "layers"))
        scopes = {end: _scope(ends.get(end), f"{at}.{end}", self.model) for end in ("readers", "read")}
        layers = ends.get("layers")
        return Edges(**scopes, layers=None if layers is None else _integers(layers, f"{at}.layers"))

    def _directions(self, value: object, at: str) -> Directions:
        given = {"file": value} if isinstance(value, str) else _mapping(value, at, ("file", "site"))
        found = Directions.load(self._file(given.get("file"), at))
        return found if given.get("site") is None else found.at(_site(given["site"], at))

    def _latents(self, value: object, at: str) -> Latents:
        given = _mapping(value, at, ("file", "site", "chosen", "top"))
        top = None if given.get("top") is None else _integer(given["top"], f"{at}.top")
        dictionary = Dictionary.load(self._file(given.get("file"), at), top=top)
        chosen = _integers(given.get("chosen") or [], f"{at}.chosen")
        return Latents(dictionary=dictionary, site=_site(given.get("site"), at), chosen=chosen)

    def _file(self, value: object, at: str) -> Path:
        if not isinstance(value, str) or not value:
            raise InputError(f"{at} names no file; write file: PATH")
        beside = self.path.parent / value
        return beside if beside.exists() else Path(value)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One ablation of an entry: itself, or one value of its sweep."""

    content: object
    suffix: str = ""
    over: str = ""
    value: float = 0.0


def _swept(entry: object, everywhere: object, where: str) -> Iterator[_Entry]:
    """An entry for each value of its sweep, in which the word `layer` stands for the layer."""
    own = entry.get("sweep") if isinstance(entry, dict) else None
    asked = everywhere if own is None else own
    if asked is None or not isinstance(entry, dict):
        yield _Entry(content=entry)
        return
    given = _mapping(asked, f"{where}, sweep", _SWEPT)
    if len(given) != 1:
        raise InputError(f"{where}, sweep: give either layer or strength, with a list of values")
    ((over, values),) = given.items()
    left = {key: value for key, value in entry.items() if key != "sweep"}
    if over == "layer" and left == _with_layer(left, 0):
        raise InputError(
            f"{where}, sweep: no field says `layer`; write it where the layer belongs, such as mlps: [layer]"
        )
    for value in _listed(values, f"{where}, sweep.{over}"):
        number = (
            _integer(value, f"{where}, sweep.layer") if over == "layer" else _number(value, f"{where}, sweep.strength")
        )
        content = _with_layer(left, int(number)) if over == "layer" else {**left, "strength": number}
        yield _Entry(content=content, suffix=f", {over} {value:g}", over=over, value=float(number))


def _with_layer(value: Any, layer: int) -> Any:
    """The value with the word `layer` replaced by its number, in everything but the name."""
    if isinstance(value, dict):
        return {key: one if key == "name" else _with_layer(one, layer) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_layer(one, layer) for one in value]
    if value == "layer":
        return layer
    return re.sub(r"^layer(?=\.\d)|(?<=\.)layer$", str(layer), value) if isinstance(value, str) else value


def _sweep_of(found: Sequence[tuple[Ablation, _Entry]]) -> Sweep | None:
    if not found or not found[0][1].over:
        return None
    values = tuple(entry.value for _, entry in found)
    return Sweep(over=found[0][1].over, values=values, names=tuple(one.name for one, _ in found))


def _check_names(names: Sequence[str], path: Path) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: two entries are called {twice[0]!r}; give each a name of its own")


def _patch(entry: object, where: str) -> Patch:
    given = dict(_mapping(entry, where, [field.name for field in fields(Patch)]))
    if missing := [key for key in ("name", "clean", "corrupted") if key not in given]:
        raise InputError(f"{where} has no {missing[0]}; add it")
    clean, corrupted = (_side(given.pop(key), f"{where}, {key}") for key in ("clean", "corrupted"))
    if (clean.trace is None) != (corrupted.trace is None):
        raise InputError(f"{where}: give a trace on both sides, or a text on both")
    more: dict[str, Any] = {**given, "name": str(given["name"])}
    more |= {key: _count(given[key], f"{where}, {key}") for key in ("last", "n_controls") if key in given}
    return Patch(clean=clean, corrupted=corrupted, **more)


def _side(value: object, where: str) -> Side:
    if isinstance(value, str):
        return Side(trace=value)
    given = _mapping(value, where, [field.name for field in fields(Side)])
    if sum(given.get(key) is not None for key in ("trace", "prompt", "question")) != 1:
        raise InputError(f"{where}: give one of trace, prompt and question")
    if given.get("trace") is None and not given.get("answer"):
        raise InputError(f"{where} has no answer; write what follows the text, such as answer: ' 12'")
    return Side(**{key: str(one) for key, one in given.items()})


def _units(value: object, at: str, where: str, noun: str) -> list[tuple[int, int]]:
    """Pairs of layer and index, written as heads are."""
    found = [_head(one, where, noun) for one in _listed(value, at)]
    return [(one.layer, one.index) for one in found]


def _site(value: object, at: str) -> Site:
    if not isinstance(value, str):
        raise InputError(f"{at} names no site; write site: resid_post.3")
    try:
        return Site.parse(value)
    except SiteError as error:
        raise InputError(f"{at}: {error}") from error


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{where}: {value!r:.60} is not a number")
    return float(value)


def _head(value: object, where: str, noun: str = "head") -> Head:
    """A head, or the place of a neuron or an expert, which are written alike."""
    if not isinstance(value, str):
        raise InputError(
            f'{where}: {value!r:.60} is not a {noun}; write layer.{noun} in quotes, as "3.10" (3.10 alone is the number 3.1)'
        )
    try:
        return Head.parse(value)
    except InputError as error:
        raise InputError(f"{where}: {error}".replace("head", noun)) from error


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


def _count(value: object, where: str, *, least: int = 0) -> int:
    """A number of something, or a seed."""
    found = _integer(value, where)
    if found < least:
        raise InputError(f"{where}: {found}; give {least} or more")
    return found


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
