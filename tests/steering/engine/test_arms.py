"""An experiment whose arms vLLM writes: the same tokens, measures and distances as with hooks, or a refusal by name."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.app.cli import app
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Condition, SteeringExperiment, SteeringVector, VectorUse, dose_response
from reasonscope.steering.decoding.processors import ForcedClose
from reasonscope.steering.engine.arms import EngineArms, recipe_of
from reasonscope.steering.recipes.controls import exit_part
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.application import clamped
from reasonscope.steering.vectors.operators import scaled_add
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.thinking import WrittenThinking

pytest.importorskip("openai")
GREEDY = Sampling(temperature=0, max_new_tokens=8)
PROBLEMS = load_problems("ledger", n=2)


def vector(seed=0, length=60.0, **about):
    drawn = np.random.default_rng(seed).standard_normal(128).astype(np.float32) * length / 128**0.5
    return SteeringVector(directions={Site("resid_post", 2): drawn}, method="test", provenance=about)


def experiment(model, address=None, **how):
    writer = address and EngineArms(url=address, workers=4, how={"served_as": "m", **how})
    return SteeringExperiment(model, PROBLEMS, GREEDY, writer=writer)


def same(found, expected):
    assert [t.token_ids.tolist() for t in found.traces] == [t.token_ids.tolist() for t in expected.traces]
    assert found.n_edited == expected.n_edited
    assert found.values.keys() == expected.values.keys()
    for name, values in expected.values.items():
        np.testing.assert_allclose(found.values[name], values, rtol=1e-4, atol=1e-5)
    for site, moved in expected.distances.items():
        assert found.distances[site] == pytest.approx(moved, rel=1e-4)


USES = {
    "vector": lambda model: [VectorUse(vector=vector(), scope=Scope())],
    "hook": lambda model: [VectorUse(vector=vector(), scope=Scope.thinking(model))],
    "share": lambda model: [VectorUse(vector=vector(length=0.3), scope=Scope.thinking(model), operator=scaled_add)],
    "clamp": lambda model: clamped(vector(towards={"resid_post.2": 20.0}), Scope.thinking(model)),
}


@pytest.mark.parametrize("kind", USES)
def test_a_dose_response_is_that_of_the_hooks(address, model, kind):
    uses = USES[kind](model)
    there, here = experiment(model, address), experiment(model)
    found, expected = (dose_response(one, uses, [0.5]) for one in (there, here))
    same(there.base, here.base)
    for one, other in zip(found.arms, expected.arms, strict=True):
        assert (one.name, one.n_edited) == (other.name, other.n_edited)
        assert one.tokens.value == other.tokens.value
        assert one.distance == pytest.approx(other.distance, rel=1e-4)
        assert one.measures.keys() == other.measures.keys()


def test_a_batch_of_conditions(address, model):
    def conditions():
        exit_rule = Recipe(name="short", controls=(exit_part("fixed budget", 3, kind="sentence", every=1),))
        both = Recipe(name="both", parts=Recipe.of(USES["hook"](model)).parts, controls=exit_rule.controls)
        return [exit_rule.condition(model), both.condition(model), Condition(name="begun", prefill="Okay")]

    found, expected = (experiment(model, where).run_all(conditions()) for where in (address, None))
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_what_vllm_cannot_write_is_refused_before_anything_is_asked(address, engine, model):
    close = ForcedClose(thinking=WrittenThinking.of(model), budget=5)
    there = experiment(model, address)
    with pytest.raises(InputError, match=r"'forced' changes how tokens are chosen .*ForcedClose.*--backend hooks"):
        there.run_all([Condition(name="forced", processors=(close,))])
    with pytest.raises(InputError, match="'own' decodes by a loop of its own"):
        there.run_all([Condition(name="own", decode=lambda prompts, seeds: [])])
    assert engine.asked == []
    with pytest.raises(InputError, match="needs the weights here"):
        load_model("organism", backend="vllm")
    assert recipe_of(Condition(name="base")) is None


def test_an_experiment_stays_with_one_model(address, engine, model):
    there = experiment(model, address)
    there.run_all([])
    engine.lie = "no vectors"
    with pytest.raises(InputError, match="does not add the vector"):
        there.run("steered", Recipe.of(USES["vector"](model)).condition(model).intervention)


def test_from_the_command_line(address, tmp_path, model):
    record(model, load_problems("ledger", n=8), tmp_path / "store", sites="resid_post.2", sampling=GREEDY)
    Recipe.of([VectorUse(vector=vector(), scope=Scope())], name="mine").save(tmp_path / "mine.recipe.safetensors")
    told = ["steer", "sweep", f"{tmp_path}/mine.recipe.safetensors", "--run", str(tmp_path), "--n", "2"]
    there = ["--backend", "vllm", "--server", address, "--served-as", "m", "--dtype", "float32"]
    found = [CliRunner().invoke(app, [*told, *more, "--json"]) for more in (there, ["--dtype", "float32"])]
    assert [one.exit_code for one in found] == [0, 0], found[0].output
    lengths = [
        [dose["steered"]["measures"]["tokens"]["value"] for dose in json.loads(one.stdout)["mine"]["doses"]]
        for one in found
    ]
    assert lengths[0] == lengths[1]
    done = CliRunner().invoke(app, [*told, "--backend", "vllm"])
    assert done.exit_code != 0 and "--backend vllm and --server together" in str(done.exception or done.output)
