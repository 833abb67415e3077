"""The steer and ablate commands: numbers with controls as JSON, files in the run's folders, one line for bad input."""

import json
import random
import shlex
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.analysis.runs.saved_numbers import read_numbers
from reasonscope.app import cli
from reasonscope.app.page_parts import playground
from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import ledger_of
from reasonscope.data.organism.tokenizer import chat
from reasonscope.data.organism.writer import write_ledger
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.models.model import load_model
from reasonscope.steering import SteeringExperiment
from reasonscope.steering.experiments.held_out import model_of_run
from reasonscope.steering.recipes.answers import question
from reasonscope.steering.recipes.recipe import Recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of eight ledgers as their grammar writes them, with random states at one site, said to be the organism's own."""
    model, rng, noise, traces = load_model("organism"), random.Random(0), np.random.default_rng(0), []
    for problem in load_problems("ledger", n=8):
        writing = write_ledger(ledger_of(problem), "default", rng)
        prompt, completion = chat(problem.messages[0].content, writing.thinking, writing.answer)
        given, written = (model.tokenizer_backend.encode(text).ids for text in (prompt, completion))
        about = {"n_prompt_tokens": len(given), "tokenizer": model.tokenizer_backend, "model": model.fingerprint}
        traces.append(build_trace(id=f"{problem.id}/0", problem=problem, token_ids=given + written, **about))
    states = [noise.standard_normal((len(trace.token_ids) - 1, model.d_model), dtype=np.float32) for trace in traces]
    meta = {"model": dict(model.fingerprint), "sampling": asdict(Sampling(temperature=0.7, max_new_tokens=60))}
    folder = tmp_path_factory.mktemp("runs") / "made"
    with TraceStore.create(folder / "store", meta=meta, sites=["resid_post.3"]) as store:
        store.append(traces, {"resid_post.3": states})
    return folder


