"""Controllers in recipes: a file brings them back, each way of running one writes the same tokens, and what they decide is kept."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.app.cli import app
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.recording import record
from reasonscope.steering import SteeringExperiment
from reasonscope.steering.decoding.budget import LengthPredictor
from reasonscope.steering.experiments.held_out import Asked, respond
from reasonscope.steering.methods.registry import ExtractionData
from reasonscope.steering.recipes.answers import answer_with
from reasonscope.steering.recipes.controls import ControlPart, adaptive_part, controls_of, exit_part, guidance_part
from reasonscope.steering.recipes.following import follow
from reasonscope.steering.recipes.learned import recipe_without_vectors
from reasonscope.steering.recipes.recipe import Recipe

SITES = [Site("resid_post", layer) for layer in range(3)]


@pytest.fixture(scope="module")
def probe(model):
    coef = np.random.default_rng(0).standard_normal(model.d_model) / 400
    return LinearProbe(
        coef=coef, intercept=0.5, site=Site("resid_post", 2), task="binary", method="test", model=model.fingerprint
    )


@pytest.fixture(scope="module")
def recipes(model, vector_at, probe):
    """One recipe per controller."""
    predictor = LengthPredictor(model.d_model, model.vocabulary, width=8, depth=1, heads=2).eval()
    parts = {
        "exit": exit_part("probe", 0.6, probe=probe),
        "adaptive-speed": adaptive_part(vector_at(model, 3), [0, 2], lowest=0.0, highest=0.5, step=0.25, window=2),
        "budget-guidance": guidance_part(predictor, SITES, 30),
    }
    about = {"model": dict(model.fingerprint), "groups": ["a"]}
    return {name: Recipe(name=name, controls=(part,), provenance=about) for name, part in parts.items()}


@pytest.mark.parametrize("name", ["exit", "adaptive-speed", "budget-guidance"])
def test_a_file_brings_a_controller_back_and_each_way_to_run_it_writes_the_same_tokens(
    name, recipes, model, problems, tmp_path
):
    recipe = recipes[name]
    recipe.save(tmp_path / "one.recipe.safetensors")
    again = Recipe.load(tmp_path / "one.recipe.safetensors")
    assert again.hash == recipe.hash and again.controls[0].settings == recipe.controls[0].settings
    assert name in str(again.summary()) and "1 controller" in str(again.summary())
    sampling = Sampling(temperature=0.7, max_new_tokens=60, seed=5)
    run = SteeringExperiment(model, problems, sampling).run_all([again.condition(model, sampling=sampling)])[0]
    swept = {trace.id: trace.token_ids.tolist() for trace in run.traces}
    applied = answer_with(again, model, problems, sampling)
    store = record(model, problems, tmp_path / "run", sampling=sampling, batch_size=1, steer=recipe)
    assert {pair.steered.id: pair.steered.token_ids.tolist() for pair in applied.pairs} == swept
    assert {trace.id: trace.token_ids.tolist() for trace in store} == swept
    (file,) = (tmp_path / "run-results" / "scores").glob("control-*.safetensors")
    kept = read_scores(file)
    assert kept.scores.keys() == set(store.ids) and name in file.stem
    for trace in store:
        assert len(kept.scores[trace.id]) == len(trace.token_ids) - 1
    assert any("daptive speed" in note or "exit rule" in note or "guidance" in note for note in applied.summary().notes)


def test_the_strength_of_each_token_is_kept_and_read_again(recipes, model, problems, tmp_path):
    recipe, sampling = recipes["adaptive-speed"], Sampling(temperature=0.7, max_new_tokens=60, seed=5)
    sites = [Site("resid_post", 3), Site("resid_post", 5)]
    store = record(model, problems, tmp_path / "run", sampling=sampling, sites=sites, steer=recipe)
    kept = read_scores(tmp_path / "run-results" / "scores" / "control-adaptive-speed.safetensors")
    for trace in store:
        condition = recipe.condition(model)
        prompt = trace.token_ids[: trace.n_prompt_tokens].tolist()
        (done,) = generate(
            model,
            [prompt],
            sampling,
            seeds=[trace.sampling.seed],
            read=sites,
            write=condition.intervention.edits,
            on_step=condition.intervention.on_step,
            processors=condition.processors,
        )
        assert done.token_ids.tolist() == trace.token_ids.tolist()
        (control,) = controls_of(condition)
        line = kept.scores[trace.id]
        assert np.isnan(line[: trace.n_prompt_tokens - 1]).all() and line[trace.n_prompt_tokens - 1] == 0
        np.testing.assert_array_equal(
            line[trace.n_prompt_tokens :], control.history[0][: len(line) - trace.n_prompt_tokens]
        )
        assert 0 < np.nanmean(line) < 0.5
        for site in sites:  # the finished text is read again as it was steered
            states = done.activations[site].float().numpy()
            np.testing.assert_allclose(store.activations(trace.id, str(site)), states, atol=0.02, rtol=1e-3)
    with (
        pytest.raises(InputError, match="adapts its strength to what the model has just written"),
        follow(model, recipe, []),
    ):
        pass
    resumed = record(
        model, load_problems("ledger", n=3, seed=3), tmp_path / "run", sampling=sampling, sites=sites, steer=recipe
    )
    again = read_scores(tmp_path / "run-results" / "scores" / "control-adaptive-speed.safetensors")
    assert again.scores.keys() == set(resumed.ids) and len(resumed) == 3


def test_a_rule_that_never_stops_says_so(model, problems, tmp_path):
    recipe = Recipe(name="late", controls=(exit_part("fixed budget", 5000),))
    found = answer_with(recipe, model, problems, Sampling(max_new_tokens=40))
    assert "never reached 5000 in 2 answers, so nothing was stopped" in str(found.summary())
    assert all(pair.parted is None for pair in found.pairs)


def test_controllers_that_cannot_be_are_one_line(recipes, model, probe, everywhere, tmp_path):
    wrong = [
        (lambda: exit_part("patience", 3), "no exit rule is called 'patience'"),
        (lambda: exit_part("fixed budget", float("inf")), "never stops"),
        (lambda: exit_part("probe", 0.5), "needs probe|needs"),
        (lambda: exit_part("fixed budget", 3, probe=probe), "reads no"),
        (lambda: exit_part("fixed budget", 3, kind="chapter"), "paragraph or sentence"),
        (lambda: ControlPart(name="tap", settings={}), "no controller is called 'tap'"),
        (lambda: ControlPart(name="exit", settings={"rule": "probe"}), "the setting 'every' is missing"),
        (lambda: Recipe(name="none"), "is empty"),
        (lambda: recipes["exit"].merged(Recipe(name="other", controls=(exit_part("fixed budget", 60),))), "both have a controller exit"),
        (lambda: recipes["exit"].save(tmp_path / "one.gguf"), "would lose: the controller exit"),
        (lambda: replace(everywhere, controls=(exit_part("probe", 0.5, probe=replace(probe, coef=np.ones(7))),)), "widths"),
        (lambda: _of_another_model(recipes["exit"]).condition(model), "differs in weights"),
        (lambda: recipes["exit"].controls[0].at_random(0), "random stops"),
        (lambda: recipes["budget-guidance"].controls[0].valued(0.5), "whole number"),
    ]  # fmt: skip
    for make, said in wrong:
        with pytest.raises(InputError, match=said) as refused:
            make()
        assert "\n" not in str(refused.value)
    narrow = LengthPredictor(16, 50, width=8, depth=1, heads=2).eval()
    with pytest.raises(InputError, match="extract it again for this model"):
        Recipe(name="narrow", controls=(guidance_part(narrow, SITES, 30),)).condition(model)


def _of_another_model(recipe):
    (part,) = recipe.controls
    about = {**part.settings["probe"], "model": {"weights": "others", "tokenizer": "others", "name": "another"}}
    return replace(recipe, controls=(replace(part, settings={**part.settings, "probe": about}),))


def test_controllers_are_swept_beside_their_random_controls(recipes, model, problems, tmp_path):
    sampling = Sampling(temperature=0.7, max_new_tokens=30, seed=5)
    store = record(model, load_problems("ledger", n=2, seed=9), tmp_path / "run", sampling=sampling)
    experiment = SteeringExperiment(model, problems, sampling)
    source = ExtractionData(model=model, store=store, ids=store.ids)
    for name, values, n in (("exit", [0.5, 0.7], 0), ("adaptive-speed", [1.0], 2), ("budget-guidance", [10, 30], 4)):
        path = tmp_path / f"{name}.recipe.safetensors"
        recipes[name].save(path)
        asked = Asked(name=str(path), values=tuple(values))
        found = respond(experiment, source, asked, strengths=None, n_controls=2, covariance=False)
        assert [arm.multiplier for arm in found.arms] == values and len(found.controls) == n


def test_a_recipe_of_a_decoding_method_is_swept_as_the_method_is(model, problems, tmp_path):
    sampling = Sampling(temperature=0.7, max_new_tokens=30, seed=5)
    store = record(model, load_problems("ledger", n=2, seed=9), tmp_path / "run", sampling=sampling)
    experiment, source = SteeringExperiment(model, problems, sampling), ExtractionData(model=model, store=store, ids=())
    path = tmp_path / "tip.recipe.safetensors"
    recipe_without_vectors("tip", source, None, provenance={"method": "tip"}).save(path)
    told = {"strengths": None, "n_controls": 2, "covariance": False}
    by_file, by_name = (respond(experiment, source, Asked(name=name), **told) for name in (str(path), "tip"))
    assert by_file.to_dict() == by_name.to_dict() and len(by_file.controls) == 2
    assert Recipe.load(path).learned == {"groups": []}
    (more,) = respond(experiment, source, Asked(name=str(path), values=(9.0,)), **told).arms
    assert more.multiplier == 9
    with pytest.raises(InputError, match="nor one controller or decoding method"):
        Recipe(name="begun", prefill="Okay.").save(path)
        respond(experiment, source, Asked(name=str(path)), **told)
    with pytest.raises(InputError, match="a whole number"):
        recipe_without_vectors("forced-close", source, 1.5, provenance={})
    with pytest.raises(InputError, match=r"called 'soap'.*adaptive-speed.*forced-close"):
        recipe_without_vectors("soap", source, None, provenance={})


def test_the_commands_extract_controllers_and_record_with_them(tmp_path):
    run = tmp_path / "run"

    def said(*asked):
        done = CliRunner().invoke(app, list(asked), catch_exceptions=False)
        assert done.exit_code == 0
        return " ".join(done.stdout.split())

    said("record", "--problems", "ledger", "--n", "6", "--max-new-tokens", "160", "--out", str(run))
    said("steer", "extract", "forced-close", "--run", str(run), "--strength", "9")
    swept = said(
        "steer", "sweep", str(tmp_path / "run-results/steering/forced-close.recipe.safetensors"), "--run", str(run)
    )
    assert "forced-close" in swept and "9 tokens" in swept
    for name, strength in (("adaptive-speed", "0.2"), ("budget-guidance", "40")):
        recipe = tmp_path / f"{name}.recipe.safetensors"
        told = said("steer", "extract", name, "--run", str(run), "--strength", strength, "--out", str(recipe))
        assert "1 controller" in told and strength in told
        out = str(tmp_path / name)
        said(
            "record", "--problems", "ledger", "--n", "2", "--max-new-tokens", "30", "--out", out, "--steer", str(recipe)
        )
        assert list((tmp_path / f"{name}-results" / "scores").glob(f"control-{name}.safetensors"))
