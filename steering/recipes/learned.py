"""Recipes without a vector: controllers that learn from a run, and decoding methods at a value."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.decoding.budget import train_predictor
from reasonscope.steering.experiments.decoding_responses import DECODING_METHODS, decoding_method
from reasonscope.steering.methods.registry import METHODS, ExtractionData, method
from reasonscope.steering.recipes.controls import (
    ADAPTIVE,
    GUIDANCE,
    ControlPart,
    adaptive_part,
    guidance_part,
    whole_budget,
)
from reasonscope.steering.recipes.recipe import DecodingPart, Recipe

# How far adaptive speed goes at most, as a share of the state's norm; the paper's α fits the paper's models alone.
_REACH = 0.1


def check_without_vectors(name: str) -> None:
    """Raise InputError unless a controller or a decoding method has that name."""
    if name not in LEARNED and name not in DECODING_METHODS:
        raise InputError(
            f"no steering method is called {name!r}; choose one of {', '.join(METHODS)}; a controller: {', '.join(LEARNED)}; "
            f"or a decoding method: {', '.join(one for one in DECODING_METHODS if one not in LEARNED)}"
        )


def recipe_without_vectors(
    name: str, source: ExtractionData, strength: float | None, *, provenance: Mapping[str, Any]
) -> Recipe:
    """A controller that learns from the source, or a decoding method, which learns nothing, as a recipe.

    `strength` is the highest strength of adaptive speed, as a share of the state's norm; the budget in tokens; or the value of the
    decoding method. By default it is .1, half of the mean thinking, or the middle one of the method's own. Raises InputError for an
    unknown name or a strength that it cannot take, and as the extraction does.
    """
    check_without_vectors(name)
    model = {"model": dict(source.model.fingerprint)}
    if name in LEARNED:
        known = {"groups": source.groups, **model}
        return Recipe(name=name, controls=(LEARNED[name](source, strength),), provenance={**provenance, **known})
    own = decoding_method(name).values
    part = DecodingPart(name=name, value=own[len(own) // 2] if strength is None else strength)
    recipe = Recipe(name=name, decoding=(part,), provenance={**provenance, **model})
    recipe.check(source.model)
    return recipe


def _adaptive(source: ExtractionData, strength: float | None) -> ControlPart:
    """Thinking speed from −½ of its reach to all of it in steps of a quarter, as in the paper, which goes from −4 to 8 by 2."""
    reach = _REACH if strength is None else strength
    if not reach > 0:
        raise InputError(f"a reach of {reach} of the state's norm; give a number above 0")
    (use,) = method("speed").parts(source)
    norms = use.vector.provenance["stream_norms"]
    as_long = {site: d * np.float32(norms[str(site)] / np.linalg.norm(d)) for site, d in use.vector.directions.items()}
    vector = type(use.vector)(directions=as_long, method="speed", norm="raw", provenance=use.vector.provenance)
    n = source.model.n_layers
    monitored = [layer for layer in range(0, n // 2 + 1, 2) if layer < n - 1]  # 0, 2, …, 14 of 28
    return adaptive_part(vector, monitored, lowest=-reach / 2, highest=reach, step=reach / 4)


def _guidance(source: ExtractionData, strength: float | None) -> ControlPart:
    sites = [Site.parse(site) for site in source.store.sites if site.startswith("resid_")]
    if not sites:
        raise InputError(
            "the run stored no residual stream for the predictor to learn from; record it with --sites resid_post.*"
        )
    mean = np.mean([trace.n_thinking_tokens for trace in source.traces])
    budget = round(float(mean) / 2) if strength is None else strength
    whole = whole_budget(budget)
    predictor, _ = train_predictor(source.store, sites, vocabulary=source.model.vocabulary, ids=source.ids)
    return guidance_part(predictor, sites, whole)


LEARNED: Mapping[str, Callable[[ExtractionData, float | None], ControlPart]] = MappingProxyType(
    {ADAPTIVE: _adaptive, GUIDANCE: _guidance}
)
