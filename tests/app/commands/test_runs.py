"""Commands on runs and models: what they write, and one line and status 2 for bad input."""

import io
import json
import shutil
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib.resources import files
from subprocess import CompletedProcess
from unittest.mock import patch

import numpy as np
import pytest

from reasonscope.app.cli import main
from reasonscope.data.storage.store import TraceStore
from reasonscope.steering.recipes.controls import exit_part
from reasonscope.steering.recipes.recipe import Recipe


def cli(*arguments, cwd):
    """The command in this process, as `reasonscope` would run it in `cwd`: a process of its own would first load torch."""
    out, err, words = io.StringIO(), io.StringIO(), ["reasonscope", *map(str, arguments)]
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", words):
        try:
            main()
        except SystemExit as exit_:
            return CompletedProcess(words, int(exit_.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("typer always exits")


def refused(done, words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr.splitlines()[-1], done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two short traces of the organism with the middle of the stream."""
    folder = tmp_path_factory.mktemp("cli")
    done = cli(*("record", "--n", 2, "--out", "run", "--sites", "resid_post.2-3", "--max-new-tokens", 30), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_record_resumes_and_check_passes(run):
    assert TraceStore.open(run / "run").sites == ("resid_post.2", "resid_post.3")
    again = cli("record", "--n", 2, "--out", "run", "--sites", "resid_post.2-3", "--max-new-tokens", 30, cwd=run)
    assert again.returncode == 0 and "2 traces" in again.stdout
    checked = cli("check", "run", cwd=run)
    assert checked.returncode == 0 and "every byte" in checked.stdout


def test_check_names_what_was_altered(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    shard = next((tmp_path / "run" / "shards").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = cli("check", "run", cwd=tmp_path)
    refused(done, shard.name)


def test_export_and_import_round(run):
    assert cli("export", "run", "--out", "t.jsonl", cwd=run).returncode == 0
    assert len((run / "t.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    done = cli("import", "jsonl", "t.jsonl", "--out", "imported", cwd=run)
    assert done.returncode == 0 and "2 traces" in done.stdout and "plan_generation" in done.stdout
    assert cli("export", "run", "--out", "anchors", "--to", "thought-anchors", cwd=run).returncode == 0
    assert len(list((run / "anchors").rglob("chunks_labeled.json"))) == 2


def test_import_recognises_what_it_is_given(tmp_path):
    """Reasoning beside the content, a line that is damaged, and one of an unknown kind; then the same by `check`."""
    asked = {"role": "user", "content": "3 + 4?"}
    said = {"role": "assistant", "content": "It is 7.", "reasoning": "So 7."}
    reply = {"request": {"messages": [asked]}, "response": {"choices": [{"message": said}]}, "answer": "7"}
    (tmp_path / "dump.jsonl").write_text(json.dumps(reply) + '\n{\n{"foo": 1}\n', encoding="utf-8")
    done = cli("import", "dump.jsonl", "--out", "a", cwd=tmp_path)
    told = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert (
        "1 trace in a, read as chat completion: 1 with reasoning (from reasoning), 0 without, 2 not understood" in told
    )
    assert "Not understood: dump.jsonl, line 2: not JSON" in told
    assert "Not understood: dump.jsonl, line 3: no known shape has these keys: foo" in told
    checked = " ".join(cli("check", "a", cwd=tmp_path).stdout.split())
    assert "2 not understood" in checked and "dump.jsonl, line 3: no known shape" in checked
    done = cli("import", "auto", "dump.jsonl", "--out", "b", "--model", "organism", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store = TraceStore.open(tmp_path / "b")
    (trace,) = store
    assert trace.thinking == "So 7." and len(trace.token_ids) > trace.n_prompt_tokens > 0
    assert store.meta["model"]["name"] == "organism"
    assert store.meta["thinking"]["mode"] == "tags"
    (tmp_path / "open.jsonl").write_text(
        json.dumps({"prompt": "Q", "completion": "3 + 4 make 7. The answer is 7."}), encoding="utf-8"
    )
    assert cli("import", "open.jsonl", "--out", "c", "--thinking", "completion", cwd=tmp_path).returncode == 0
    store = TraceStore.open(tmp_path / "c")
    assert store.meta["thinking"]["mode"] == "completion" and next(iter(store)).thinking == "3 + 4 make 7."


def test_import_reads_activations_as_a_recording_does(run, tmp_path):
    """What a model wrote and `export` wrote down comes back with the tokens and the activations that were recorded."""
    assert cli("export", run / "run", "--out", "t.jsonl", cwd=tmp_path).returncode == 0
    done = cli("import", "t.jsonl", "--out", "b", "--model", "organism", "--sites", "resid_post.2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "activations (resid_post.2)" in " ".join(done.stdout.split())
    recorded, again = TraceStore.open(run / "run"), TraceStore.open(tmp_path / "b")
    for trace in recorded:
        assert again.trace(trace.id).token_ids.tolist() == trace.token_ids.tolist()
        assert np.allclose(
            again.activations(trace.id, "resid_post.2"), recorded.activations(trace.id, "resid_post.2"), atol=1e-4
        )
    assert again.check() == []
    refused(cli("import", "t.jsonl", "--out", "c", "--sites", "resid_post.2", cwd=tmp_path), "--sites needs --model")


def test_import_takes_one_turn_or_each(tmp_path):
    said = [{"role": role, "content": f"<think>Hm {i}.</think>{i}"} for i in (1, 2) for role in ("user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"id": "x", "messages": said}), encoding="utf-8")
    for turn, ids in (("last", ["x"]), ("1", ["x"]), ("all", ["x/turn-1", "x/turn-2"])):
        assert cli("import", "chat.jsonl", "--out", turn, "--turn", turn, cwd=tmp_path).returncode == 0
        assert list(TraceStore.open(tmp_path / turn).ids) == ids
    refused(cli("import", "chat.jsonl", "--out", "y", "--turn", "3", cwd=tmp_path), "has 2 turns")
    refused(cli("import", "chat.jsonl", "--out", "y", "--turn", "first", cwd=tmp_path), "last, all, or a number")
    refused(cli("import", "vllm", "chat.jsonl", "--out", "y", cwd=tmp_path), "the kind is recognised")


def test_published_traces_import(real_traces, tmp_path):
    done = cli("import", "thought-anchors", real_traces, "--out", "published", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 traces" in done.stdout and "plan_generation" in done.stdout and "agree with the published" in done.stdout
    assert TraceStore.open(tmp_path / "published").check() == []


def test_tags_of_others_are_text(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "base_solution.json").write_text(
        '{"prompt": "P", "solution": "<think>I add.</think>4"}', encoding="utf-8"
    )
    chunk = {"chunk": "I add.", "function_tags": ["[/bold]\x1b[2J"]}
    (folder / "chunks_labeled.json").write_text(json.dumps([chunk]), encoding="utf-8")
    done = cli("import", "thought-anchors", "published", "--out", "x", cwd=tmp_path)
    assert done.returncode == 0 and "[/bold]\\x1b[2J" in done.stdout


def test_check_shows_the_name_of_a_stray_file_as_text(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    shard = next((tmp_path / "run").rglob("*.parquet"))
    (shard.parent / "\x1b[2J.parquet").touch()
    done = cli("check", "run", cwd=tmp_path)
    assert "\x1b" not in done.stderr and (done.returncode == 0 or "\\x1b[2J" in done.stderr)


def test_exporting_onto_a_folder_is_refused(run):
    refused(cli("export", "run", "--out", ".", cwd=run), "not a regular file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("record", "--model", "nowhere/at/all", "--n", 1), "nowhere/at/all"),
        (("record", "--n", 1, "--sites", "resid_post.99"), "resid_post.99"),
        (("record", "--n", 1, "--sites", "nonsense.1"), "nonsense"),
        (("record", "--problems", "broken.jsonl"), "broken.jsonl"),
        (("record", "--problems", "empty.jsonl"), "empty.jsonl"),
        (("record", "--problems", "long.jsonl", "--out", "long"), "context"),
        (("record", "--n", 1, "--shard", "3"), "shard '3'"),
        (("record", "--n", 3, "--out", "run", "--sites", "resid_post.0"), "recorded with other settings"),
        (("check", "nowhere"), "nowhere"),
        (("import", "jsonl", "missing.jsonl", "--out", "x"), "missing.jsonl"),
        (("verify", "nowhere"), "nowhere"),
        (("verify", "a" * 5000), "File name too long"),
        (("record", "--n", 1, "--problems", "a" * 5000), "File name too long"),
        (("record", "--n", 1, "--out", "a" * 5000), "File name too long"),
        (("app", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, words):
    (run / "broken.jsonl").write_text('{"prompt": "a", "id": "1"}\n{"prompt": \n', encoding="utf-8")
    (run / "empty.jsonl").write_text("", encoding="utf-8")
    (run / "long.jsonl").write_text(json.dumps({"prompt": "word " * 3000, "id": "1"}) + "\n", encoding="utf-8")
    refused(cli(*arguments, cwd=run), words)


def test_the_broken_line_is_named(run):
    (run / "broken.jsonl").write_text('{"prompt": "a", "id": "1"}\n{"prompt": \n', encoding="utf-8")
    refused(cli("record", "--problems", "broken.jsonl", cwd=run), "line 2")


def test_verify_passes_on_the_organism(run):
    done = cli("verify", "organism", "--json", cwd=run)
    assert done.returncode == 0, done.stdout
    assert all(check["passed"] for check in json.loads(done.stdout))


def test_a_corrupt_model_folder_is_refused(run):
    source = str(files("reasonscope.data.organism").joinpath("organism"))
    for name, damage, words in (
        ("cut", lambda weights: weights.write_bytes(weights.read_bytes()[:1000]), "cut"),
        ("pickled", lambda weights: weights.rename(weights.with_name("pytorch_model.bin")), "safetensors"),
    ):
        shutil.copytree(source, run / name)
        damage(run / name / "model.safetensors")
        refused(cli("verify", name, cwd=run), words)


def test_shards_are_merged_and_record_refuses_what_does_not_go_together(tmp_path):
    how = ("--problems", "ledger", "--n", 4, "--sites", "resid_post.2", "--max-new-tokens", 8)
    for part in ("1", "2"):
        done = cli("record", *how, "--shard", f"{part}/2", "--out", f"parts/{part}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for _ in range(2):  # a second merge finds nothing to do
        done = cli("merge", "parts/1", "parts/2", "--out", "run", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("4 traces")
    assert cli("check", "run", cwd=tmp_path).returncode == 0
    refused(cli("merge", "parts/3", "--out", "run", cwd=tmp_path), "not a trace store")
    both = cli("record", *how, "--ray", "local", "--server", "http://127.0.0.1:9", "--out", "other", cwd=tmp_path)
    refused(both, "leave out --server and --shard")
    stopping = Recipe(name="short", controls=(exit_part("fixed budget", 60),))
    stopping.save(tmp_path / "short.recipe.safetensors")
    spread = cli(
        "record", *how, "--ray", "local", "--steer", "short.recipe.safetensors", "--out", "other", cwd=tmp_path
    )
    refused(spread, "the controller exit, whose decisions workers of Ray cannot hand back")
    refused(cli("record", *how, "--server", "nowhere", "--out", "other", cwd=tmp_path), "has to begin with http")
    refused(cli("record", *how, "--remote", "local", "--out", "other", cwd=tmp_path), "remote needs backend='nnsight'")
