"""The demo end to end, on a handful of problems; a second run goes on from what is stored."""

import io
import json
import shutil

import pytest

from reasonscope.analysis.studies.plan import plan_text, read_plan
from reasonscope.app.demo.demo import run_demo
from reasonscope.data.progress import listening
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.terminal_progress import _Lines

SIZES = {"n: 240": "n: 24", "n: 160": "n: 8", "judge: 40, modes: 48, rest: 152": "judge: 6, modes: 6, rest: 12"}


def tiny(path):
    """The plan of the demo, on a handful of problems."""
    text = plan_text("demo")
    for size, smaller in SIZES.items():
        assert size in text
        text = text.replace(size, smaller)
    path.write_text(text, encoding="utf-8")
    return read_plan(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    plan = tiny(out.with_name("demo.yaml"))
    said = io.StringIO()
    with listening(_Lines(said)):
        summary = run_demo(plan, out)
    return out, summary, said.getvalue()


def test_each_step_says_what_it_does(run):
    for words in (
        "6 of 6 steps to run",
        "· record",
        "· length_probe",
        "· steering",
    ):
        assert words in run[2]


def test_the_summary_has_what_others_read(run):
    out, summary, _ = run
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert 0 <= summary["organism"]["accuracy"] <= 1
    assert summary["traces"]["n"] == 32
    assert summary["length_probe"].keys() >= {"spearman", "ci", "baselines", "n_groups"}
    assert summary["length_probe"]["n_groups"] == 24
    for name in ("seal", "asc", "speed"):
        found = summary[name]
        assert found.keys() >= {"tokens_base", "tokens_steered", "accuracy_base", "accuracy_steered", "random_tokens"}
        assert found["tokens_base"] > found["tokens_steered"] > 0 and found["n_problems"] == 6
        assert len(found["random_tokens"]) == 2
    assert 0 <= summary["same_texts_of_asc_and_speed"] <= 6
    assert summary["asc"]["tokens_steered"] < min(summary["asc"]["random_tokens"])
    assert summary["timings"].keys() == {
        "load",
        "record",
        "length_probe",
        "refusal_probe",
        "correctness_probe",
        "modes",
        "steering",
    }
    assert summary["refusal_probe"].startswith("not measured: ")  # 8 requests are too few for five folds


def test_the_store_is_sound_and_holds_every_layer(run):
    store = TraceStore.open(run[0] / "store")
    assert store.check() == []
    assert len(store) == 32 and all(site.startswith("resid_post.") for site in store.sites)


def test_the_report_shows_every_figure_without_a_network(run):
    text = (run[0] / "report.html").read_text(encoding="utf-8")
    assert text.count("Plotly.newPlot(") == 6 and "<script src=" not in text


def test_a_second_run_records_nothing_again(run, tmp_path):
    first, summary, _ = run
    out = shutil.copytree(first, tmp_path / "demo")
    before = {path: path.stat().st_mtime_ns for path in (out / "store").rglob("*") if path.is_file()}
    again = run_demo(tiny(tmp_path / "demo.yaml"), out)
    after = {path: path.stat().st_mtime_ns for path in (out / "store").rglob("*") if path.is_file()}
    assert before == after
    assert {k: v for k, v in again.items() if k != "timings"} == {k: v for k, v in summary.items() if k != "timings"}


def test_the_report_has_the_story_too(run):
    out, summary, _ = run
    assert len(summary["story"]) == 10 and summary["story"][7].startswith("Refusal probe: not measured: ")
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("<li>") == 10 and "<td>story" not in text
