"""A recipe: vectors with their places, operators and strengths, decoding methods and a prefill, as one object that always acts alike."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from reasonscope.data.errors import InputError
from reasonscope.data.summary import Summary
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.steered import Steered
from reasonscope.probes.models.model import Model
from reasonscope.steering.decoding.prefills import PREFILLS
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.decoding_responses import decoding_method
from reasonscope.steering.recipes import files
from reasonscope.steering.recipes.controls import ControlPart, controls_of
from reasonscope.steering.recipes.description import (
    check_scope,
    describe_operator,
    describe_scope,
    may_share_a_token,
    operator_for,
    scope_for,
)
from reasonscope.steering.recipes.summaries import recipe_summary
from reasonscope.steering.vectors.application import VectorUse, as_intervention, check_uses
from reasonscope.steering.vectors.intervention import Composed
from reasonscope.steering.vectors.vector import SteeringVector, learned_groups

# Clamps along directions with a larger cosine set the same projection.
_SAME_DIRECTION = 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class RecipePart:
    """A vector with everything that says how it acts, without a model.

    Attributes:
        vector: The directions, by site.
        operator: Its name and parameters, such as `{"name": "add"}` or `{"name": "clamp", "to": -1.5}`.
        scope: The fields of `Scope` that are set, without `marks`; `{}` is every token.
        strength: The multiplier of the vector.

    Raises:
        InputError: For an operator, a scope or a strength that cannot be.

    Example:
        part = RecipePart(vector=vector, scope={"on": "think"}, strength=0.5)
        recipe = Recipe(name="shorter", parts=(part,))
        recipe.save("shorter.recipe.safetensors")
    """

    vector: SteeringVector
    operator: Mapping[str, Any] = field(default_factory=lambda: {"name": "add"})
    scope: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0

    def __post_init__(self) -> None:
        operator_for(self.operator)
        check_scope(self.scope)
        if not np.isfinite(self.strength):
            raise InputError(f"a strength of {self.strength}; give a finite number")
        if self.clamps and len(self.vector.directions) != 1:
            raise InputError(f"a clamp at {len(self.vector.directions)} sites; make one part per site")

    @property
    def clamps(self) -> bool:
        """Whether it sets projections instead of adding to them."""
        return bool(self.operator["name"] == "clamp")

    def use(self, model: Model) -> VectorUse:
        """The part for a loaded model."""
        return VectorUse(
            vector=self.vector,
            scope=scope_for(self.scope, model),
            operator=operator_for(self.operator),
            strength=self.strength,
        )

    def overlaps(self, other: "RecipePart") -> bool:
        """Whether both act at one site and may act on the same token."""
        shared = self.vector.directions.keys() & other.vector.directions.keys()
        return bool(shared) and may_share_a_token(self.scope, other.scope)


@dataclass(frozen=True, kw_only=True)
class DecodingPart:
    """A decoding method by name (one of `DECODING_METHODS`)."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """What makes a model answer otherwise, whole: the sweep, `record`, `steer apply` and the app use this one object.

    The same recipe with the same seed gives the same tokens in each of them.

    Attributes:
        name: What tables and files call it.
        parts: Vectors in use, applied in this order.
        decoding: Decoding methods, applied in this order.
        controls: What follows the generation (an exit rule, adaptive speed, budget guidance), after everything else.
        prefill: Text that the thinking starts with.
        provenance: JSON: `groups` of problems that it was learned from, `run`, `model` (a fingerprint), `method`,
            and how that run finds `thinking` and renders prompts (`prompt`).

    Raises:
        InputError: For a recipe that changes nothing, two clamps of one projection, an unknown decoding method, or two of one name.

    Example:
        recipe = Recipe.of(rs.steering.extract("seal", store, model), name="seal")
        recipe.save("seal.recipe.safetensors")
        store = rs.record(model, problems, "runs/seal", steer=recipe)
    """

    name: str
    parts: tuple[RecipePart, ...] = ()
    decoding: tuple[DecodingPart, ...] = ()
    controls: tuple[ControlPart, ...] = ()
    prefill: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.parts or self.decoding or self.controls or self.prefill):
            raise InputError(
                f"recipe {self.name!r} is empty: give it a vector, a decoding method, a controller or a prefill"
            )
        widths = {part.vector.width for part in self.parts}.union(*(control.widths for control in self.controls))
        if len(widths) > 1:
            raise InputError(
                f"recipe {self.name!r} holds vectors of widths {sorted(widths)}; a recipe needs vectors of one model"
            )
        for control in self.decoding:
            if decoding_method(control.name).of_model is None:
                raise InputError(
                    f"{control.name} learns from a run; make a recipe of what it learns with `steer extract {control.name}`"
                )
        names = [*(one.name for one in self.decoding), *(one.name for one in self.controls)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"recipe {self.name!r} asks for {min(twice)} twice; keep one of them")
        begins = [*([repr(self.prefill)] if self.prefill else []), *(name for name in names if name in PREFILLS)]
        if len(begins) > 1:
            raise InputError(
                f"recipe {self.name!r} begins the thinking with {begins[0]} and with {begins[1]}; keep one"
            )
        for first, second in combinations(self.parts, 2):
            if first.scope == second.scope and _set_one_projection(first, second):
                raise InputError(f"recipe {self.name!r} contradicts itself: {_contradiction(first, second)}")

    @classmethod
    def of(
        cls,
        uses: Sequence[VectorUse],
        *,
        name: str = "",
        multiplier: float = 1.0,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Recipe":
        """The recipe of vectors in use, such as `extract` gives.

        Args:
            uses: The vectors, each with its scope and operator.
            name: The name of the recipe; by default the method of the first vector.
            multiplier: Multiplies the strength of every vector.
            provenance: Added to what the first vector says about itself: groups, model and method.

        Returns:
            A recipe that needs no model.

        Raises:
            InputError: Without vectors, or for the operator of a random control.

        Example:
            uses = rs.steering.extract("asc-clamp", store, model)
            recipe = Recipe.of(uses, multiplier=0.5)
            recipe.save("asc-clamp.recipe.safetensors")
        """
        if not uses:
            raise InputError("no vector to make a recipe of; give at least one")
        first = uses[0].vector
        known = {"model": first.provenance["model"]} if "model" in first.provenance else {}
        known |= learned_groups(use.vector.provenance for use in uses)
        parts = tuple(
            RecipePart(
                vector=use.vector,
                operator=describe_operator(use.operator),
                scope=describe_scope(use.scope),
                strength=multiplier * use.strength,
            )
            for use in uses
        )
        about = {"method": first.method, **known, **(provenance or {})}
        return cls(name=name or first.method, parts=parts, provenance=about)

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of everything that changes tokens: two recipes with one hash do the same, whatever their names."""
        digest = hashlib.sha256()
        for part in self.parts:
            _feed(digest, [dict(part.operator), dict(part.scope), part.strength])
            for site, direction in sorted(part.vector.directions.items(), key=lambda item: str(item[0])):
                _feed(digest, str(site))
                digest.update(np.ascontiguousarray(direction, dtype="<f4").tobytes())
        _feed(digest, [[control.name, control.value] for control in self.decoding])
        _feed(digest, self.prefill)
        for follows in self.controls:
            _feed(digest, [follows.name, dict(follows.settings)])
            for name, tensor in sorted(follows.tensors.items()):
                _feed(digest, name)
                digest.update(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
        return digest.hexdigest()[:12]

    @property
    def learned(self) -> dict[str, Any]:
        """`groups` of problems that its vectors and controllers come from, `groups_incomplete` if one does not say; empty if none says.

        A recipe without either was learned from no problem.
        """
        if not (self.parts or self.controls):
            return {"groups": []}
        return learned_groups(
            [*(part.vector.provenance for part in self.parts), *([self.provenance] if self.controls else [])]
        )

    @property
    def meta(self) -> dict[str, Any]:
        """What a store and its traces say about it."""
        return {"name": self.name, "hash": self.hash}

    def uses(self, model: Model) -> tuple[VectorUse, ...]:
        """The vectors for a loaded model. Raises InputError or SiteError if one does not fit it."""
        made = tuple(part.use(model) for part in self.parts)
        if made:
            check_uses(made, model)
        return made

    def condition(
        self, model: Model, *, multiplier: float = 1.0, measure: bool = True, sampling: Sampling | None = None
    ) -> Condition:
        """What the recipe does to a loaded model: a condition for one run; make a new one for the next.

        Args:
            model: The model.
            multiplier: Multiplies the strength of every vector; decoding and prefill stay as they are.
            measure: Whether to record how far each edited token is moved.
            sampling: How the model will sample, which budget guidance undoes; without it, at a temperature of 1.

        Returns:
            The condition that `SteeringExperiment`, `record`, `steer apply` and the playground run.

        Raises:
            InputError: If a vector was made from another model or width, or the model lacks the tags or words that the recipe needs.
            SiteError: If the model lacks a site.

        Example:
            condition = recipe.condition(model)
            (arm,) = SteeringExperiment(model, problems, sampling).arms([condition])
        """
        decoding = self.beside(model, sampling)
        uses = self.uses(model)
        if not uses:
            return replace(decoding, multiplier=multiplier)
        steering = as_intervention(uses, multiplier, measure=measure)
        if decoding.intervention is not None:
            steering = Composed(steering, decoding.intervention)
        return replace(decoding, multiplier=multiplier, intervention=steering)

    def beside(self, model: Model, sampling: Sampling | None = None) -> Condition:
        """Everything but the vectors. Raises as `condition` does."""
        decoding = self.decoding_condition(model)
        follow = tuple(part.make(model, self, sampling) for part in self.controls)
        following = None if not follow else follow[0] if len(follow) == 1 else Composed(*follow)
        return replace(decoding, processors=(*decoding.processors, *follow), intervention=following)

    def decoding_condition(self, model: Model) -> Condition:
        """Decoding methods and prefill alone."""
        made = [_made(control, model) for control in self.decoding]
        processors = tuple(processor for one in made for processor in one.processors)
        prefills = (self.prefill, *(one.prefill for one in made))
        return Condition(name=self.name, processors=processors, prefill="".join(prefills))

    def steered(self, model: Model, sampling: Sampling) -> Steered:
        """The recipe as `record` takes it. Raises as `condition` does."""
        found = self.condition(model, measure=False, sampling=sampling)
        return Steered(
            meta=self.meta,
            write=self.save,
            edits=found.intervention,
            processors=found.processors,
            prefill=found.prefill,
            controls=controls_of(found),
        )

    def check(self, model: Model) -> None:
        """Raise InputError or SiteError if the recipe does not fit the model."""
        self.condition(model)

    def scaled(self, factor: float) -> "Recipe":
        """The same recipe with every strength multiplied by `factor`."""
        parts = tuple(replace(part, strength=factor * part.strength) for part in self.parts)
        return replace(self, parts=parts, controls=tuple(part.scaled(factor) for part in self.controls))

    def merged(self, other: "Recipe", *, name: str = "") -> "Recipe":
        """This recipe and then the other, as one.

        Args:
            other: The recipe to add.
            name: The name of the result; by default both names.

        Returns:
            A recipe with the parts of both, which names both in its provenance.

        Raises:
            InputError: If both clamp one site on tokens that overlap, begin the thinking differently, or differ in width.

        Example:
            both = Recipe.load("seal.recipe.safetensors").merged(Recipe.load("tip.recipe.safetensors"))
            both.save("both.recipe.safetensors")
        """
        for ours in self.parts:
            for theirs in other.parts:
                if ours.clamps and theirs.clamps and ours.overlaps(theirs):
                    raise InputError(
                        f"{self.name} and {other.name} contradict each other: {_contradiction(ours, theirs)}"
                    )
        for name in sorted({part.name for part in self.controls} & {part.name for part in other.controls}):
            raise InputError(
                f"{self.name} and {other.name} contradict each other: both have a controller {name}; leave one out"
            )
        if self.prefill and other.prefill:
            raise InputError(
                f"{self.name} and {other.name} contradict each other: both begin the thinking, with {self.prefill!r} and {other.prefill!r}"
            )
        same = {k: v for k, v in self.provenance.items() if other.provenance.get(k) == v}
        of = [{"name": one.name, "hash": one.hash, "method": one.provenance.get("method")} for one in (self, other)]
        return Recipe(
            name=name or f"{self.name} + {other.name}",
            parts=(*self.parts, *other.parts),
            decoding=(*self.decoding, *other.decoding),
            controls=(*self.controls, *other.controls),
            prefill=self.prefill or other.prefill,
            provenance={**same, "merged": of, **learned_groups([self.learned, other.learned])},
        )

    def save(self, path: str | Path) -> None:
        """Write one file: safetensors with a readable header, or a GGUF control vector for a path that ends in `.gguf`.

        Raises StoreError if it cannot be written, InputError if GGUF cannot hold the recipe; the message names what would be lost.
        """
        files.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read what `save` wrote, or a GGUF control vector, which acts on every token. Raises InputError for any other file."""
        return files.load(Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the directions, for JSON."""
        return {**self.meta, **files.header_of(self)}

    def summary(self) -> Summary:
        """What the recipe does, part by part, and what it was made from."""
        return recipe_summary(self)


def _made(control: DecodingPart, model: Model) -> Condition:
    make = decoding_method(control.name).of_model
    assert make is not None  # checked when the recipe was made
    return make(model)(control.value, None)


def _set_one_projection(first: RecipePart, second: RecipePart) -> bool:
    shared = first.vector.directions.keys() & second.vector.directions.keys()
    if not (first.clamps and second.clamps and shared):
        return False
    (site,) = shared
    a, b = first.vector.directions[site], second.vector.directions[site]
    return bool(abs(float(a @ b)) >= _SAME_DIRECTION * float(np.linalg.norm(a) * np.linalg.norm(b)))


def _contradiction(first: RecipePart, second: RecipePart) -> str:
    site = min(first.vector.directions.keys() & second.vector.directions.keys())
    return (
        f"both clamp {site}, to {first.operator['to']:.4g} and to {second.operator['to']:.4g}, on tokens that overlap; "
        "leave one of them out"
    )


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
