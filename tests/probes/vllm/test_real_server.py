"""A running vLLM with vllm-lens against the hooks, on a real model: the same tokens and states, however the server reads prompts.

REASONSCOPE_VLLM is the address of a server that holds the model of REASONSCOPE_REAL_MODEL (a folder) in float32. Run it once against a
server that reads prompts at once, once with --max-num-batched-tokens 64, which reads them in parts, and with --no-enable-prefix-caching.
"""

import json
import os
import urllib.request

import numpy as np
import pytest

from reasonscope.analysis.attention.head_profiles import head_rhythm
from reasonscope.analysis.attention.rows.served import served_model
from reasonscope.data.trace import Message, Problem, Sampling, Span
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import load_prompting
from reasonscope.probes.vllm.writer import vllm_writer
from reasonscope.steering.decoding.monitor import ProbeMonitor
from reasonscope.steering.engine.arms import EngineArms
from reasonscope.steering.engine.in_engine import in_engine
from reasonscope.steering.engine.monitor import EngineMonitor
from reasonscope.steering.experiments.experiment import SteeringExperiment
from reasonscope.steering.recipes.controls import exit_part
from reasonscope.steering.recipes.recipe import Recipe, RecipePart
from reasonscope.steering.vectors.vector import SteeringVector

ADDRESS, FOLDER = (os.environ.get(name) for name in ("REASONSCOPE_VLLM", "REASONSCOPE_REAL_MODEL"))
pytestmark = pytest.mark.skipif(not ADDRESS or not FOLDER, reason="needs a running vLLM and a real model")
TOPICS = ["a boat", "a baker", "two trains", "the moon"]
GREEDY = Sampling(temperature=0, max_new_tokens=12)
# Many questions begin alike, so that a prefix cache has something to give.
QUESTIONS = [
    f"Here is a question about {topic}. How many is {n} times {n + 3}?" for topic in TOPICS for n in range(2, 6)
]
PROBLEMS = [Problem(id=f"q{i}", messages=(Message(role="user", content=text),)) for i, text in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def bare():
    return load_prompting(FOLDER)


@pytest.fixture(scope="module")
def how():
    with urllib.request.urlopen(f"{ADDRESS}/v1/models", timeout=10) as reply:
        return {"served_as": json.load(reply)["data"][0]["id"], "workers": 16}


@pytest.fixture(scope="module")
def prompts(model):
    return [model.encode_prompt(problem) for problem in PROBLEMS]


def far(found, expected):
    """How far states differ, in units of the largest state of each token, and by how much at most."""
    apart = (found - expected).abs().amax(dim=1)
    return float((apart / expected.abs().amax(dim=1)).max()), float(apart.max())


def test_tokens_and_states_of_16_prompts(model, bare, how, prompts, record_property):
    writer = vllm_writer(ADDRESS, bare, **how)
    sites = [Site("resid_post", layer) for layer in (0, model.n_layers // 2, model.n_layers - 1)]
    for _ in range(2):  # the second time the prefix cache holds every prompt
        plain = writer.complete(prompts, GREEDY, [0] * 16)
        found = {i: (done, states) for i, done, states in writer.stream(prompts, GREEDY, [0] * 16, sites)}
    ours = generate(model, prompts, GREEDY, seeds=[0] * 16)
    worst = dict.fromkeys(sites, (0.0, 0.0))
    for i, one in enumerate(ours):
        done, states = found[i]
        assert done.token_ids.tolist() == one.token_ids.tolist() == plain[i].token_ids.tolist()
        (read,) = replay(model, [done.token_ids.tolist()], sites)
        for site in sites:
            worst[site] = tuple(map(max, zip(worst[site], far(states[site], read[site]), strict=True)))
    record_property("differences", {str(site): pair for site, pair in worst.items()})
    assert max(relative for relative, _ in worst.values()) < 1e-4


@pytest.mark.parametrize("scope", [{}, {"generation_window": (0, None)}], ids=["vector", "hook"])
def test_steered_tokens(model, bare, how, prompts, scope):
    layer = model.n_layers // 2
    drawn = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(directions={Site("resid_post", layer): drawn * 4}, method="random", provenance={})
    recipe = Recipe(name="r", parts=(RecipePart(vector=vector, scope=scope),))
    done = vllm_writer(ADDRESS, bare, steering=in_engine(recipe, bare), **how).complete(prompts[:8], GREEDY, [0] * 8)
    edits = recipe.condition(model).intervention
    ours = generate(model, prompts[:8], GREEDY, seeds=[0] * 8, write=edits.edits, on_step=edits.on_step)
    assert [one.token_ids.tolist() for one in done] == [one.token_ids.tolist() for one in ours]


def test_arms_of_an_experiment(model, how):
    drawn = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(
        directions={Site("resid_post", model.n_layers // 2): drawn * 4}, method="random", provenance={}
    )
    recipes = [
        Recipe(name=str(scope), parts=(RecipePart(vector=vector, scope=scope),))
        for scope in ({}, {"generation_window": (0, None)})
    ]
    found, ours = (
        SteeringExperiment(model, PROBLEMS[:4], GREEDY, writer=writer).run_all(
            [recipe.condition(model, multiplier=by) for recipe in recipes for by in (1.0, -1.0)]
        )
        for writer in (EngineArms(url=ADDRESS, how={"served_as": how["served_as"]}), None)
    )
    for one, other in zip(found, ours, strict=True):
        assert [t.token_ids.tolist() for t in one.traces] == [t.token_ids.tolist() for t in other.traces]
        assert one.n_edited == other.n_edited and one.distances == pytest.approx(other.distances, rel=1e-4)


def test_attention_that_is_reduced_there(model, bare, how, prompts):
    ids = [token for prompt in prompts[:4] for token in prompt]
    found, expected = (
        head_rhythm(one, ids, Span(0, len(ids)))
        for one in (served_model(bare, vllm_writer(ADDRESS, bare, **how)), model)
    )
    for name in ("sink", "previous", "waad", "fai"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4)


def test_monitors_and_exit_rules(model, bare, how, tmp_path):
    probe = LinearProbe(
        coef=np.random.default_rng(0).standard_normal(model.d_model) / 500, intercept=0.0, site=Site("resid_post", model.n_layers // 6),
        task="binary", method="test", model=model.fingerprint, provenance={},
    )  # fmt: skip
    there, here = (
        kind(one, probe, stop_above=0.0, window=2) for kind, one in ((EngineMonitor, bare), (ProbeMonitor, model))
    )
    writer = vllm_writer(ADDRESS, bare, look=there.look, **how)
    found = record(bare, PROBLEMS[:8], tmp_path / "there", server=writer, monitor=there, sampling=GREEDY)
    ours = record(model, PROBLEMS[:8], tmp_path / "here", monitor=here, sampling=GREEDY)
    assert there.closed and sorted(there.closed) == sorted(here.closed)
    recipe = Recipe(name="r", controls=(exit_part("fixed budget", 4.0, kind="sentence", every=1),))
    short = vllm_writer(ADDRESS, bare, steering=in_engine(recipe, bare), **how)
    stops = record(bare, PROBLEMS[:8], tmp_path / "exit", server=short, steer=recipe, sampling=GREEDY)
    stopped = record(model, PROBLEMS[:8], tmp_path / "exits", steer=recipe, sampling=GREEDY)
    for trace in ours:
        assert found.trace(trace.id).token_ids.tolist() == trace.token_ids.tolist()
        np.testing.assert_allclose(there.kept[trace.id], here.kept[trace.id], atol=1e-4)
        assert stops.trace(trace.id).token_ids.tolist() == stopped.trace(trace.id).token_ids.tolist()
