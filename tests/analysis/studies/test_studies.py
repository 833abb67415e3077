"""A study of the organism: what holds is skipped, what is stale says why, and an interrupted one goes on."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from reasonscope.analysis.runs import context
from reasonscope.analysis.runs.saved_numbers import read_numbers
from reasonscope.analysis.studies import lab, runner
from reasonscope.analysis.studies.lab import Served
from reasonscope.analysis.studies.plan import changed, read_plan
from reasonscope.analysis.studies.runner import kept, open_lab, outlook_summary, outlooks, study
from reasonscope.analysis.studies.state import finished, inputs_of, why_stale
from reasonscope.analysis.studies.steps import sweeping
from reasonscope.analysis.studies.steps.analysing import AnalyseStep
from reasonscope.analysis.studies.steps.base import Outcome, Work
from reasonscope.analysis.studies.steps.exits import ExitStep
from reasonscope.analysis.studies.steps.extracting import PairsStep
from reasonscope.analysis.studies.steps.measured import study_line
from reasonscope.analysis.studies.steps.probing import ProbeStep
from reasonscope.analysis.studies.steps.recording import RecordStep
from reasonscope.analysis.studies.steps.sweeping import SweepStep
from reasonscope.app import cli
from reasonscope.data.arrays import plain
from reasonscope.data.storage.durable import sha256_of
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary
from reasonscope.probes.models import model as models
from reasonscope.probes.models.model import load_model
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

# What versions that kept no checksums of the files of options and of the model saved of the inputs of a step.
OLD = ("kind", "options", "model", "load", "seed", "problems", "reads", "runs")


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


def test_a_run_of_other_problems_is_not_added_to(first, plan, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(first[0], out)
    fewer = replace(plan.problems["sums"], parts={"judge": 4, "learn": 12})
    report = study(replace(plan, problems={"sums": fewer}), out, only=["run"], estimate=False)
    assert "holds traces of 4 problems that the plan does not ask for" in report.failed["run"]
    assert len(TraceStore.open(out / "run" / "store")) == 16


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


LINES = {
    "sweep": SweepStep(
        methods=("tip:3", "seal"),
        run="run",
        strengths=(0.5,),
        held_out=0.3,
        n=2,
        samples=2,
        sites=("resid_post.80%",),
        max_new_tokens=60,
    ),
    "exit": ExitStep(exit="run", held_out=0.4, places="sentence", every=60, n=4, tolerance=0.3),
}


@pytest.mark.parametrize("kind", LINES)
def test_the_command_that_a_step_saves_makes_its_numbers_again(kind, first, plan, monkeypatch):
    out, _ = first
    monkeypatch.setattr(runner, "rates", lambda *_, **__: None)
    planned = replace(plan, load={"threads": 1}, steps={"run": plan.steps["run"], "mine": LINES[kind]})
    found = study(planned, out).steps["mine"].numbers
    line = read_numbers(out / "run" / "numbers" / f"{kind}.json")["command"]
    done = CliRunner().invoke(cli.app, [*shlex.split(line)[1:], "--json"], catch_exceptions=False)
    assert done.exit_code == 0 and json.loads(done.stdout) == json.loads(json.dumps(plain(found)))


def test_the_command_of_a_sweep_of_other_problems_is_the_study_with_what_was_changed(tmp_path):
    path = tmp_path / "my plan.yaml"
    path.write_text(PLAN, encoding="utf-8")
    step = SweepStep(methods=("tip:3",), run="run", problems=("sums.judge",))
    told = changed(read_plan(path), model="organism-base", sources=["sums=ledger:brief"])
    served = Served(url="http://127.0.0.1:8000", served_as="m", steers=True)
    opened = open_lab(replace(told, steps={**told.steps, "swept": step}), tmp_path / "out", served)
    assert shlex.split(study_line(opened, "swept")) == shlex.split(
        f"reasonscope study '{path}' --model organism-base --problems sums=ledger:brief --out {tmp_path / 'out'} --only swept "
        "--server http://127.0.0.1:8000 --served-as m --backend vllm"
    )


FILES = {
    "a label": lambda file: ProbeStep(probe="fit", run="run", label=str(file)),
    "labels": lambda file: ProbeStep(probe="correctness", run="run", labels=file),
    "a probe": lambda file: AnalyseStep(analyse="cliff", run="run", options={"probe": str(file)}),
    "requests": lambda file: AnalyseStep(analyse="cliff", run="run", options={"requests": str(file)}),
    "a vector": lambda file: AnalyseStep(analyse="steering_shift", run="run", options={"vector": str(file)}),
}


@pytest.fixture
def quick(monkeypatch):
    """Steps that find something at once; `quick.during` is done while they run."""
    during = SimpleNamespace(during=lambda: None)

    def execute(step, lab, name):
        during.during()
        return Outcome(summaries=(Summary(finding="found"),))

    for kind in (ProbeStep, AnalyseStep, RecordStep):
        monkeypatch.setattr(kind, "execute", execute)
        monkeypatch.setattr(kind, "work", lambda *_: Work())
    monkeypatch.setattr(runner, "rates", lambda *_, **__: None)
    return during


@pytest.mark.parametrize("step", FILES.values(), ids=FILES)
def test_another_content_of_a_file_of_options_makes_a_step_and_those_that_read_it_stale(step, plan, tmp_path, quick):
    file = tmp_path / "given.csv"
    file.write_text("one", encoding="utf-8")
    after = AnalyseStep(analyse="entropy", run="run", after=("given",))
    planned = replace(plan, steps={"run": plan.steps["run"], "given": step(file), "after": after})
    out = tmp_path / "study"
    study(planned, out)
    assert _stale(planned, out) == {}
    file.write_text("two", encoding="utf-8")
    assert _stale(planned, out) == {"given": f"{file} has changed", "after": "reads given, which has to run"}
    study(planned, out, only=["given"])
    assert _stale(planned, out) == {"after": f"{file} has changed"}


@pytest.mark.parametrize(
    "changed", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "adapter_config.json"]
)
def test_another_content_of_the_models_files_makes_every_step_stale(changed, plan, tmp_path, quick):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", changed):
        (folder / name).write_bytes(b"before")
    planned, out = replace(plan, model=str(folder)), tmp_path / "study"
    study(planned, out, only=["entropy"])
    assert why_stale(open_lab(planned, out), "entropy") == ""
    (folder / changed).write_bytes(b"behind")  # as many bytes
    assert f"{changed} of the model has changed" in why_stale(open_lab(planned, out), "run")
    (folder / changed).write_bytes(b"before")
    (folder / "special_tokens_map.json").write_bytes(b"{}")
    assert why_stale(open_lab(planned, out), "run") == "special_tokens_map.json of the model has changed"


def test_a_long_text_in_the_options_is_not_taken_for_a_file(plan, tmp_path):
    steps = {"pairs": PairsStep(problems=("sums.judge",), concise="Answer briefly. " * 400)}
    assert inputs_of(open_lab(replace(plan, steps=steps), tmp_path), "pairs")["files"] == {}


def test_other_weights_in_a_gguf_file_make_a_step_stale(plan, tmp_path, quick):
    file, out = tmp_path / "model.gguf", tmp_path / "study"
    file.write_bytes(b"before")
    study(replace(plan, model=str(file)), out, only=["entropy"])
    file.write_bytes(b"behind")
    assert why_stale(open_lab(replace(plan, model=str(file)), out), "run") == "model.gguf of the model has changed"


def test_weights_are_read_once(plan, tmp_path, quick, monkeypatch):
    file, out = tmp_path / "model.gguf", tmp_path / "study"
    file.write_bytes(b"before")
    planned, read = replace(plan, model=str(file)), []
    monkeypatch.setattr(lab, "sha256_of", lambda path: read.append(path) or sha256_of(path))
    study(planned, out, only=["entropy"])
    study(planned, out, only=["entropy"])
    assert read == [file]


def test_a_file_that_changes_while_a_step_runs_makes_it_stale(plan, tmp_path, quick):
    problems, labels, out = tmp_path / "problems.jsonl", tmp_path / "labels.csv", tmp_path / "study"
    problems.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    labels.write_text("before", encoding="utf-8")
    steps = {"run": replace(plan.steps["run"], problems=("mine",)), "given": FILES["labels"](labels)}
    planned = replace(
        plan, problems={"mine": replace(plan.problems["sums"], source=str(problems), parts={})}, steps=steps
    )

    def edit():
        problems.write_text('{"question": "1 + 2?", "answer": "3"}\n', encoding="utf-8")
        labels.write_text("behind", encoding="utf-8")

    quick.during = edit
    study(planned, out, only=["run"])
    assert "problems mine source is" in _stale(planned, out)["run"]
    quick.during = lambda: None
    study(planned, out)
    quick.during = lambda: labels.write_text("after", encoding="utf-8")
    (out / "steps" / "given.json").unlink()
    study(planned, out)
    assert _stale(planned, out) == {"given": f"{labels} has changed"}


def test_a_step_that_an_older_version_saved_holds_and_notices_changes_from_now_on(plan, tmp_path, quick):
    file, out = tmp_path / "labels.csv", tmp_path / "study"
    file.write_text("one", encoding="utf-8")
    planned = replace(plan, steps={"run": plan.steps["run"], "given": FILES["labels"](file)})
    study(planned, out)
    for path in (out / "steps").glob("*.json"):
        known = json.loads(path.read_text(encoding="utf-8"))
        known["inputs"] = {key: known["inputs"][key] for key in OLD}
        path.write_text(json.dumps(known), encoding="utf-8")
    assert _stale(planned, out) == {}
    assert "seed is 1" in _stale(replace(planned, seed=1), out)["run"]

    def fail():
        raise AssertionError("nothing has to run")

    quick.during = fail
    study(planned, out)
    file.write_text("two", encoding="utf-8")
    assert _stale(planned, out) == {"given": f"{file} has changed"}


def _stale(planned, out):
    """Why each step has to run that has to."""
    opened = open_lab(planned, out)
    return {name: why for name in planned.steps if (why := why_stale(opened, name))}


@pytest.mark.parametrize("told", [{"think": False}, {"open_tag": True}, {"think": False, "system": "Add."}, {}])
def test_steps_on_a_run_ask_the_model_as_it_was_asked_and_do_not_load_it_again(plan, tmp_path, told):
    step = replace(plan.steps["run"], max_new_tokens=1, sites=(), **told)
    lab = open_lab(replace(plan, steps={"run": step}), tmp_path)
    step.execute(lab, "run")
    recorded = lab.model(**step.how())
    assert lab.model_of("run") is recorded
    for trace in lab.store("run"):
        assert recorded.encode_prompt(trace.problem) == trace.token_ids[: trace.n_prompt_tokens].tolist()


class Asked(Exception):
    """A model was asked for."""


@pytest.mark.parametrize("analysis", ["mi", "suppression", "heads", "anchors", "receivers", "mi_compare"])
def test_an_analysis_of_a_study_loads_the_revision_of_the_plan_and_no_such_base(first, plan, monkeypatch, analysis):
    asked = []

    def load(source, **how):
        asked.append((source, how.get("revision")))
        raise Asked

    monkeypatch.setattr(models, "load_model", load)
    monkeypatch.setattr(context, "load_model", load)
    planned = replace(plan, load={"revision": "abc"})
    step = AnalyseStep(analyse=analysis, run="run")
    with pytest.raises(Asked):
        step.execute(open_lab(planned, first[0]), "it")
    assert set(asked) <= {("organism", "abc"), ("organism-base", None)} and asked


def test_a_step_on_a_run_loads_the_revision_of_the_run(first, plan, monkeypatch):
    loaded = load_model("organism")
    opened = open_lab(plan, first[0])
    meta = opened.store("run").meta
    moved = {**meta, "model": {**meta["model"], "revision": "abc"}}
    monkeypatch.setattr(opened, "store", lambda run: SimpleNamespace(meta=moved))
    asked = []
    monkeypatch.setattr(lab, "load_model", lambda source, **how: asked.append(how["revision"]) or loaded)
    assert opened.model_of("run") is loaded
    assert asked == ["abc"]
