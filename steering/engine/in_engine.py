"""A recipe as requests to vLLM: vectors of vllm-lens if every token is steered, and a hook if that depends on the tokens."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.vllm.steering import InEngine
from reasonscope.probes.vllm.wire import encode
from reasonscope.steering.engine.shipping import shipped
from reasonscope.steering.engine.stops import exit_look, marks_told
from reasonscope.steering.recipes.controls import EXIT
from reasonscope.steering.recipes.description import needs_tags
from reasonscope.steering.recipes.recipe import Recipe, RecipePart

_WORKER = "reasonscope.steering.engine.worker"


def in_engine(recipe: Recipe, model: Prompting, prompts: Iterable[Sequence[int]] = ()) -> InEngine:
    """The recipe in vLLM, for `vllm_writer(steering=…)`.

    Args:
        recipe: The recipe.
        model: The model that is served.
        prompts: For continuations of steered texts: the prompts with which they were written.

    Returns:
        What each request carries.

    Raises:
        InputError: For decoding methods, controllers, and exit rules that need passes of their own, which vLLM does not take by HTTP, and
            for a vector or a probe of another model.
        SiteError: For a site other than resid_post and resid_pre.

    Example:
        steering = in_engine(Recipe.load("seal.recipe.safetensors"), load_prompting(name))
        writer = vllm_writer("http://127.0.0.1:8000", model, steering=steering)
        store = rs.record(model, problems, "runs/seal", server=writer, steer=recipe, sites="resid_post.12")
    """
    if others := [*(part.name for part in recipe.decoding), *(one.name for one in recipe.controls if one.name != EXIT)]:
        names = ", ".join(others)
        raise InputError(
            f"recipe {recipe.name!r} changes how tokens are chosen ({names}), which vLLM does not do by HTTP; use --backend hooks"
        )
    for part in recipe.parts:
        _check(part, model)
    static = bool(recipe.parts) and all(part.operator == {"name": "add"} and not part.scope for part in recipe.parts)
    prefill = recipe.prefill
    stops = tuple(exit_look(part, model) for part in recipe.controls)
    known: dict[str, Any] = {
        "stops": stops,
        "meta": recipe.meta,
        "prefill": prefill,
        "prompts": frozenset(map(_ids, prompts)),
    }
    places = [_place(site) for part in recipe.parts for site in part.vector.directions]
    if static and not any(pre for _, pre in places):
        return InEngine(**known, vectors=tuple(_vector(part) for part in recipe.parts))
    if not recipe.parts:
        return InEngine(**known)
    told = json.dumps(_engine_recipe(recipe, model))
    return InEngine(
        **known,
        hook=partial(shipped, _WORKER, "EngineHook", told),
        post=tuple(sorted({layer for layer, pre in places if not pre})),
        pre=any(pre for _, pre in places),
    )


def _engine_recipe(recipe: Recipe, model: Prompting) -> dict[str, Any]:
    """The recipe in JSON, as `EngineHook` reads it."""
    acting = [(part, site, direction) for part in recipe.parts for site, direction in part.vector.directions.items()]
    # What enters a layer is edited after what leaves the one before, although both are edited at one place here.
    acting.sort(key=lambda one: one[1].point == "resid_pre")
    scopes = [part.scope for part in recipe.parts]
    return {
        "parts": [_part(part, site, direction) for part, site, direction in acting],
        "marks": marks_told(model, scopes) if any(map(needs_tags, scopes)) else None,
    }


def _part(part: RecipePart, site: Site, direction: Any) -> dict[str, Any]:
    layer, pre = _place(site)
    return {
        "layer": layer,
        "pre": pre,
        "direction": base64.b64encode(np.ascontiguousarray(direction, dtype="<f4").tobytes()).decode(),
        "operator": dict(part.operator),
        "scope": dict(part.scope),
        "strength": part.strength,
    }


def _vector(part: RecipePart) -> Mapping[str, Any]:
    directions = part.vector.directions
    return {
        "activations": encode(
            torch.from_numpy(np.stack([np.asarray(d, dtype=np.float32) for d in directions.values()]))
        ),
        "layer_indices": [_place(site)[0] for site in directions],
        "scale": part.strength,
    }


def _place(site: Site) -> tuple[int, bool]:
    """The layer that is edited, and whether at its input: what enters a layer is what leaves the one before, except for the first."""
    if site.point == "resid_post":
        return site.layer, False
    if site.point == "resid_pre":
        return (site.layer - 1, False) if site.layer else (0, True)
    raise SiteError(
        f"vLLM edits resid_post and resid_pre, and not {site}; use --backend hooks, or a recipe at the residual stream"
    )


def _check(part: RecipePart, model: Prompting) -> None:
    width = int(model.config.get_text_config().hidden_size)
    if part.vector.width != width:
        raise InputError(
            f"a vector of width {part.vector.width} for {model.name}, whose width is {width}; use one that was made from this model"
        )
    for site in part.vector.directions:
        if _place(site)[0] >= model.n_layers:
            raise SiteError(f"{site}: {model.name} has {model.n_layers} layers")
    there = (part.vector.provenance.get("model") or {}).get("architecture", model.config.model_type)
    if there != model.config.model_type:
        raise InputError(f"the vector was made from a {there}, and {model.name} is a {model.config.model_type}")


def _ids(prompt: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(token) for token in prompt)
