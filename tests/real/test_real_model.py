"""A model with real weights, by the command line: `make test-real`, with REASONSCOPE_REAL_MODEL naming its folder or hub id."""

import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

import reasonscope as rs
from reasonscope.app.cli import app

MODEL = os.environ.get("REASONSCOPE_REAL_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MODEL, reason="needs REASONSCOPE_REAL_MODEL, a folder or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
    ),
]


def problem(i: int) -> dict[str, str]:
    question = f"Tom has {i + 3} boxes of {i + 2} pens and loses {i + 1}. How many pens are left?"
    return {"id": f"p{i}", "prompt": question, "answer": str((i + 3) * (i + 2) - i - 1)}


def said(*command: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    return str(done.output)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    lines = "\n".join(json.dumps(problem(i)) for i in range(6))
    (folder / "problems.jsonl").write_text(lines, encoding="utf-8")
    said(
        "record", "--model", MODEL, "--problems", folder / "problems.jsonl", "--out", folder / "run", "--dtype", "float32",
        "--sites", "resid_post.*", "--max-new-tokens", "96", "--batch-size", "6",
    )  # fmt: skip
    return folder / "run"


def test_its_activations_are_what_their_names_say():
    assert "FAILED" not in said("verify", MODEL, "--dtype", "float32")


def test_a_recording_is_whole_and_says_how_the_thinking_was_found(run):
    assert "6 traces, every byte as it was written" in " ".join(said("check", run).split())
    traces = list(rs.open_run(run).store)
    assert any(trace.n_thinking_tokens for trace in traces)  # a model may answer at once
    states = rs.open_run(run).store.activations(traces[0].id, "resid_post.0")
    assert len(states) == len(traces[0].token_ids) - 1
    assert np.isfinite(states.astype(np.float32)).all()


@pytest.mark.parametrize("analysis", ["entropy", "trajectory", "suppression", "heads", "receivers", "mi"])
def test_analyses_run_to_their_end(run, analysis):
    own = ["--gold", "own"] if analysis == "mi" else []
    traces = [trace for trace in rs.open_run(run).store if not own or trace.answer_text.strip()]
    if not traces:
        pytest.skip("this model gave no answer within 96 tokens")
    longest = max(traces, key=lambda one: one.n_thinking_tokens)
    assert "Results:" in said("analyse", analysis, "--run", run, "--trace", longest.id, *own)


def test_the_estimate_of_the_strongest_heads_has_the_sign_of_what_is_measured(run):
    model, store = rs.load_model(MODEL, dtype="float32"), rs.open_run(run).store
    trace = max(store, key=lambda one: one.n_thinking_tokens)
    found = rs.analysis.head_attribution(model, trace, rs.sentences(trace), n_checked=8)
    checked = found.numbers["checked"]
    assert np.corrcoef([one["estimate"] for one in checked], [one["exact"] for one in checked])[0, 1] > 0.5
