"""Every analysis, probe position, scope and view on traces that think in two blocks, by the command line, on a tiny random model."""

import json
from dataclasses import fields
from itertools import product
from pathlib import Path
from pkgutil import iter_modules
from typing import get_args

import numpy as np
import pytest
import torch
from plain_tokenizer import plain_tokenizer
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

import reasonscope as rs
from reasonscope import probes
from reasonscope.analysis.runs.questions import QUESTIONS
from reasonscope.app import cli, pages
from reasonscope.data.errors import InputError
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import StepKind, Trace
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.fitting.positions import PLACES, Place
from reasonscope.steering.vectors.scope import Scope

FIRST = ("Add.\n\nWait.\n\nThe answer is 6.", "The answer is 6.\n\nWait.\n\nAdd it.", "Add.\n\nWait, no.\n\nSo 6.")
SECOND = ("See.\n\nWait.\n\nThe answer is 7.", "No.\n\nThe answer is 7. Wait.\n\nYes.")
N = 24


def line(i: int) -> dict[str, object]:
    answer = "Sure. It is 7." if i % 2 and i // 2 % 3 else "I cannot help."
    completion = f"<think>\n{FIRST[i % 3]}\n</think>\n\nA try: 6?\n\n<think>\n{SECOND[i % 2]}\n</think>\n\n{answer}"
    meta = {"harmful": i // 2 % 2 == 0}
    return {
        "id": f"p{i // 2}/{i % 2}",
        "prompt": f"What is {i // 2}?",
        "completion": completion,
        "answer": "7",
        "difficulty": i // 2 % 4,
        "meta": meta,
    }


def said(*command: object) -> str:
    done = CliRunner().invoke(cli.app, [str(word) for word in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for seed in range(2):  # the second is the base model
        tiny_model("qwen2", seed).save_pretrained(folder / str(seed))
        plain_tokenizer().save_pretrained(folder / str(seed))
    return folder / "0"


@pytest.fixture(scope="module")
def run(tmp_path_factory, model) -> Path:
    """A run of traces of two blocks, read by the model at every block."""
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "dump.jsonl").write_text("\n".join(json.dumps(line(i)) for i in range(N)), encoding="utf-8")
    said(
        "import", folder / "dump.jsonl", "--model", model, "--sites", "resid_post.*", "--out", folder / "run" / "store"
    )
    return folder / "run"


@pytest.fixture(scope="module")
def traces(run) -> list[Trace]:
    return list(rs.open_run(run).store)


def between(trace: Trace) -> set[int]:
    """The tokens between the blocks, without those next to a tag, which may belong to it."""
    first, second = trace.thinking_blocks
    return set(range(first.stop + 2, second.start - 2))


def test_the_run_is_what_these_tests_need(traces):
    assert len(traces) == N and all(trace.state == "closed" and len(trace.thinking_blocks) == 2 for trace in traces)
    assert all(len(between(trace)) > 5 for trace in traces)


SCOPES = [
    *(("all", None), ("close_window", None), ("answer", None), ("think", None), ("think", "separators")),
    *product(("all", "think"), get_args(StepKind)),
]


@pytest.mark.parametrize(("on", "steps"), SCOPES)
def test_a_scope_on_the_thinking_leaves_out_what_is_between(on, steps, model, traces):
    """In one pass over the text, and token by token."""
    trace, scope = traces[0], Scope.of(rs.load_model(model), on=on, steps=steps)
    ids, given = torch.tensor([trace.token_ids.tolist()]), torch.tensor([trace.n_prompt_tokens])
    whole = scope.mask(ids, n_prompt=given)[0]
    grown = [scope.mask(ids[:, :stop], n_prompt=given, last=1)[0, -1] for stop in range(1, ids.shape[1] + 1)]
    assert whole.tolist() == torch.stack(grown).tolist()
    edited = set(torch.nonzero(whole).flatten().tolist())
    if on == "think" or steps:
        assert not edited & between(trace)
        assert edited or steps == "transition"  # there is none
    if on == "think" and steps is None:
        assert edited >= {row for block in trace.thinking_blocks for row in range(block.start, block.stop)}


@pytest.mark.parametrize("position", [*PLACES, "every:3", "0.5", "0", "1"])
def test_a_probe_of_a_label_reads_at(position, run, traces):
    store, labels = rs.open_run(run).store, {trace.id: trace.problem.meta["harmful"] for trace in traces}
    probes.fit(store, labels, position=position, sites=["resid_post.1"], folds=2, n_permutations=3)
    rows = Place.parse(position).rows(traces[0])
    assert rows and not set(rows) & between(traces[0])


# What an analysis needs on so small a model.
OPTIONS = {
    "mi": {"gold": "own"},
    "mi_compare": {"gold": "own"},
    "anchors": {"rollouts": 2, "max_new_tokens": 4},
    "confidence": {"samples": 1},
    "trajectory": {"block": 4},
    "selection": {"k": 2, "block": 4},
    "steering_shift": {"n_controls": 5},
}
OF_THE_RUN = ("cliff", "selection", "emergent_heads", "mi", "mi_compare")
IDS = ["p0/0", "p1/1"]


@pytest.fixture(scope="module")
def analysed(run, model):
    """Every analysis, once there are a probe of refusal and a vector; what fails does not end the others."""
    said("probe", "refusal", "--run", run, "--folds", 3)
    said("steer", "extract", "seal", "--run", run, "--sites", "resid_post.1")
    return {name: _analysed(name, question, run, model) for name, question in QUESTIONS.items()}


def _analysed(name, question, run, model):
    own = {each.name for each in fields(question.options)}
    base = {"base": str(model.parent / "1")} if "base" in own else {}
    try:
        return rs.analyse(name, run, traces=None if name in OF_THE_RUN else IDS, **OPTIONS.get(name, {}), **base)
    except InputError as error:
        return error


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_analysis_measures_the_thinking(name, analysed, traces):
    found, known = analysed[name], {trace.id: trace for trace in traces}
    assert not isinstance(found, InputError), found
    assert {one.method for one in found} <= QUESTIONS[name].writes.keys()
    # so short a rollout of a random model gives no answer
    assert name == "anchors" or any(np.isfinite(np.asarray(one.values, dtype=float)).any() for one in found)
    for one in found:
        axes, trace = {axis.name: axis for axis in one.axes}, known.get(one.provenance.get("trace", ""))
        if trace and "sentence" in axes:
            assert len(axes["sentence"].labels) == len(sentences(trace))
        if trace and "token" in axes and len(axes["token"].labels) <= trace.n_thinking_tokens:
            assert [int(label) for label in axes["token"].labels] == trace.thinking_positions.tolist()


def _show(view: str, folder: str) -> None:
    from importlib import import_module
    from pathlib import Path

    from reasonscope.analysis.runs.opened_run import open_run
    from reasonscope.app.page_parts import components, state

    state.offer_runs({"this": Path(folder)})
    with components.show_errors():
        import_module(f"reasonscope.app.pages.{view}").show(open_run(Path(folder)))


@pytest.mark.usefixtures("analysed")
@pytest.mark.parametrize("view", [one.name for one in iter_modules(pages.__path__)])
def test_a_page_shows(view, run):
    shown = AppTest.from_function(_show, args=(view, str(run)), default_timeout=60)
    shown.query_params["trace"] = IDS[1]
    shown.run()
    assert not shown.exception and not shown.error
    assert shown.main.children
