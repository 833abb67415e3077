"""A model and two hand-made recipes for it, one that acts everywhere and one on a part of the thinking."""

import numpy as np
import pytest

from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Scope, SteeringVector, VectorUse
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.operators import Clamp


@pytest.fixture(scope="session")
def model():
    return load_model("organism")


@pytest.fixture(scope="session")
def problems():
    return load_problems("ledger", n=2, seed=3)


@pytest.fixture(scope="session")
def sampling():
    return Sampling(temperature=0.7, max_new_tokens=40, seed=5)


def _vector_at(model, *layers, seed=0, length=4000.0, **about):
    """Random directions of one length at the outputs of these blocks."""
    drawn = np.random.default_rng(seed).standard_normal((len(layers), model.d_model))
    drawn *= length / np.linalg.norm(drawn, axis=1, keepdims=True)
    directions = {Site("resid_post", layer): row.astype(np.float32) for layer, row in zip(layers, drawn, strict=True)}
    about = {"model": dict(model.fingerprint), "groups": ["a", "b"], **about}
    return SteeringVector(directions=directions, method="seal", sign="towards shorter", provenance=about)


@pytest.fixture(scope="session")
def everywhere(model):
    """Adds one vector to every token."""
    return Recipe.of([VectorUse(vector=_vector_at(model, 2), scope=Scope())], name="push", multiplier=0.5)


@pytest.fixture(scope="session")
def mixed(model):
    """A clamp on the thinking, an addition from the last prompt token on, each with a strength of its own."""
    clamp = VectorUse(vector=_vector_at(model, 3, seed=1), scope=Scope.thinking(model), operator=Clamp(to=-2.5))
    scope = Scope(prompt_positions=(-1,), generation_window=(0, None))
    add = VectorUse(vector=_vector_at(model, 1, 2, seed=2), scope=scope, strength=0.25)
    return Recipe.of([clamp, add], name="mixed", multiplier=0.5, provenance={"run": "runs/mine"})


@pytest.fixture(scope="session")
def vector_at():
    """Makes random directions for a model."""
    return _vector_at
