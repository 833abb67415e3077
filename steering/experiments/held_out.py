"""Extract from one part of a run and judge on the other."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.progress import say
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model, load_as_recorded
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.decoding_responses import (
    DECODING_METHODS,
    DecodingResponse,
    decoding_response,
    response_at,
)
from reasonscope.steering.experiments.dose_responses import DoseResponse, dose_response
from reasonscope.steering.experiments.experiment import SteeringExperiment
from reasonscope.steering.methods.asc import CompletionPair
from reasonscope.steering.methods.registry import METHODS, ExtractionData, method
from reasonscope.steering.recipes.recipe import Recipe

_RECIPE_FILES = (".safetensors", ".gguf")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A steering or decoding method, or the file of a recipe, and the strengths or values to run it at; None for its own."""

    name: str
    values: tuple[float, ...] | None = None

    @property
    def recipe(self) -> Path | None:
        """The file of the recipe, if it is one."""
        return Path(self.name) if self.name.endswith(_RECIPE_FILES) else None

    @classmethod
    def parse(cls, text: str) -> "Asked":
        """Read `seal`, `seal:0.5,1` or `seal.recipe.safetensors:1`. Raises InputError for an unknown name or invalid numbers."""
        name, colon, numbers = text.partition(":")
        for ending in (f"{end}:" for end in _RECIPE_FILES):  # a folder may have a colon in its name
            if ending in text:
                name, colon, numbers = text.rpartition(":")
        if text.endswith(_RECIPE_FILES):
            name, colon, numbers = text, "", ""
        if not name.endswith(_RECIPE_FILES) and name not in METHODS and name not in DECODING_METHODS:
            raise InputError(
                f"no steering method is called {name!r}; steering methods: {', '.join(METHODS)}; "
                f"decoding methods: {', '.join(DECODING_METHODS)}; or give the file of a recipe"
            )
        return cls(name=name, values=tuple(numbers_from(numbers)) if colon else None)


