"""Pairs by two instructions: with any model, through a file, into every method of ASC and of thinking speed; held-out problems stay out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.app import cli
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.steering.experiments.held_out import source_of_run, split_run
from reasonscope.steering.methods.asc import CompletionPair, load_pairs
from reasonscope.steering.methods.pairs import _instructed, make_pairs, pair_traces
from reasonscope.steering.methods.registry import METHODS, ExtractionData, extract

THOUGHT = "<think>\nSteps: 3 + 4.\n\nSo 7.\n\nCheck: 7.\n</think>\n\n7"
SITE = Site("resid_post", 3)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return record(
        model,
        load_problems("ledger", n=4, seed=3),
        folder / "store",
        sites=["resid_post.3"],
        sampling=Sampling(max_new_tokens=12),
    )


def pair(number, **changes):
    """A pair without any mode; the verbose side is the longer one, with blank lines on both."""
    given = {
        "question": f"What is {number} + 4?",
        "concise": THOUGHT,
        "verbose": THOUGHT.replace("So 7.", f"So 7. It is {number} and four more.\n\nI count again."),
        "id": f"p{number}",
        "concise_instruction": "Think briefly.",
        "verbose_instruction": "Think in detail.",
    }
    return CompletionPair(**{**given, **changes})


PAIRS = [pair(number) for number in range(4)]


@pytest.mark.parametrize("method", ["asc", "asc-thinking", "asc-clamp", "speed", "speed-clamp"])
def test_every_method_of_length_learns_from_pairs_alone(model, store, method):
    uses = extract(method, store, model, sites=[SITE], pairs=PAIRS)
    for use in uses:
        assert use.vector.provenance["groups"] == ["p0", "p1", "p2", "p3"]
        assert all(np.isfinite(direction).all() and direction.any() for direction in use.vector.directions.values())


def test_a_method_of_the_run_refuses_pairs(model, store):
    with pytest.raises(InputError, match="take one of asc, asc-thinking, asc-clamp, speed, speed-clamp"):
        METHODS["seal"].parts(ExtractionData(model=model, store=store, ids=store.ids, pairs=PAIRS))
    with pytest.raises(InputError, match="reasonscope steer pairs --model MODEL"):
        extract("asc", store, model)


def test_pairs_of_held_out_problems_are_left_out(model, store):
    split = split_run(store, share=0.5, n=None, seed=0)
    held = [pair(i, id=problem.group) for i, problem in enumerate(split.held_out)]
    assert source_of_run(model, store, split, pairs=[*held, *PAIRS]).pairs == PAIRS
    with pytest.raises(InputError, match="all 2 pairs are of held-out problems"):
        source_of_run(model, store, split, pairs=held)


def test_a_pair_is_what_the_model_read_and_wrote(model):
    ((brief, long),) = pair_traces(model, [pair(1)])
    assert "What is 1 + 4?\n\nThink briefly." in brief.text and brief.thinking.startswith("Steps: 3 + 4.")
    assert "Think in detail." in long.text and long.n_thinking_tokens > brief.n_thinking_tokens
    assert brief.token_ids[: brief.n_prompt_tokens].tolist() == model.encode_prompt(brief.problem)


def test_without_tags_all_of_the_completion_is_thinking(model):
    open_ = pair(1, concise="First 3 + 4.\n\nThe answer is 7.")
    ((brief, _),) = pair_traces(model, [open_])
    assert (brief.thinking, brief.state) == ("First 3 + 4.\n\nThe answer is 7.", "closed")
    assert brief.tokens.thinking.start == brief.n_prompt_tokens


def test_an_instruction_follows_the_question():
    chat = load_problems("ledger", n=1)[0]
    assert _instructed(chat, "Be brief.").messages[-1].content == f"{chat.messages[-1].content}\n\nBe brief."
    assert _instructed(Problem(id="p", prompt="Q: 1 + 1?\n"), "Be brief.").prompt == "Q: 1 + 1?\nBe brief.\n"


def test_pairs_are_made_and_kept(model, tmp_path):
    problems = load_problems("ledger", n=3, seed=4)
    made = make_pairs(
        model, problems, concise="Think briefly.", verbose="Think in detail.", sampling=Sampling(max_new_tokens=400)
    )
    assert 1 <= len(made.pairs) <= 3 and made.n_problems == 3
    assert {one.id for one in made.pairs} <= {problem.group for problem in problems}
    assert made.n_right is not None
    assert f"{len(made.pairs)} pairs" in made.summary().finding
    made.save(tmp_path / "pairs.jsonl")
    assert load_pairs(tmp_path / "pairs.jsonl") == list(made.pairs)
    longer = replace(made, n_tokens=(9.0, 5.0))
    assert any("not shorter" in note for note in longer.summary().notes)
    with pytest.raises(InputError, match="ask for more"):
        make_pairs(model, problems, sampling=Sampling(max_new_tokens=2))


def test_the_commands_make_and_take_pairs(store, tmp_path):
    run, path = store.path, tmp_path / "pairs.jsonl"
    words = [
        "--model",
        "organism",
        "--problems",
        tmp_path / "problems.jsonl",
        "--out",
        path,
        "--n",
        2,
        "--max-new-tokens",
        400,
    ]
    lines = [
        {"id": p.id, "messages": [{"role": "user", "content": p.messages[0].content}]}
        for p in load_problems("ledger", n=2, seed=4)
    ]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["steer", "pairs", *map(str, words), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["n_pairs"] == len(load_pairs(path)) >= 1
    out = tmp_path / "asc.safetensors"
    told = ["steer", "extract", "asc", "--run", run, "--pairs", path, "--sites", "resid_post.3", "--out", out, "--json"]
    done = CliRunner().invoke(cli.app, list(map(str, told)), catch_exceptions=False)
    assert json.loads(done.stdout)["source"] == "pairs" and out.exists()
    assert TraceStore.open(run).ids
