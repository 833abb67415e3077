"""A study of the organism: what holds is skipped, what is stale says why, and an interrupted one goes on."""

import json
import re
from dataclasses import replace

import pytest

from reasonscope.analysis.studies import runner
from reasonscope.analysis.studies.lab import Served
from reasonscope.analysis.studies.plan import read_plan
from reasonscope.analysis.studies.runner import kept, open_lab, outlook_summary, outlooks, study
from reasonscope.analysis.studies.state import finished, why_stale
from reasonscope.analysis.studies.steps import sweeping
from reasonscope.analysis.studies.steps.sweeping import SweepStep
from reasonscope.probes.properties import length_probe
from reasonscope.steering.experiments.held_out import respond

PLAN = """
name: tiny
model: organism
problems:
  sums: {source: ledger, n: 24, parts: {judge: 4, learn: 16}}
steps:
  run: {record: sums.learn, sites: [resid_post.4], max_new_tokens: 400}
  length: {probe: length, run: run, folds: 3}
  requests: {probe: refusal, run: run}
  cliff: {analyse: cliff, run: run, after: [requests]}
  entropy: {analyse: entropy, run: run, traces: {n: 2}}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "tiny.yaml"
    path.write_text(PLAN, encoding="utf-8")
    return read_plan(path)


@pytest.fixture(scope="module")
def first(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "tiny"
    return out, study(plan, out)


def test_every_step_is_measured_or_says_why_not(first):
    _, report = first
    assert set(report.failed) == {"requests", "cliff"}
    assert "refusal.safetensors does not exist" in report.failed["cliff"]
    assert report.steps["run"].numbers["traces"] == 16
    assert "3 of 5 steps were measured" in report.summary().finding


def test_the_report_has_each_finding_with_its_table(first):
    text = first[1].path.read_text(encoding="utf-8")
    assert text.count("<h2 ") == 5 and "<script src=" not in text
    assert "Not measured: " in text and "shuffled labels" in text and "Plotly.newPlot(" in text
    assert text.count("plotly.js v") == 1 and "<td>comparison.score.value</td>" in text


def test_numbers_are_kept_beside_the_run_and_in_the_step(first):
    out, report = first
    kept_numbers = json.loads((out / "run" / "numbers" / "length.json").read_text(encoding="utf-8"))["numbers"]
    assert report.steps["length"].numbers["comparison"]["score"] == kept_numbers["comparison"]["score"]
    assert (out / "run" / "probes" / "length.safetensors").exists()


def test_a_second_call_runs_only_what_could_not_be_measured(first, plan, monkeypatch):
    out, _ = first
    monkeypatch.setattr(runner, "rates", lambda *_, **__: None)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    study(plan, out)
    changed = {p.name for p in before if p.stat().st_mtime_ns != before[p]}
    assert changed <= {"requests.json", "cliff.json", "report.html"}


def test_a_dry_run_says_what_would_run_and_why(first, plan):
    out, _ = first
    with_folds = replace(plan, steps={**plan.steps, "length": replace(plan.steps["length"], folds=4)})
    lab = open_lab(with_folds, out)
    found = {one.name: one for one in outlooks(lab, measure=False)}
    assert found["run"].why == "" and found["entropy"].why == ""
    assert found["length"].why == "folds is 4, was 3"
    assert found["length"].seconds == finished(lab, "length").seconds  # as long as it took before
    assert "would run" in str(outlook_summary(lab, list(found.values())))


def test_other_problems_or_another_seed_make_everything_stale(first, plan):
    out, _ = first
    lab = open_lab(replace(plan, seed=1), out)
    assert why_stale(lab, "run") == "seed is 1, was 0"
    assert why_stale(lab, "entropy") == "reads run, which has to run"
    sums = replace(plan.problems["sums"], n=25)
    assert "problems sums n is 25, was 24" in why_stale(open_lab(replace(plan, problems={"sums": sums}), out), "run")


def test_where_the_model_runs_makes_nothing_stale(first, plan):
    out, _ = first
    assert why_stale(open_lab(replace(plan, load={"threads": 1}), out), "run") == ""
    assert "dtype" in why_stale(open_lab(replace(plan, load={"dtype": "float64"}), out), "run")


def test_a_file_that_is_gone_or_changed_is_made_again(first, plan, tmp_path):
    out, _ = first
    lab = open_lab(plan, out)
    path = out / "run" / "numbers" / "length.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text + " ", encoding="utf-8")
    assert why_stale(lab, "length").endswith("length.json has changed")
    path.unlink()
    assert why_stale(lab, "length").endswith("length.json is gone")
    path.write_text(text, encoding="utf-8")
    assert why_stale(lab, "length") == ""


def test_an_interrupted_study_says_what_is_kept_and_goes_on(plan, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "rates", lambda *_, **__: None)
    monkeypatch.setattr(length_probe, "length_data", stop)
    with pytest.raises(KeyboardInterrupt):
        study(plan, tmp_path)
    lab = open_lab(plan, tmp_path)
    assert kept(lab) == f"1 of 5 steps are done (in {tmp_path}); run the same command again to go on."
    monkeypatch.undo()
    before = (tmp_path / "run" / "store" / "manifest.json").read_bytes()
    assert study(plan, tmp_path, only=["length"]).steps["length"].failed == ""
    assert (tmp_path / "run" / "store" / "manifest.json").read_bytes() == before


def test_only_some_steps_run_with_those_that_they_need(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "rates", lambda *_, **__: None)
    assert list(study(plan, tmp_path, only=["entropy"]).steps) == ["run", "entropy"]
    with pytest.raises(Exception, match=re.escape("the plan has no step 'entropi'; did you mean 'entropy'?")):
        study(plan, tmp_path, only=["entropi"])


def test_an_interrupted_sweep_goes_on_and_a_changed_one_is_measured_again(first, plan, monkeypatch):
    """Its finished methods are kept, but only for the options that they were measured with."""
    out, _ = first
    sweep = SweepStep(methods=("tip:3",), run="run", problems=("sums.judge",), n=2, max_new_tokens=40, n_controls=5)
    planned = replace(plan, steps={"run": plan.steps["run"], "sweep": sweep})
    monkeypatch.setattr(runner, "rates", lambda *_, **__: None)
    measured = study(planned, out).steps["sweep"].numbers
    (out / "steps" / "sweep.json").unlink()  # as if it had been interrupted after its last method
    asked = []
    monkeypatch.setattr(sweeping, "respond", lambda *told, **_: asked.append(told[2].name) or respond(*told, **_))
    assert study(planned, out).steps["sweep"].numbers == measured and asked == []
    longer = replace(planned, steps={**planned.steps, "sweep": replace(sweep, max_new_tokens=60)})
    assert study(longer, out).steps["sweep"].numbers != measured and asked == ["tip"]


def test_the_arms_of_a_sweep_are_written_in_vllm(first, plan, address, engine, heard, monkeypatch):
    pytest.importorskip("openai")
    out, _ = first
    told = {"run": "run", "problems": ("sums.judge",), "n": 2, "max_new_tokens": 40, "n_controls": 5}
    sweeps = {
        "vectors": SweepStep(methods=("seal:0.5",), sites=("resid_post.4",), **told),
        "tokens": SweepStep(methods=("tip:3",), **told),
    }
    planned = replace(plan, steps={"run": plan.steps["run"], **sweeps})
    monkeypatch.setattr(runner, "rates", lambda *_, **__: None)
    vllm = Served(url=address, served_as="m", steers=True)
    report = study(planned, out, server=vllm, only=["vectors"])
    steered = [body for body in engine.asked if "apply_hooks" in body.get("vllm_xargs", {})]
    assert not report.failed and len(steered) == 2 * 7, "two problems under the method, its reverse and five controls"
    n = len(engine.asked)
    assert not study(planned, out, server=vllm, only=["tokens"]).failed and len(engine.asked) == n
    assert any("written here: vLLM does not change how tokens are chosen (tip:3)" in line for line in heard.lines)