def check_titles(asked: Sequence[Asked]) -> None:
    """Raise InputError if two of what is asked for have one name, such as a method and its recipe: figures could not tell them apart."""
    titles = [Recipe.load(one.recipe).name if one.recipe else one.name for one in asked]
    if twice := sorted(title for title in set(titles) if titles.count(title) > 1):
        raise InputError(
            f"two of these are called {twice[0]!r}; sweep one after the other, or rename one with `steer merge --name`"
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """Ids of the traces to extract from, and the problems to judge on; no group of problems is on both sides."""

    ids: tuple[str, ...]
    held_out: tuple[Problem, ...]


def split_run(store: TraceStore | Sequence[Trace], *, share: float, n: int | None, seed: int) -> Split:
    """Hold out a `share` of the problem groups of a run or of some of its traces, and of these at most `n` problems.

    Raises InputError for too few groups.
    """
    problems: dict[str, list[Problem]] = {}
    for trace in store:
        problems.setdefault(trace.problem.group, []).append(trace.problem)
    groups = sorted(problems)
    random.Random(seed).shuffle(groups)
    held = groups[: round(share * len(groups))]
    if len(held) < 2 or len(held) == len(groups):
        raise InputError(
            f"{len(groups)} groups of problems, {len(held)} of them held out; at least 2 are needed to judge on, and some to extract from"
        )
    unique = {problem.id: problem for group in held for problem in problems[group]}
    ids = tuple(trace.id for trace in store if trace.problem.group not in set(held))
    return Split(ids=ids, held_out=tuple(unique.values())[:n])


def model_of_run(store: TraceStore, model: str | None, **how: Any) -> Model:
    """The model that wrote the run, or `model`, which finds its thinking and renders prompts as the run says.

    `how` goes to `load_model`. Raises InputError if the run does not name its model.
    """
    name = model or store.meta.get("model", {}).get("name")
    if not name:
        raise InputError(f"{store.path} does not say which model wrote it; give --model")
    if store.recipe is not None:
        say(
            f"The traces of {store.path} were steered by {store.meta['steered']['name']}; the model that reads them here is not steered."
        )
    return load_as_recorded(store.meta, name, how)


def sampling_of_run(store: TraceStore, seed: int) -> Sampling:
    """The sampling of the run, with another seed."""
    known = store.meta.get("sampling", {})
    return Sampling(**{**known, "seed": seed})


def source_of_run(
    model: Model,
    store: TraceStore,
    split: Split,
    *,
    sites: Sequence[Site] | None = None,
    verdict: str | None = None,
    fast: str | None = None,
    pairs: Sequence[CompletionPair] | None = None,
) -> ExtractionData:
    """What a method may learn from: one side of the split; of `pairs`, those of no held-out problem.

    Raises InputError if no pair is left.
    """
    held = {problem.group for problem in split.held_out}
    left = None if pairs is None else [pair for pair in pairs if pair.id not in held]
    if pairs and not left:
        raise InputError(
            f"all {len(pairs)} pairs are of held-out problems; make pairs of other problems, or hold fewer out (--held-out)"
        )
    return ExtractionData(model=model, store=store, ids=split.ids, sites=sites, verdict=verdict, fast=fast, pairs=left)


def respond(
    experiment: SteeringExperiment,
    source: ExtractionData,
    asked: Asked,
    *,
    strengths: Sequence[float] | None,
    n_controls: int,
    covariance: bool,
) -> DoseResponse | DecodingResponse:
    """Run a steering method, with vectors from one side of the split, on the other; or a decoding method.

    `strengths` replace a method's own if `asked` has none. With `covariance`, random vectors have the covariance of the states that the
    extraction could read: the thinking of its traces.
    """
    if asked.name in DECODING_METHODS:
        return decoding_response(experiment, source, asked.name, asked.values, n_controls=n_controls)
    recipe = None if asked.recipe is None else Recipe.load(asked.recipe)
    if recipe is None:
        chosen = method(asked.name)
        parts, own, name = chosen.parts(source), chosen.strengths, asked.name
    else:
        if not recipe.parts and len(recipe.decoding) == 1 and not (recipe.controls or recipe.prefill):
            (part,) = recipe.decoding
            values = asked.values or (part.value,)
            found = decoding_response(experiment, source, part.name, values, n_controls=n_controls)
            return replace(found, name=recipe.name)
        if not recipe.parts:
            return _controller_response(experiment, recipe, asked.values or strengths, n_controls)
        parts, own, name = recipe.uses(source.model), (1.0,), recipe.name
    sites = [site for part in parts for site in part.vector.directions]
    states = {at: thinking_states(source.store, source.ids, at) for at in sites} if covariance else None
    return dose_response(
        experiment,
        parts,
        asked.values or strengths or own,
        name=name,
        n_controls=n_controls,
        states=states,
        beside=None if recipe is None else partial(recipe.beside, source.model, experiment.sampling),
    )


def _controller_response(
    experiment: SteeringExperiment, recipe: Recipe, values: Sequence[float] | None, n_controls: int
) -> DecodingResponse:
    """A recipe whose one controller is run at several thresholds, budgets or strengths. Raises InputError for any other recipe, and if it
    learned from one of these problems."""
    if len(recipe.controls) != 1:
        raise InputError(
            f"{recipe.name} holds no vector to sweep, nor one controller or decoding method; see what it does with `steer apply`"
        )
    (part,) = recipe.controls
    asked = {problem.group for problem in experiment.problems}
    if seen := sorted(asked & set(recipe.provenance.get("groups", ()))):
        raise InputError(
            f"{recipe.name} was made from {len(seen)} of these problems ({seen[0]!r} …); judge it on other problems"
        )

    def make(value: float, seed: int | None) -> Condition:
        chosen = part.valued(value) if seed is None else part.valued(value).at_random(seed)
        return replace(recipe, controls=(chosen,)).condition(experiment.model, sampling=experiment.sampling)

    wanted = sorted(set(values or [part.number]))
    return response_at(experiment, recipe.name, wanted, make, unit=part.unit, chance=part.chance, n_controls=n_controls)


def thinking_states(store: TraceStore, ids: Sequence[str], site: Site) -> NDArray[np.float32]:
    """The stored states at `site` of every thinking token of these traces (row, d_model); the last token of a trace has none."""
    rows = []
    for id in ids:
        states = store.activations(id, str(site))
        positions = store.trace(id).thinking_positions
        rows.append(np.asarray(states[positions[positions < len(states)]], dtype=np.float32))
    return np.concatenate(rows)


def numbers_from(text: str) -> Sequence[float]:
    """Read `-1,0.5,2`. Raises InputError for anything else."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"strengths {text!r}: write numbers separated by commas, such as 0.5,1,2") from error
