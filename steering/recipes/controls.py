"""What follows a generation as a part of a recipe: exit rules, adaptive thinking speed, and budget guidance, without a model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.identity import PARTS
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.branches import SequenceWriter
from reasonscope.probes.models.model import Model
from reasonscope.steering.decoding.budget import BudgetGuidance, LengthPredictor
from reasonscope.steering.exits.control import ExitControl
from reasonscope.steering.exits.places import KINDS, Places
from reasonscope.steering.exits.rules import PROBE, rule_named
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.methods.adaptive import WIDTH, WINDOW, AdaptiveSteering
from reasonscope.steering.vectors.application import VectorUse
from reasonscope.steering.vectors.matched_controls import random_uses
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

if TYPE_CHECKING:
    from reasonscope.steering.recipes.recipe import Recipe

EXIT, ADAPTIVE, GUIDANCE = "exit", "adaptive-speed", "budget-guidance"


# Each is an `Intervention` and a logits processor in one, and notes what it decides.
Control: TypeAlias = ExitControl | AdaptiveSteering | BudgetGuidance


def controls_of(condition: Condition) -> tuple[Control, ...]:
    """The controllers among the processors of a condition."""
    return tuple(one for one in condition.processors if isinstance(one, Control))


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlPart:
    """A controller by name, with everything that it needs to know.

    Attributes:
        name: "exit", "adaptive-speed" or "budget-guidance".
        settings: Its parameters, as JSON.
        tensors: Its directions or weights by name, float32.

    Raises:
        InputError: For an unknown name, a setting that it does not have or that is missing, or tensors that do not fit.

    Example:
        part = exit_part("fixed budget", 120)
        recipe = Recipe(name="120 tokens", controls=(part,))
        store = rs.record(model, problems, "runs/short", steer=recipe)
    """

    name: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise InputError(f"no controller is called {self.name!r}; choose from {', '.join(_KINDS)}")
        wanted = _KINDS[self.name].settings
        wrong = sorted(wanted.keys() ^ self.settings.keys()) or sorted(
            key for key, kind in wanted.items() if not isinstance(self.settings[key], kind)
        )
        if wrong:
            raise InputError(f"controller {self.name}: the setting {wrong[0]!r} is missing, unknown or of another type")
        if bad := [name for name, one in self.tensors.items() if one.dtype != np.float32 or not np.isfinite(one).all()]:
            raise InputError(f"controller {self.name}: {bad[0]} is not finite float32")
        _KINDS[self.name].check(self)

    @property
    def widths(self) -> set[int]:
        """The widths of the states that it edits or reads."""
        return _KINDS[self.name].widths(self)

    @property
    def number(self) -> float:
        """The number that `valued` replaces."""
        return float(self.settings.get("threshold", self.settings.get("budget", 1.0)))

    @property
    def unit(self) -> str:
        """What this number counts."""
        return _KINDS[self.name].unit

    @property
    def chance(self) -> str:
        """What its random control is; empty if it has none."""
        return _KINDS[self.name].chance

    def make(self, model: Model, recipe: "Recipe", sampling: Sampling | None) -> Control:
        """The controller for a loaded model. Raises InputError or SiteError if it does not fit."""
        return _KINDS[self.name].make(self, model, recipe, sampling)

    def in_words(self) -> tuple[str, ...]:
        """What it does, what it acts on, where, its value, and in which unit: a row of the recipe's table."""
        return _KINDS[self.name].row(self)

    def valued(self, value: float) -> "ControlPart":
        """The same with its one number replaced: a rule's threshold, the budget, or the strength that multiplies the vectors."""
        if self.name == ADAPTIVE:
            return self.scaled(value)
        number = {"threshold": float(value)} if self.name == EXIT else {"budget": whole_budget(value)}
        return replace(self, settings={**self.settings, **number})

    def at_random(self, seed: int) -> "ControlPart":
        """Its control: predictions on other tokens, or a random direction of the same length at each site. Raises InputError for an exit
        rule, whose control is the rule "random stops"."""
        if self.name == GUIDANCE:
            predictor = LengthPredictor.of_weights(self.tensors, heads=self.settings["heads"])
            sites = [Site.parse(site) for site in self.settings["sites"]]
            return guidance_part(predictor.with_tokens_exchanged(seed), sites, self.settings["budget"])
        if self.name == ADAPTIVE:
            (random,) = random_uses([VectorUse(vector=_vector(self), scope=Scope())], seed)
            return replace(self, tensors={str(site): one for site, one in random.vector.directions.items()})
        raise InputError("an exit rule has no random control of its own; compare it with the rule “random stops”")

    def scaled(self, factor: float) -> "ControlPart":
        """The same with its vectors multiplied; one without vectors stays as it is."""
        if self.name != ADAPTIVE:
            return self
        return replace(self, tensors={name: np.float32(factor) * one for name, one in self.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How one kind of controller is checked, made and told.

    Attributes:
        settings: Its settings with their types.
        check: Raises InputError if settings and tensors do not fit each other.
        make: Makes it for a model.
        row: What it does, in words.
        widths: The widths of the states that it edits or reads.
        unit: What its one number counts (`ControlPart.valued`).
        chance: What its random control is; empty if it has none.
    """

    settings: Mapping[str, type | tuple[type, ...]]
    check: Callable[[ControlPart], object]
    make: Callable[[ControlPart, Model, "Recipe", Sampling | None], Control]
    row: Callable[[ControlPart], tuple[str, ...]]
    widths: Callable[[ControlPart], set[int]]
    unit: str
    chance: str = ""


def exit_part(
    rule: str,
    threshold: float,
    *,
    probe: LinearProbe | None = None,
    kind: str = "paragraph",
    every: int = 4,
    seed: int = 0,
) -> ControlPart:
    """The thinking closes at the first place at which a rule's number reaches a threshold.

    Args:
        rule: One of `reasonscope.steering.exits.rules.RULES` by name, or "fixed budget".
        threshold: The number to reach, as `steer exit` finds it.
        probe: What the rule "probe" reads.
        kind: Places are after each "paragraph" or "sentence".
        every: The fewest tokens of thinking between two places.
        seed: Seed of random stops.

    Raises:
        InputError: For an unknown rule, a threshold that is not finite, or a probe that is not read, or is missing.
    """
    named = rule_named(rule).name
    if (probe is not None) != (named == PROBE):
        raise InputError(f"the exit rule {named} {'needs' if named == PROBE else 'reads no'} probe")
    about: dict[str, Any] = {}
    if probe is not None:
        model = {key: probe.model.get(key) for key in (*PARTS, "name")}
        about = {"site": str(probe.site), "task": probe.task, "intercept": float(probe.intercept), "model": model}
    settings = {
        "rule": named,
        "threshold": float(threshold),
        "kind": kind,
        "every": every,
        "seed": seed,
        "probe": about,
    }
    tensors = {} if probe is None else {"coef": np.asarray(probe.coef, dtype=np.float32)}
    return ControlPart(name=EXIT, settings=settings, tensors=tensors)


def adaptive_part(
    vector: SteeringVector,
    monitored: Sequence[int],
    *,
    lowest: float,
    highest: float,
    step: float,
    window: int = WINDOW,
    width: float = WIDTH,
) -> ControlPart:
    """Adaptive thinking speed: `vector` with a strength that grows while the layers agree; see `AdaptiveSteering`."""
    settings = {
        "lowest": float(lowest),
        "highest": float(highest),
        "step": float(step),
        "window": window,
        "width": float(width),
        "monitored": list(monitored),
    }
    return ControlPart(
        name=ADAPTIVE, settings=settings, tensors={str(site): one for site, one in vector.directions.items()}
    )


def guidance_part(predictor: LengthPredictor, sites: Sequence[Site], budget: int) -> ControlPart:
    """Budget guidance with a trained predictor; see `BudgetGuidance`."""
    settings = {"budget": int(budget), "sites": [str(site) for site in sites], "heads": predictor.heads}
    weights = {name: one.detach().cpu().numpy().astype(np.float32) for name, one in predictor.state_dict().items()}
    return ControlPart(name=GUIDANCE, settings=settings, tensors=weights)


def whole_budget(budget: float) -> int:
    """A budget in whole tokens. Raises InputError for any other number."""
    if budget != int(budget) or budget < 1:
        raise InputError(f"a budget of {budget:g} tokens: give a whole number, at least 1")
    return int(budget)


def _check_exit(part: ControlPart) -> None:
    settings = part.settings
    named, probe = rule_named(settings["rule"]).name, settings["probe"]
    if not np.isfinite(settings["threshold"]):
        raise InputError(
            f"the exit rule {named} at a threshold of {settings['threshold']} never stops; give a finite one"
        )
    if settings["kind"] not in KINDS or settings["every"] < 1:
        raise InputError(
            f"places after each {settings['kind']}, {settings['every']} tokens apart: give paragraph or sentence, and 1 or more"
        )
    if bool(probe) != (named == PROBE) or (named == PROBE) != (part.tensors.keys() == {"coef"}):
        raise InputError(f"the exit rule {named} {'needs' if named == PROBE else 'reads no'} probe")
    if probe:
        exit_probe(part)


def exit_probe(part: ControlPart) -> LinearProbe:
    about = part.settings["probe"]
    try:
        site, model = Site.parse(about["site"]), dict(about["model"])
        task, intercept = about["task"], float(about["intercept"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the probe of the exit rule is incomplete: {error}") from error
    coef = part.tensors["coef"].astype(np.float64)
    return LinearProbe(coef=coef, intercept=intercept, site=site, task=task, method="of a recipe", model=model)


def _make_exit(part: ControlPart, model: Model, recipe: "Recipe", _: Sampling | None) -> ExitControl:
    settings = part.settings
    rule = rule_named(settings["rule"])
    probe = exit_probe(part) if settings["probe"] else None
    if probe is not None and len(probe.coef) != model.d_model:
        raise InputError(
            f"the probe reads {len(probe.coef)} numbers and the model has {model.d_model}; fit a new probe"
        )
    return ExitControl(
        model,
        rule,
        settings["threshold"],
        places=Places.of(model, kind=settings["kind"], every=settings["every"]),
        probe=probe,
        seed=settings["seed"],
        **(_steered_reading(model, recipe) if recipe.parts else {}),
    )


def _steered_reading(model: Model, recipe: "Recipe") -> dict[str, Any]:
    """Passes that a rule runs beside the generation are steered as the model is."""
    from reasonscope.steering.recipes.following import follow  # it needs recipes, which need this module

    def reading(prompt: Sequence[int]) -> AbstractContextManager[object]:
        return follow(model, replace(recipe, controls=()), [prompt])

    return {"reading": reading, "writer": SequenceWriter(model)}


def _make_adaptive(part: ControlPart, model: Model, _: "Recipe", __: Sampling | None) -> AdaptiveSteering:
    vector = _vector(part)
    vector.check(model)
    return AdaptiveSteering(model, vector, **part.settings)


def _vector(part: ControlPart) -> SteeringVector:
    return SteeringVector(directions={Site.parse(name): one for name, one in part.tensors.items()}, method="speed")


def _make_guidance(part: ControlPart, model: Model, _: "Recipe", sampling: Sampling | None) -> BudgetGuidance:
    settings = part.settings
    predictor = LengthPredictor.of_weights(part.tensors, heads=settings["heads"])
    width, vocabulary = predictor.reads
    if (width, vocabulary) != (model.d_model, model.vocabulary):
        raise InputError(
            f"the predictor of the budget guidance reads states of {width} for {vocabulary} tokens, and {model.name} has "
            f"{model.d_model} and {model.vocabulary}; extract it again for this model"
        )
    sites = [Site.parse(site) for site in settings["sites"]]
    for site in sites:
        model.layout.module(model.hf, site)  # raises SiteError if the model lacks it
    temperature = 1.0 if sampling is None else sampling.temperature
    return BudgetGuidance(model, predictor, sites, budget=settings["budget"], temperature=temperature)


def _check_adaptive(part: ControlPart) -> None:
    if not part.tensors:
        raise InputError("adaptive speed without a vector; give one")
    _vector(part)


def _check_guidance(part: ControlPart) -> None:
    if part.settings["budget"] < 1:
        raise InputError(f"a budget of {part.settings['budget']} tokens: give at least 1")
    LengthPredictor.of_weights(part.tensors, heads=part.settings["heads"])


def _exit_row(part: ControlPart) -> tuple[str, ...]:
    settings = part.settings
    at = settings["probe"].get("site", "–")
    return f"exit by {settings['rule']}", f"the end of each {settings['kind']}", at, f"{settings['threshold']:g}", "–"


def _adaptive_row(part: ControlPart) -> tuple[str, ...]:
    sites, settings = list(part.tensors), part.settings
    at = sites[0] if len(sites) == 1 else f"{sites[0]} to {sites[-1]} ({len(sites)})"
    norm = float(np.mean([np.linalg.norm(one) for one in part.tensors.values()]))
    return ADAPTIVE, "every token", at, f"{settings['lowest']:g} to {settings['highest']:g}", f"{norm:.3g}"


def _guidance_row(part: ControlPart) -> tuple[str, ...]:
    sites = part.settings["sites"]
    return (
        GUIDANCE,
        "tokens after newlines",
        f"{sites[0]} to {sites[-1]} ({len(sites)})",
        f"{part.settings['budget']}",
        "–",
    )


_NUMBER = (int, float)
_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        EXIT: _Kind(
            settings={"rule": str, "threshold": _NUMBER, "kind": str, "every": int, "seed": int, "probe": dict},
            check=_check_exit,
            make=_make_exit,
            row=_exit_row,
            widths=lambda part: {len(one) for one in part.tensors.values()},
            unit="threshold",
        ),
        ADAPTIVE: _Kind(
            settings={
                **dict.fromkeys(("lowest", "highest", "step", "width"), _NUMBER),
                "window": int,
                "monitored": list,
            },
            check=_check_adaptive,
            make=_make_adaptive,
            row=_adaptive_row,
            widths=lambda part: {len(one) for one in part.tensors.values()},
            unit="times its strength",
            chance="random directions",
        ),
        GUIDANCE: _Kind(
            settings={"budget": int, "sites": list, "heads": int},
            check=_check_guidance,
            make=_make_guidance,
            row=_guidance_row,
            widths=lambda part: {part.tensors["project.weight"].shape[1]},
            unit="tokens",
            chance="its weights on other tokens",
        ),
    }
)