def numbers(*args):
    result = CliRunner().invoke(cli.app, [*map(str, args), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_extract_saves_the_recipe_of_the_problems_that_are_not_held_out(run):
    shown = numbers("steer", "extract", "seal", "--run", run, "--sites", "resid_post.3")
    recipe = Recipe.load(shown["file"])
    assert (run / "steering" / "seal.recipe.safetensors").exists() and shown["n_problems"] == 4
    everything = {trace.problem.group for trace in TraceStore.open(run / "store")}
    groups = recipe.provenance["groups"]
    assert len(groups) == 4 and set(groups) < everything and recipe.provenance["run"] == str(run)
    (part,) = recipe.parts
    assert (part.scope, part.operator, part.strength) == (
        {"on": "think", "steps": "separators"},
        {"name": "add"},
        1.0,
    )
    assert recipe.hash == shown["hash"]


def test_a_clamp_of_several_sites_is_one_file_that_says_where_each_clamps(run, tmp_path):
    out = tmp_path / "clamp.recipe.safetensors"
    args = ("--sites", "resid_post.3", "--run", run, "--out", out, "--strength", "0.5")
    numbers("steer", "extract", "seal-clamp", *args)
    shown = numbers("steer", "show", out)["seal-clamp"]
    (part,) = shown["parts"]
    assert part["operator"]["name"] == "clamp" and part["strength"] == 0.5
    with pytest.raises(InputError, match=r"would lose: the operator of part 1 \(clamp to .*separators of the thinking"):
        numbers("steer", "extract", "seal-clamp", *args[:-4], "--out", tmp_path / "clamp.gguf")


def test_extract_says_what_it_made_and_what_comes_next(run, tmp_path):
    out, args = (
        tmp_path / "v.recipe.safetensors",
        ("steer", "extract", "seal", "--sites", "resid_post.3", "--run", str(run)),
    )
    said = CliRunner().invoke(cli.app, [*args, "--out", str(out)], catch_exceptions=False).stdout
    assert (
        "SEAL vector at resid_post.3 from 4 problems (" in said
        and "A positive strength goes towards execution." in said
    )
    assert f"recipe: {out} (hash " in said
    assert f"Next: reasonscope steer sweep {out} --run {run}" in said


def test_sweep_shows_every_strength_beside_its_controls(run):
    args = ("--run", run, "--sites", "resid_post.3", "--strengths", "1", "--n", 2)
    found = numbers("steer", "sweep", "seal", *args)["seal"]
    (dose,) = found["doses"]
    assert found["held_out"] is True and len(dose["random"]) == 5
    assert dose["reversed"]["multiplier"] == -1
    assert {"tokens", "refused", "well_formed", "repeated_ngrams", "compression", "perplexity", "kl"} <= dose[
        "steered"
    ]["measures"].keys()
    assert (run / "figures" / "steering_front.html").exists()
    short = numbers("steer", "sweep", "seal", *args, "--max-new-tokens", 50)["seal"]
    assert short["base"]["measures"]["tokens"]["value"] <= 50 < found["base"]["measures"]["tokens"]["value"]
    with pytest.raises(InputError, match=r"4 random controls are too few .* at least 5, and fewer problems"):
        numbers("steer", "sweep", "seal", *args, "--n-controls", 4)


def test_a_recipe_gives_the_same_tokens_in_the_sweep_in_apply_and_in_the_playground(run, tmp_path):
    """`record` is compared in tests/steering/recipes/test_steered_runs.py, with the same function."""
    out = tmp_path / "seal.recipe.safetensors"
    numbers("steer", "extract", "seal", "--run", run, "--sites", "resid_post.3", "--out", out, "--strength", "150")
    found = numbers("steer", "sweep", f"{out}:1,0.5", "--run", run, "--n", 2)["seal"]
    assert [dose["strength"] for dose in found["doses"]] == [0.5, 1.0] and found["held_out"] is True
    asked = TraceStore.open(run / "store").trace(TraceStore.open(run / "store").ids[0]).problem.messages[0].content
    how = ("--temperature", "0.7", "--max-new-tokens", "60", "--seed", "4")
    with pytest.raises(InputError, match="two of these are called 'seal'"):
        numbers("steer", "sweep", out, "seal", "--run", run)
    (applied,) = numbers("steer", "apply", out, "--prompt", asked, *how)["answers"]
    model, sampling = load_model("organism"), Sampling(temperature=0.7, max_new_tokens=60, seed=4)
    recipe = playground.mixed({out: 1.0}, "where steps begin")
    duel = playground.duel(model, asked, recipe, sampling=sampling, tell=lambda *_: None)
    assert "".join(duel.steered.tokens) == applied["steered"]["text"] != applied["plain"]["text"]
    assert duel.parted == applied["parted"] and duel.kl > 0
    experiment = SteeringExperiment(model, [question(asked), Problem(id="other", prompt="x")], sampling)
    swept = experiment.run_all([Recipe.load(out).condition(model)])[0].traces[0]
    assert swept.text.endswith(applied["steered"]["text"])


def test_record_with_a_recipe_writes_what_apply_shows(run, tmp_path, heard):
    recipe, out = tmp_path / "seal.recipe.safetensors", tmp_path / "steered"
    numbers("steer", "extract", "seal", "--run", run, "--sites", "resid_post.3", "--out", recipe, "--strength", "150")
    how = ["--temperature", "0.7", "--max-new-tokens", "40", "--seed", "1", "--n", "2", "--problems", "ledger"]
    args = ["record", *how, "--sites", "resid_post.3", "--out", str(out)]
    done = CliRunner().invoke(cli.app, [*args, "--steer", str(recipe)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    store = TraceStore.open(out)
    shown = numbers("steer", "apply", recipe, *how)["answers"]
    assert {one["problem"]: one["steered"]["text"] for one in shown} == {
        trace.problem.id: trace.text[trace.offsets[trace.n_prompt_tokens][0] :] for trace in store
    }
    with pytest.raises(StoreError, match="holds traces steered by seal"):
        CliRunner().invoke(cli.app, args, catch_exceptions=False)
    model_of_run(store, None)
    assert heard.lines[-1].endswith("were steered by seal; the model that reads them here is not steered.")


def test_merged_recipes_are_applied_together(run, tmp_path):
    files = {}
    for name, method, strength in (("away", "seal-reflection", "100"), ("back", "seal-transition", "-80")):
        files[name] = tmp_path / f"{name}.recipe.safetensors"
        args = ("--run", run, "--sites", "resid_post.3", "--strength", strength, "--out", files[name])
        numbers("steer", "extract", method, *args)
    out = tmp_path / "both.recipe.safetensors"
    merged = numbers("steer", "merge", *files.values(), "--out", out, "--name", "both")
    assert [part["strength"] for part in merged["parts"]] == [100.0, -80.0] and merged["name"] == "both"
    said = CliRunner().invoke(cli.app, ["steer", "show", str(out)], catch_exceptions=False).stdout
    assert f"Recipe both (hash {merged['hash']}) holds 2 vectors" in said


def test_controls_of_the_decoding_are_swept_on_the_same_plane(run):
    asked = ("seal-transition:1", "reflection-bias:-3", "forced-close:20", "nothinking")
    found = numbers("steer", "sweep", *asked, "--run", run, "--sites", "resid_post.3", "--n", 2)
    assert [len(found[name.partition(":")[0]].get("random", ())) for name in asked[1:]] == [5, 0, 5]
    (closed,), (begun,) = found["forced-close"]["arms"], found["nothinking"]["arms"]
    assert closed["multiplier"] == 20 and closed["measures"]["tokens"]["value"] <= 22
    assert begun["measures"]["tokens"]["value"] < found["nothinking"]["base"]["measures"]["tokens"]["value"]
    drawn = (run / "figures" / "steering_front.html").read_text(encoding="utf-8")
    assert all(
        name in drawn for name in ("forced-close", "seal-transition reversed", "random tokens, reflection-bias (n = 5)")
    )


SWEEPS = {
    "of a method": "seal --strengths 0.5 --held-out 0.4 --samples 2 --covariance --sites resid_post.3 --max-new-tokens 40 --n 2 --seed 1",
    "of tokens": "tip:3 --n-controls 6 --verdict 'I will' --fast To --batch-size 7 --n 2 --max-new-tokens 12 --model organism --threads 1",
}
EXITS = {
    "of sentences": "--places sentence --every 40 --held-out 0.6 --n 4 --batch-size 5 --seed 2",
    "at thresholds": "--at 'fixed budget=12' --at 'fixed budget=20' --every 40 --dtype float32",
}
MEASUREMENTS = [("sweep", told) for told in SWEEPS.values()] + [("exit", told) for told in EXITS.values()]


@pytest.mark.parametrize(("command", "told"), MEASUREMENTS, ids=[*SWEEPS, *EXITS])
def test_the_command_beside_the_numbers_makes_them_again(run, tmp_path, command, told):
    """Every option that was given is in it, and what it measures is the same."""
    found = numbers("steer", command, *shlex.split(told), "--run", run)
    path = run / "numbers" / f"{command}.json"
    line = read_numbers(path)["command"]
    assert sorted(shlex.split(line)) == sorted(["reasonscope", "steer", command, *shlex.split(told), "--run", str(run)])
    path.unlink()
    shutil.rmtree(run / "exits", ignore_errors=True)
    assert numbers(*shlex.split(line)[1:]) == found and read_numbers(path)["command"] == line


PLAN = """
traces: 2
problems: 2
n_matched: 2
n_regeneration_controls: 2
ablations:
  - {name: heads, heads: ["1.0", "2.1"]}
  - {name: heads by mean, heads: ["1.0"], how: mean, scope: {on: think}}
  - {name: heads by draw, heads: ["1.0"], how: resample}
  - {name: mlp, mlps: [3]}
  - {name: layer, layers: [2]}
  - {name: early, tokens: {generation_window: [0, 5]}}
  - {name: doubts, tokens: {on: think, words: [I]}}
  - {name: edges, edges: {readers: {on: answer}, read: {on: think}, layers: [3, 4]}}
"""


def test_ablate_runs_a_plan_with_every_kind(run, tmp_path, monkeypatch):
    monkeypatch.setattr("reasonscope.analysis.ablations.run.sampling_of_run", lambda *_: Sampling(max_new_tokens=12))
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN, encoding="utf-8")
    found = numbers("ablate", plan, "--run", run)
    assert len(found) == 8
    for one in found.values():
        assert one["smallest_p"] == 1 / (1 + one["controls"]["n_disjoint"]) and one["n_edited"] > 0
        effect = one["effect_nats_per_answer_token"]
        assert effect["low"] <= effect["value"] <= effect["high"]
    assert {name: one["controls"]["n"] for name, one in found.items()} == {
        "heads": 9,
        **dict.fromkeys(("heads by mean", "heads by draw"), 3),
        **dict.fromkeys(("mlp", "layer"), 5),
        **dict.fromkeys(("early", "doubts", "edges"), 20),
    }
    assert {name: one["matched"] and one["matched"]["n"] for name, one in found.items()} == {
        **dict.fromkeys(("heads", "heads by mean", "heads by draw", "mlp", "layer"), 2),
        **dict.fromkeys(("early", "doubts", "edges"), None),
    }
    written = {name: one["regenerate_ablated"] for name, one in found.items()}
    assert "no token lies in its scopes" in written.pop("edges")  # twelve tokens do not reach the answer
    assert {name: len(one["random"]) for name, one in written.items()} == {
        **dict.fromkeys(("heads", "heads by mean", "heads by draw", "mlp", "layer"), 2),
        **dict.fromkeys(("early", "doubts"), 0),
    }
    assert {"tokens", "well_formed"} <= written["heads"]["excess_over_random"].keys()
    assert not written["early"]["excess_over_random"]
    assert all({"tokens", "well_formed"} <= one["differences"].keys() for one in written.values())
    assert all(one["n_edited"] > 0 for one in written.values())
    saved = run / "results"
    assert {path.parent.name for path in saved.glob("*/plan.safetensors")} == {"ablation", "ablation_answers"}
    assert list((run / "figures").glob("ablation-plan-arms.html"))


def test_ablate_says_what_it_found_and_where_to_look(run, tmp_path):
    said = CliRunner().invoke(
        cli.app, ["ablate", "--run", str(run), "--heads", "1.0", "--how", "zero", "--traces", "2", "--n-matched", "1"]
    )
    assert said.exit_code == 0, said.output
    told = " ".join(said.stdout.split())
    assert "heads, zero: the given answers become" in told and "random heads of the same layers give" in told
    assert "/ablations" in told
    both = CliRunner().invoke(cli.app, ["ablate", "plan.yaml", "--run", str(run), "--heads", "1.0"])
    assert isinstance(both.exception, InputError) and "either the file of a plan or --heads" in str(both.exception)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("steer", "extract", "magic"), "no steering method is called 'magic'"),
        (("steer", "sweep", "seal", "--strengths", "a,b"), "numbers separated by commas"),
        (("steer", "sweep", "soap"), "no steering method is called 'soap'"),
        (
            ("steer", "sweep", "none.recipe.safetensors"),
            "none.recipe.safetensors does not exist; give the file of a recipe",
        ),
        (("steer", "sweep", "forced-close:1.5"), "a whole number"),
        (("steer", "extract", "seal", "--held-out", "1"), "and some to extract from"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["reasonscope", *args, "--run", str(run)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line


def test_a_run_that_does_not_say_its_model_needs_one(tmp_path):
    from reasonscope.steering.experiments.held_out import model_of_run

    with TraceStore.create(tmp_path / "s") as store, pytest.raises(InputError, match="--model"):
        model_of_run(store, None, device="cpu", backend="hooks")
