"""`reasonscope analyse` on a recorded run and on imported text: results beside the store, states instead of zeros, one export."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.analysis.results import load_results
from reasonscope.analysis.runs.comparisons import _analyse_cliff
from reasonscope.analysis.runs.questions import QUESTIONS
from reasonscope.analysis.runs.runner import AnalysisTask, _Analyst, summarise
from reasonscope.analysis.tokens import mi
from reasonscope.app import cli
from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "made"
    record(
        load_model("organism"),
        load_problems("ledger:brief", n=2, seed=5),
        folder / "store",
        sites=["resid_post.0", "resid_post.3"],
        sampling=Sampling(temperature=0.0, max_new_tokens=120),
    )
    return folder


def analyse(*words):
    done = CliRunner().invoke(cli.app, ["analyse", *map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def said(name, run):
    """What the command says of the results that it left."""
    task = AnalysisTask.of(run, name)
    kept = [result for method in QUESTIONS[name].writes for result in load_results(task.where.analyses, method)]
    return summarise(task, kept)


def test_the_command_says_what_it_found(run):
    done = CliRunner().invoke(cli.app, ["analyse", "entropy", "--run", str(run)], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "The thinking is written at a mean entropy of" in done.stdout
    assert "nats per token" in done.stdout and f"Next: reasonscope app {run}" in done.stdout.replace("\n", " ")


def test_an_interrupted_analysis_says_which_traces_are_finished(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "made")
    first, second = TraceStore.open(tmp_path / "made" / "store").ids
    words = ["analyse", "entropy", "--run", str(tmp_path / "made"), "--seed", "7"]
    whole, begun = _Analyst.__call__, []

    def interrupted(at):
        def one(self, id):
            begun.append(id)
            if id == at:
                raise KeyboardInterrupt
            whole(self, id)

        monkeypatch.setattr(_Analyst, "__call__", one)
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 130 and done.stdout == ""
        return done.stderr

    start = "Interrupted: no trace was finished; run the same command again to start over.\n"
    assert interrupted(first) == start
    told = f"Interrupted: 1 of 2 traces are finished ({first}); run the same command again to go on.\n"
    assert interrupted(second) == told and interrupted(second) == told
    assert begun == [first, first, second, second]  # what is finished is not done again


@pytest.mark.parametrize("name", ["mi", "entropy", "reflection", "confidence"])
def test_every_analysis_leaves_results_beside_the_store_and_draws_them_if_asked(run, name):
    options = ["--samples", "2"] if name == "confidence" else []
    analyse(name, "--run", run, *options)
    assert not list(run_folder(run).figures.glob(f"{name}-*"))
    shown = analyse(name, "--run", run, *options, "--figures")
    kept = list(load_results(run_folder(run).analyses, name))
    assert {r.provenance["trace"] for r in kept} == set(shown) and len(shown) >= 2
    for result in kept:
        if result.measured:
            assert result.null is not None and result.unit
            assert shown[result.provenance["trace"]]["state"] == "measured"
    assert any(r.measured for r in kept) and list(run_folder(run).figures.glob("*.html"))
    assert check_store(run / "store") == []


def test_the_null_of_mi_uses_the_whole_run_when_one_trace_is_chosen(run, monkeypatch):
    monkeypatch.setattr(mi, "LEAST_OTHERS", 1)
    ids = TraceStore.open(run / "store").ids
    whole, alone = analyse("mi", "--run", run), analyse("mi", "--run", run, "--trace", ids[0])
    assert "answers of other problems" in alone[ids[0]]["null"]
    assert alone[ids[0]]["null"] == whole[ids[0]]["null"]


def test_results_that_cannot_be_kept_are_one_error(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "run" / "results").write_text("a file", encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["analyse", "reflection", "--run", str(tmp_path / "run")])
    assert isinstance(done.exception, StoreError) and "cannot make the folder" in str(done.exception)


def test_a_short_thinking_has_no_trajectory_and_shorter_segments_give_it_one(run):
    ids = TraceStore.open(run / "store").ids
    (shown,) = analyse("trajectory", "--run", run, "--trace", ids[0]).values()  # segments by the run's own thinking
    assert shown["state"] == "measured"
    (shown,) = analyse("trajectory", "--run", run, "--trace", ids[0], "--block", 500).values()
    assert shown["state"] == "undefined" and "one segment of 500" in shown["reason"] and shown["values"] is None
    (shown,) = analyse("trajectory", "--run", run, "--trace", ids[0], "--block", 4).values()
    assert shown["state"] == "measured" and shown["segments"] > 2 and 0 < shown["mean_aligned"]["value"] <= 1
    assert set(shown["values"]) == {"net", "cumulative", "aligned"}


def test_a_trace_without_thinking_has_no_mi_unless_all_that_was_generated_is_looked_at(tmp_path):
    record(
        load_model("organism"), load_problems("ledger:brief", n=2, seed=5), tmp_path / "store", sites=["resid_post.3"],
        sampling=Sampling(temperature=0.0, max_new_tokens=60), think=False,
    )  # fmt: skip
    for shown in analyse("mi", "--run", tmp_path).values():
        assert shown["state"] == "undefined" and "--region generated" in shown["reason"]
    *traces, words = analyse("mi", "--run", tmp_path, "--region", "generated").values()
    assert {row["state"] for row in traces} == {"measured"} and "no word stands three times" in words["reason"]


def test_anchors_of_a_model_find_their_way_into_the_published_layout(run, tmp_path):
    id_ = TraceStore.open(run / "store").ids[0]
    words = ["--trace", id_, "--rollouts", 3, "--max-new-tokens", 60, "--half-width", 1]
    shown, replaced = analyse("anchors", "--run", run, *words).values()
    assert shown["state"] == "measured" and shown["rollouts"] >= 6
    assert replaced["method"] == "replacement" and (replaced["state"] == "measured" or replaced["reason"])
    if shown["dependencies"] is None:
        assert "pairs are true dependencies" in shown["dependencies_missing"]
    else:
        assert 0 <= shown["dependencies"]["auroc"] <= 1 and shown["dependencies"]["auroc_null"][0] <= 0.5
    done = CliRunner().invoke(cli.app, ["export", str(run), "--to", "thought-anchors", "--out", str(tmp_path)])
    assert done.exit_code == 0
    chunks = json.loads((tmp_path / id_ / "chunks_labeled.json").read_text())
    assert all("resampling_importance_accuracy" in chunk for chunk in chunks)


@pytest.mark.parametrize("name", ["receivers", "suppression", "heads"])
def test_what_attention_says_is_kept_too(run, name):
    id_ = TraceStore.open(run / "store").ids[0]
    shown = analyse(name, "--run", run, "--trace", id_)
    assert shown and all(row["state"] == "measured" or row["reason"] for row in shown.values())


def test_the_cliff_needs_a_probe(run):
    done = CliRunner().invoke(cli.app, ["analyse", "cliff", "--run", str(run)])
    assert isinstance(done.exception, InputError) and "reasonscope probe refusal" in str(done.exception)


def test_a_request_that_stopped_at_its_closing_tag_has_no_cliff(tmp_path):
    (tmp_path / "probe").touch()
    cut = trace_from_text(
        id="a/0",
        problem=Problem(id="a", prompt="?", meta={"harmful": True}),
        prompt="?\n<think>\n",
        completion="Let me see.\n</think>",
        tokenizer=load_model("organism").tokenizer_backend,
    )
    assert cut.state == "closed"
    study = SimpleNamespace(options=SimpleNamespace(probe=tmp_path / "probe"), traces=[cut, cut])
    with pytest.raises(InputError, match="0 requests with closed thinking and an answer"):
        next(_analyse_cliff(study))


def test_heads_that_suppress_refusal_are_taken_away_beside_random_ones(tmp_path):
    model = load_model("organism")
    asked = load_problems("requests:jailbreak", n=6, seed=2)
    sampling = Sampling(temperature=0.7, max_new_tokens=120, seed=1)
    record(model, asked, tmp_path / "store", sites=[], sampling=sampling)
    coef = np.random.default_rng(0).standard_normal(model.d_model)
    probe = LinearProbe(
        coef=coef, intercept=0.0, site=Site("resid_post", 4), task="binary", method="test", model=model.fingerprint
    )
    run_folder(tmp_path).probes.mkdir()
    probe.save(run_folder(tmp_path).probes / "refusal.safetensors")
    shown = analyse("cliff", "--run", tmp_path, "--ablate", "--asked", 2, "--max-new-tokens", 3)
    writes, ablated = shown.values()
    assert writes["method"] == "probe_write" and ablated["method"] == "cliff" and ablated["n_fallen"] >= 1
    assert set(ablated["values"]) == {"untouched", "ablated"} and "different sets of other heads" in ablated["null"]
    assert set(ablated["beyond_every_draw"]) == {
        "harmful refused"
    }  # the run has no other requests, and no problems to solve
    requests = [
        {"id": p.id, "prompt": p.messages[0].content, "meta": dict(p.meta)} for p in load_problems("requests", n=8)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, requests)), encoding="utf-8")
    own = ["--ablate", "--requests", tmp_path / "own.jsonl", "--asked", 2, "--max-new-tokens", 3]
    _, asked = analyse("cliff", "--run", tmp_path, *own).values()
    assert set(asked["beyond_every_draw"]) == {"harmful refused", "benign refused"}
    with pytest.raises(InputError, match="0 harmful requests to ask"):
        (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "Hello?"}), encoding="utf-8")
        analyse("cliff", "--run", tmp_path, *own)


def test_a_base_model_is_compared_with_the_reasoner(run):
    ids = TraceStore.open(run / "store").ids
    (shown,) = analyse("emergent-heads", "--run", run, "--trace", ids[0], "--trace", ids[1]).values()
    assert shown["state"] == "measured" and shown["n_pairs"] == 2
    finding = said("emergent_heads", run).finding
    assert re.fullmatch(
        r"From organism-base to organism head \d\.\d gained most: .* \d+ of \d+ heads are outside theirs .*\.", finding
    )
    shown = analyse("mi-compare", "--run", run)["all"]
    assert shown["state"] == "measured" and shown["traces"]["mean"] == 2 and "exchanged" in shown["null"]
    shown = analyse("misalignment", "--run", run, "--trace", ids[0])
    assert 0 <= shown[ids[0]]["rate_of_reasoner"] <= shown[ids[0]]["rate"] <= 1
    finding = said("misalignment", run).finding
    assert re.fullmatch(
        r"The base model would have written another token at .*; the reasoner itself would at [\d.]+\.", finding
    )


def test_rules_choose_among_stored_samples(tmp_path):
    record(
        load_model("organism"),
        load_problems("ledger:brief", n=2, seed=5),
        tmp_path / "store",
        sites=[],
        samples=3,
        sampling=Sampling(temperature=1.0, max_new_tokens=40),
    )
    (shown,) = analyse("selection", "--run", tmp_path, "-k", 3).values()
    assert set(shown["values"]) == {"single", "majority", "short-1"} and shown["k"] == 3
    assert set(shown["values"]["single"]) == {"accuracy", "tokens"}
    summary = said("selection", tmp_path)
    assert re.fullmatch(
        r"(?:The best|No) rule for 3 samples is .* single sample, which is right for .*\.", summary.finding
    )
    assert summary.rows[0][0] == "single" and summary.rows[0][-1] == "1.00"


def test_a_probe_stops_stored_samples_with_the_answers_that_were_forced(tmp_path):
    site, model = "resid_post.2", load_model("organism")
    sampling = Sampling(temperature=1.0, max_new_tokens=150)
    asked = load_problems("ledger:brief", n=2, seed=5)
    record(model, asked, tmp_path / "store", sites=[site], samples=2, sampling=sampling)
    sure = LinearProbe(  # says .99 of everything, so it stops at the first tenth
        coef=np.zeros(model.d_model), intercept=5.0, site=Site.parse(site), task="binary", method="t", model=model.fingerprint,
        provenance={"learned_from": ["another problem"]},
    )  # fmt: skip
    groups = sorted({problem.group for problem in asked})
    for learned, why in ((groups, "learned from the problems of all 4 traces"), (None, "does not say which problems")):
        replace(sure, provenance={"learned_from": learned} if learned else {}).save(tmp_path / "seen.safetensors")
        done = CliRunner().invoke(
            cli.app, ["analyse", "selection", "--run", str(tmp_path), "--probe", str(tmp_path / "seen.safetensors")]
        )
        assert isinstance(done.exception, InputError) and why in str(done.exception)
    sure.save(tmp_path / "sure.safetensors")
    words = ["selection", "--run", tmp_path, "-k", 2, "--probe", tmp_path / "sure.safetensors"]
    done = CliRunner().invoke(cli.app, ["analyse", *map(str, words)])
    assert isinstance(done.exception, InputError) and "analyse confidence" in str(done.exception)
    analyse("confidence", "--run", tmp_path, "--samples", 1)
    analyse(*words)
    (found,) = load_results(run_folder(tmp_path).analyses, "selection")
    tokens = dict(zip(found.axis("rule").labels, found.at(metric="tokens"), strict=True))
    assert tokens["stop above 0.5"] == tokens["stop above 0.9"] < tokens["single"]
    assert "stop above 0.9, another trace's scores" in tokens


def test_steps_that_the_answer_does_not_hang_on_are_counted(run):
    for shown in analyse("reflection", "--run", run).values():
        assert 0 <= shown["failed_step_fraction"] < 1


def test_the_summary_puts_the_signals_side_by_side(run):
    analyse("entropy", "--run", run)
    id_ = TraceStore.open(run / "store").ids[0]
    (shown,) = analyse("agreement", "--run", run, "--trace", id_).values()
    assert shown["state"] == "undefined" or "entropy" in shown["values"]


def write_published(folder):
    """A problem in the published layout: three sentences, their importances and both matrices of effects."""
    chunks = [
        {"chunk": text, "chunk_idx": i, "function_tags": ["unknown"], "accuracy": accuracy, "depends_on": [str(i - 1)] if i else [],
         "resampling_importance_accuracy": step}
        for i, (text, accuracy, step) in enumerate(
            [("I add three and four.", 0.5, 0.25), ("So the answer is 7.", 0.75, 0.25), ("The answer is 7.", 1.0, 0.0)]
        )
    ]  # fmt: skip
    effects = [
        {"source_chunk_idx": 0, "source_chunk_text": chunks[0]["chunk"], "target_impacts": [
            {"target_chunk_idx": 1, "importance_score": 0.5}, {"target_chunk_idx": 2, "importance_score": 0.1}]},
        {"source_chunk_idx": 1, "source_chunk_text": chunks[1]["chunk"], "target_impacts": [
            {"target_chunk_idx": 2, "importance_score": 0.7}]},
    ]  # fmt: skip
    text = "I add three and four. So the answer is 7. The answer is 7.\n</think>\n\n\\boxed{7}"
    prompt = "Add.\n<think>\n"
    files = {
        "base_solution": {"prompt": prompt, "solution": text, "full_cot": prompt + text, "answer": "7", "is_correct": True},
        "problem": {"problem": "Add.", "gt_answer": "7"},
        "chunks_labeled": chunks,
        "step_importance": effects,
        "step_importance_supp": effects,
    }  # fmt: skip
    target = folder / "model" / "correct" / "problem_1"
    target.mkdir(parents=True)
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("source", ["synthetic", "real"])
def test_published_traces_get_every_text_level_analysis_and_go_back_as_they_came(source, tmp_path, request):
    published = tmp_path / "published"
    if source == "synthetic":
        write_published(published)
    else:
        shutil.copytree(
            request.getfixturevalue("real_traces") / "qwen-14b/correct/problem_2238", published / "m/problem_2238"
        )
    run, back = tmp_path / "run", tmp_path / "back"
    done = CliRunner().invoke(cli.app, ["import", "thought-anchors", str(published), "--out", str(run / "store")])
    assert done.exit_code == 0
    for shown in analyse("anchors", "--run", run).values():
        assert shown["state"] == "measured" and "no rollouts" in shown["null"] and shown["recomputed_equal"] >= 0.99
        together = shown["suppression_correlation"]
        assert together is None or -1 <= together["all"] <= 1
    kept = list(load_results(run_folder(run).analyses, "anchors"))
    assert any("suppression" in result.arrays for result in kept)
    for shown in analyse("reflection", "--run", run).values():
        assert shown["state"] == "measured" and 0 <= shown["failed_step_fraction"] < 1
    assert all(
        row["state"] == "measured" or "at least 4" in row["reason"]
        for row in analyse("agreement", "--run", run).values()
    )
    for name in ("entropy", "trajectory", "mi"):
        assert all(row["state"] == "undefined" and row["reason"] for row in analyse(name, "--run", run).values())
    done = CliRunner().invoke(cli.app, ["export", str(run), "--to", "thought-anchors", "--out", str(back)])
    assert done.exit_code == 0
    for path in published.rglob("base_solution.json"):
        for name in ("chunks_labeled", "step_importance", "step_importance_supp"):
            before = path.parent / f"{name}.json"
            after = back / path.parent.relative_to(published) / f"{name}.json"
            assert before.exists() == after.exists()
            if before.exists():
                assert json.loads(before.read_text()) == json.loads(after.read_text())
