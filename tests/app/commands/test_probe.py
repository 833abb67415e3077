"""The probe commands: numbers with baselines and nulls as JSON, probes and figures kept beside the store, scores for every token."""

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from reasonscope import probes
from reasonscope.analysis.runs import probe_reports
from reasonscope.analysis.runs.probe_reports import forecast_numbers
from reasonscope.analysis.studies.steps.probing import measure_remaining
from reasonscope.app import cli
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.problems import ledger_of, request_of
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.organism.writer import closing_sentence, write_ledger, write_request
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.models.model import load_model
from reasonscope.probes.properties.length_probe import forecast

MODEL = {"name": "made up", "weights": "w", "tokenizer": "t"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as the demo leaves it: RUN/store with ledgers and requests; every token knows length, refusal and correctness."""
    bpe, rng, traces = train_tokenizer(tokenizer_texts(0, 50)), random.Random(0), []
    for problem in load_problems("ledger", n=40) + load_problems("requests", n=80):
        if problem.answer is None:
            writing = write_request(request_of(problem), rng)
            answer = writing.answer
        else:
            writing = write_ledger(ledger_of(problem), "default", rng)
            answer = closing_sentence(int(problem.answer) + rng.randrange(2))
        prompt, completion = chat(problem.messages[0].content, writing.thinking, answer)
        given, written = bpe.encode(prompt).ids, bpe.encode(completion).ids
        traces.append(
            build_trace(
                id=f"{problem.id}/0",
                problem=problem,
                token_ids=given + written,
                n_prompt_tokens=len(given),
                tokenizer=bpe,
                model=MODEL,
            )
        )
    noise = np.random.default_rng(0)
    states = [noise.standard_normal((len(trace.token_ids) - 1, 4)).astype(np.float32) for trace in traces]
    for trace, rows in zip(traces, states, strict=True):
        rows[:, 0] += 5 * np.log(trace.n_thinking_tokens)
        rows[:, 1] += 5 * (behaviour(trace) == "refused")
        rows[:, 2] += 5 * bool(trace.correct)
    folder = tmp_path_factory.mktemp("runs") / "made"
    with TraceStore.create(folder / "store", sites=["resid_post.1"]) as store:
        store.append(traces, {"resid_post.1": states})
    return folder


def numbers(*args):
    result = CliRunner().invoke(cli.app, ["probe", *map(str, args), "--folds", "3", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_refusal_prints_its_numbers_and_keeps_what_it_made(run):
    found = numbers("refusal", "--run", run)
    comparison = found["comparison"]
    assert comparison["metric"] == "AUROC" and comparison["score"]["low"] > 0.9
    assert {"bag_of_words", "prompt_length"} <= comparison["baselines"].keys()
    assert comparison["metrics"]["brier"]["value"] < 0.1 < 0.9 < comparison["metrics"]["pr_auc"]["value"]
    contrasts = found["contrasts"]
    assert (found["main"], contrasts["refusal"]["comparison"]) == ("refusal", comparison)
    assert contrasts["harmfulness"]["probe"]["site"] == "resid_post.1"
    assert {"harmful complied", "random_directions", "above_nulls"} <= contrasts["refusal"]["cliffs"].keys()
    assert sum(found["cells"].values()) == 80
    assert LinearProbe.load(run / "probes" / "refusal.safetensors").site == Site("resid_post", 1)
    drawn = {path.name for path in (run / "figures").glob("refusal_*.html")}
    assert drawn == {f"refusal_{name}.html" for name in ("scores", "layers", "trajectories", "cliffs")}


def test_length_and_correctness_print_theirs(run, monkeypatch):
    monkeypatch.setattr(probe_reports, "POSITIONS", ("prompt", "window"))
    assert numbers("length", "--run", run)["comparison"]["score"]["value"] > 0.8
    found = numbers("correctness", "--run", run)
    assert found.keys() == {"prompt", "window", "undefined"}
    assert found["window"]["comparison"]["beats"] is True
    assert found["window"]["within_problem"]["value"] is None
    assert "several samples" in found["window"]["within_problem"]["why_not"]
    assert {path.stem for path in (run / "probes").iterdir()} >= {"length", "correctness"}


def kept(path, **changes):
    fields = {
        "coef": np.ones(4),
        "intercept": 0.0,
        "site": Site("resid_post", 1),
        "task": "binary",
        "method": "made up",
    }
    LinearProbe(**{**fields, "model": MODEL, **changes}).save(path)
    return path


def test_every_token_is_scored_beside_the_store(run, tmp_path):
    path = kept(tmp_path / "mine.safetensors")
    result = CliRunner().invoke(cli.app, ["probe", "apply", str(path), "--run", str(run)], catch_exceptions=False)
    assert "every token of 120 traces at resid_post.1 (probability)" in " ".join(result.stdout.split())
    store, scores = TraceStore.open(run / "store"), read_scores(run / "scores" / "mine.safetensors")
    assert scores.about["unit"] == "probability" and scores.about["site"] == "resid_post.1"
    trace = next(iter(store))
    states = store.activations(trace.id, "resid_post.1")
    assert scores.scores[trace.id] == pytest.approx(1 / (1 + np.exp(-states.sum(axis=1))), rel=1e-5)
    with safe_open(run / "scores" / "mine.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(store.ids)
    assert check_store(run / "store") == []
    with pytest.raises(InputError, match="no scores of 'x'"):
        read_scores(run / "scores" / "mine.safetensors", ["x"])
    with pytest.raises(InputError, match="no token scores"):
        read_scores(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": Site("resid_post", 7)}, "has no activations at 'resid_post.7'"),
        ({"model": {**MODEL, "weights": "others"}}, "differs in weights"),
        ({"coef": np.ones(5)}, "last axis of this probe is 5"),
    ],
)
def test_a_probe_that_does_not_fit_is_one_error_and_status_2(run, tmp_path, monkeypatch, capsys, changes, message):
    path = kept(tmp_path / "other.safetensors", **changes)
    monkeypatch.setattr(sys, "argv", ["reasonscope", "probe", "apply", str(path), "--run", str(run)])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    err = capsys.readouterr().err
    assert (exited.value.code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (run / "scores" / "other.safetensors").exists()


@pytest.mark.parametrize("command", ["length", "refusal", "correctness"])
def test_a_folder_without_a_run_is_status_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reasonscope", "probe", command, "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_results_lie_outside_the_store(tmp_path):
    for name in ("a", "b/store"):
        TraceStore.create(tmp_path / name, sites=[]).close()
    assert run_folder(tmp_path / "a").results == tmp_path / "a-results"
    assert run_folder(tmp_path / "b").store == tmp_path / "b" / "store"
    assert run_folder(tmp_path / "b").results == run_folder(tmp_path / "b" / "store").results == tmp_path / "b"


def test_remaining_prints_its_numbers_beside_the_position(run):
    found = numbers("remaining", "--run", run, "--per-trace", 4)
    assert found["n_rows"] == 4 * 40
    assert found["comparison"]["baselines"].keys() == {
        "elapsed_position",
        "prompt_length",
        "bag_of_words",
        "difficulty",
    }
    assert LinearProbe.load(run / "probes" / "remaining.safetensors").task == "regression"
    kept = json.loads((run / "numbers" / "remaining.json").read_text())
    assert kept["command"] == f"reasonscope probe remaining --run {run} --per-trace 4 --folds 3 --seed 0"


def test_remaining_leaves_out_traces_without_any_thinking_that_was_read(tmp_path, run):
    """Without a block, with an empty one, and cut at the first token of their thinking."""
    whole, bpe = TraceStore.open(run / "store"), train_tokenizer(tokenizer_texts(0, 50))
    kept_traces = [trace for trace in whole if trace.problem.answer is not None]
    states = [whole.activations(trace.id, "resid_post.1") for trace in kept_traces]
    prompt, _ = chat("How many?", "", "")
    without = []
    for name, completion in {"none": "7", "empty": "<think>\n\n</think>\n\n7", "cut": "<think>\nSo it"}.items():
        given, written = bpe.encode(prompt.removesuffix("<think>\n")).ids, bpe.encode(completion).ids
        problem = Problem(id=name, prompt=f"How many, {name}?")
        how = {"problem": problem, "n_prompt_tokens": len(given), "tokenizer": bpe, "model": MODEL}
        made = [build_trace(id=name, token_ids=given + written[:end], **how) for end in range(1, len(written) + 1)]
        without.append(made[-1] if name != "cut" else next(trace for trace in made if trace.n_thinking_tokens))
    assert [trace.state for trace in without] == ["absent", "empty", "truncated"]
    noise = [np.ones((len(trace.token_ids) - 1, 4), dtype=np.float32) for trace in without]
    with TraceStore.create(tmp_path / "run" / "store", sites=["resid_post.1"]) as store:
        store.append([*kept_traces, *without], {"resid_post.1": [*states, *noise]})
    said = shown("remaining", "--run", tmp_path / "run", "--folds", 3)
    assert "in 40 traces" in said and "3 traces without a thinking token that the model read: left out." in said
    assert "left out" not in shown("remaining", "--run", run, "--folds", 3)
    with TraceStore.create(tmp_path / "bare" / "store", sites=["resid_post.1"]) as store:
        store.append(without, {"resid_post.1": noise})
    with pytest.raises(InputError, match="none of the 2 traces has thinking"):
        measure_remaining(store)


def test_length_by_a_model_that_knows_of_cut_off_traces(run):
    found = numbers("length", "--run", run, "--aft")
    assert found["aft"]["concordance"]["value"] > 0.8


def test_a_kept_probe_forecasts_new_prompts(run, tmp_path):
    organism = load_model("organism")
    fields = {"coef": np.full(organism.d_model, 1e-3), "intercept": 5.0, "site": Site("resid_post", 2)}
    interval = {"coverage": 0.9, "log": [-0.5, None]}
    kept_at = kept(
        tmp_path / "length.safetensors",
        task="regression",
        model=organism.fingerprint,
        provenance={"interval": interval},
        **fields,
    )
    told = CliRunner().invoke(
        cli.app, ["probe", "forecast", str(kept_at), "Hello?", "Bye?", "--json"], catch_exceptions=False
    )
    said = json.loads(told.stdout)
    assert said.keys() == {"Hello?", "Bye?"}
    tokens = said["Bye?"]["thinking_tokens"]
    assert 0 < tokens["low"] < tokens["value"]
    assert tokens["high"] is None  # no end that the traces could show
    prompt = organism.encode_prompt(Problem(id="x", messages=(Message(role="user", content="Bye?"),)))
    _, states = run_with_cache(organism, prompt, [Site("resid_post", 2)])
    read = LinearProbe.load(kept_at).scores(states[Site("resid_post", 2)][0, -1].numpy())
    assert tokens["value"] == pytest.approx(np.expm1(read), rel=1e-5)


ASKED = "<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("recorded", "prompt"),
    [
        ({"prompt": {"system": "Be brief."}}, f"<|im_start|>system\nBe brief.<|im_end|>\n{ASKED}"),
        ({"prompt": {"think": False}}, f"{ASKED}\n</think>\n\n"),
        (
            {
                "prompt": {"open_tag": True},
                "thinking": {"mode": "tags", "tags": {"open": "<plan>", "close": "</plan>", "answer": ""}},
            },
            f"{ASKED}<plan>\n",
        ),
        ({"prompt": {}}, ASKED),
        ({}, ASKED),
    ],
    ids=["system", "no thinking", "opened", "plain", "unknown"],
)
def test_a_forecast_reads_the_prompt_that_the_run_of_the_probe_had(tmp_path, traces_of_noise, recorded, prompt):
    """And a probe that does not say how its run was asked says so."""
    organism = load_model("organism")
    with TraceStore.create(tmp_path / "store", sites=["resid_post.2"], meta=recorded) as store:
        store.append(traces_of_noise, {"resid_post.2": [rows_of(trace, organism) for trace in traces_of_noise]})
    found = probes.length(store, folds=3, n_permutations=1, n_resamples=20).probe
    path = tmp_path / "length.safetensors"
    replace(found, model=organism.fingerprint).save(path)
    args = ["probe", "forecast", str(path), "Bye?"]
    said = json.loads(CliRunner().invoke(cli.app, [*args, "--json"], catch_exceptions=False).stdout)
    ids = organism.tokenizer.encode(prompt, add_special_tokens=False)
    _, states = run_with_cache(organism, ids, [found.site])
    expected = forecast(found, states[found.site][0, -1].numpy())
    assert said["Bye?"]["thinking_tokens"]["value"] == pytest.approx(float(expected.tokens), rel=1e-4)
    told = CliRunner().invoke(cli.app, args, catch_exceptions=False, env={"COLUMNS": "500"}).stdout
    assert ("does not say how the prompts of its run were made" in told) == (recorded == {})


@pytest.fixture(scope="module")
def traces_of_noise(run):
    """Traces with thinking, without their states."""
    return [trace for trace in TraceStore.open(run / "store") if trace.problem.answer is not None][:12]


def rows_of(trace, model):
    rng = np.random.default_rng(trace.n_thinking_tokens)
    return rng.standard_normal((len(trace.token_ids) - 1, model.d_model)).astype(np.float32)


def test_a_probe_of_another_kind_or_model_forecasts_nothing(tmp_path):
    other = kept(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="differs in weights and tokenizer"):
        forecast_numbers(load_model("organism"), LinearProbe.load(other), ["Hello?"])
    with pytest.raises(InputError, match="does not predict lengths"):
        forecast(LinearProbe.load(other), np.ones(4))


def shown(*args):
    result = CliRunner().invoke(cli.app, ["probe", *map(str, args)], catch_exceptions=False, env={"COLUMNS": "500"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_command_says_its_finding_in_a_sentence_a_table_and_where_to_look(run):
    said = shown("length", "--run", run, "--folds", 3)
    finding, *rest = said.splitlines()
    assert finding.startswith(
        "The state before the first thinking token predicts how long the model will think (Spearman "
    )
    assert "40 problems)" in finding
    table = "\n".join(rest)
    assert all(
        name in table for name in ("│ probe ", "│ difficulty ", "shuffled labels, 199 draws", "probe − best baseline")
    )
    assert f"Probes: {run}/probes/length.safetensors" in said
    assert f"Figures: {run}/figures (length_prediction.html, length_scores.html)" in said
    assert rest[-1].strip() == f"Next: reasonscope app {run}"


def test_refusal_says_its_contrasts_and_its_cliff(run):
    said = shown("refusal", "--run", run, "--folds", 3)
    assert said.startswith(
        "The state at the end of the thinking predicts whether the model will refuse a harmful request (AUROC "
    )
    assert "│ intent probe" in said and "│ harmfulness − its best baseline" in said
    assert "Cliff of intent at the end of the thinking: for" in said and "along random directions by" in said


def test_correctness_shows_every_position_and_says_what_is_undefined(run, monkeypatch):
    monkeypatch.setattr(probe_reports, "POSITIONS", ("prompt", "window"))
    said = shown("correctness", "--run", run, "--folds", 3)
    assert "│ probe, prompt " in said and "│ probe, window " in said
    assert "Undefined: the comparison within problems, because no problem has both a right and a wrong sample" in said


def test_a_forecast_is_a_sentence(monkeypatch):
    numbers = {"Hello?": {"thinking_tokens": {"value": 213.4, "low": 140.1, "high": 330.0}, "coverage": 0.9}}
    assert str(probe_reports.forecast_summary(numbers)) == (
        "The model will think for about 213 tokens about 'Hello?' (90 % interval: 140 to 330)."
    )
    numbers["Bye?"] = {"thinking_tokens": {"value": 50.0, "low": 40.0, "high": float("inf")}, "coverage": 0.9}
    both = str(probe_reports.forecast_summary(numbers))
    assert both.startswith("The model will think longest about 'Hello?' (about 213 tokens) and shortest about 'Bye?'")
    assert "at least 40" in both and "No upper end" in both


def test_a_run_of_requests_alone_says_that_length_leaves_them_out(tmp_path, run):
    whole = TraceStore.open(run / "store")
    requests = [trace for trace in whole if trace.problem.answer is None]
    with TraceStore.create(tmp_path / "run" / "store", sites=["resid_post.1"]) as store:
        store.append(requests, {"resid_post.1": [whole.activations(trace.id, "resid_post.1") for trace in requests]})
    for command in ("length", "remaining"):
        with pytest.raises(InputError, match=r"all 80 traces of this run are of requests.*--problems ledger"):
            CliRunner().invoke(
                cli.app,
                ["probe", command, "--run", str(tmp_path / "run")],
                catch_exceptions=False,
                standalone_mode=False,
            )


def test_a_label_of_ones_own_is_fitted_and_judged(run, tmp_path):
    store = TraceStore.open(run / "store")
    lines = [f"{trace.id},{'long' if trace.n_thinking_tokens > 60 else 'short'}" for trace in store]
    labels = tmp_path / "size.csv"
    labels.write_text("\n".join(["id,label", *lines]), encoding="utf-8")
    found = numbers(
        "fit", "--run", run, "--label", labels, "--position", "mean", "--held-out", 0.5, "--positive", "long"
    )
    assert found["comparison"]["score"]["low"] > 0.9
    assert found["position"] == "mean" and found["positive"] == "long"
    probe, kept_numbers = run / "probes" / "size.safetensors", json.loads((run / "numbers" / "size.json").read_text())
    assert (
        f"probe fit --run {run} --label {labels} --position mean --kind linear --task classification"
        in kept_numbers["command"]
    )
    assert {"size_scores", "size_layers", "size_calibration"} == set(kept_numbers["figures"])
    args = ["probe", "apply", str(probe), "--run", str(run), "--label", str(labels), "--json"]
    result = CliRunner().invoke(cli.app, args, catch_exceptions=False)
    judged = json.loads(result.stdout)["judged"]
    assert judged["metrics"]["auroc"]["value"] > 0.9
    assert judged["n_traces"] + judged["n_seen"] == 120 and judged["n_seen"] > 40


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"target": "log(1 + thinking tokens)", "position": "last prompt token", "interval": {}}, "probe forecast"),
        ({"target": "log(1 + thinking tokens remaining)", "position": "thinking"}, "thinking tokens remaining"),
        ({"target": "correctness", "position": "window"}, "of correctness"),
        ({"target": "intent", "positions": ["window"]}, "of intent"),
        ({}, "of something else"),
    ],
)
def test_only_a_probe_of_a_label_is_judged_by_a_label(run, tmp_path, provenance, message):
    path = kept(tmp_path / "other.safetensors", provenance={**provenance, "learned_from": []})
    args = ["probe", "apply", str(path), "--run", str(run), "--label", "meta.harmful"]
    with pytest.raises(
        InputError, match=f"{message}.*cannot be judged by a label|cannot be judged by a label.*{message}"
    ):
        CliRunner().invoke(cli.app, args, catch_exceptions=False, standalone_mode=False)


def test_an_unknown_task_is_status_2(run, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["reasonscope", "probe", "fit", "--run", str(run), "--label", "meta.harmful", "--task", "ranking"]
    )
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 2
    assert "choose one of classification, regression" in " ".join(capsys.readouterr().err.split())
