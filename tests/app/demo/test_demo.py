"""The demo end to end, on a handful of problems; a second run goes on from what is stored."""

import io
import json
import shutil

import pytest

from reasonscope.app.demo.demo import Size, run_demo
from reasonscope.data.progress import listening
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.terminal_progress import Lines

TINY = Size(ledgers=24, requests=8, steered=6, briefly=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    said = io.StringIO()
    with listening(Lines(said)):
        summary = run_demo(out, size=TINY)
    return out, summary, said.getvalue()


def test_each_step_says_what_it_does(run):
    for words in (
        "loading the organism",
        "recording 32 traces",
        "how long it will think",
        "steering held-out problems",
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
        "steering",
    }
    assert summary["refusal_probe"].startswith("not measured: ")  # 8 requests are too few for five folds


def test_the_store_is_sound_and_holds_every_layer(run):
    store = TraceStore.open(run[0] / "store")
    assert store.check() == []
    assert len(store) == 32 and all(site.startswith("resid_post.") for site in store.sites)


def test_the_report_shows_every_figure_without_a_network(run):
    text = (run[0] / "report.html").read_text(encoding="utf-8")
    assert text.count("Plotly.newPlot(") == 5 and "<script src=" not in text


def test_a_second_run_records_nothing_again(run, tmp_path):
    first, summary, _ = run
    out = shutil.copytree(first, tmp_path / "demo")
    before = {path: path.stat().st_mtime_ns for path in (out / "store").rglob("*") if path.is_file()}
    again = run_demo(out, size=TINY)
    after = {path: path.stat().st_mtime_ns for path in (out / "store").rglob("*") if path.is_file()}
    assert before == after
    assert {k: v for k, v in again.items() if k != "timings"} == {k: v for k, v in summary.items() if k != "timings"}


def test_the_report_has_the_story_too(run):
    out, summary, _ = run
    assert len(summary["story"]) == 10 and summary["story"][7].startswith("Refusal probe: not measured: ")
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("<li>") == 10 and "<td>story" not in text
