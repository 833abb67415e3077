"""The examples that are made from a study: a part of its traces with everything that was measured on them, and the steered ones."""

from dataclasses import replace

import pytest

from reasonscope.analysis.runs.opened_run import open_run
from reasonscope.analysis.studies.plan import read_plan
from reasonscope.analysis.studies.runner import study
from reasonscope.app.demo import real_example
from reasonscope.app.demo.real_example import EXAMPLES, REAL, STEERED, write_real_example
from reasonscope.data import InputError, TraceStore

PLAN = """
model: organism
problems:
  sums: {source: ledger, n: 24, parts: {learn: 16, shown: 3}}
steps:
  open: {record: sums.learn, sites: [resid_post.4], max_new_tokens: 400}
  length: {probe: length, run: open, folds: 3}
  entropy: {analyse: entropy, run: open}
  reflection: {analyse: reflection, run: open, traces: {n: 4}}
  seal-recipe: {extract: seal, run: open}
  plain: {record: sums.shown, max_new_tokens: 400}
  steered: {record: sums.shown, max_new_tokens: 400, steer: seal-recipe}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    (folder / "plan.yaml").write_text(PLAN, encoding="utf-8")
    (folder / "LICENSE").write_text("MIT", encoding="utf-8")
    report = study(read_plan(folder / "plan.yaml"), folder / "study", estimate=False)
    assert report.failed == {}
    left_out = write_real_example(folder / "study", folder / "app", licence=folder / "LICENSE", n=4)
    return folder, left_out


def test_the_example_holds_the_traces_that_were_analysed_most_and_what_was_measured_on_them(made):
    folder, left_out = made
    run = open_run(folder / "app" / REAL)
    assert left_out == [] and len(run.store) == 4 + 3 and run.store.sites == ()
    reflected = {result.provenance["trace"] for result in run.results("reflection")}
    assert {result.provenance["trace"] for result in run.results("entropy")} == reflected == set(run.store.ids[:4])
    assert run.numbers("length")["numbers"]["n_groups"] == 16
    assert (run.where.scores / "length.safetensors").exists()
    assert "7 of the 16 traces" in run.store.meta["note"]


def test_the_same_problems_are_there_without_and_with_steering(made):
    folder, _ = made
    plain, steered = (TraceStore.open(folder / "app" / name / "store") for name in (REAL, STEERED))
    assert set(steered.ids) < set(plain.ids) and steered.meta["steered"]["name"] == "seal-recipe"
    assert steered.check() == [] and plain.check() == []
    assert all((folder / "app" / name / "LICENSE-problems").read_text() == "MIT" for name in (REAL, STEERED))
    assert not list((folder / "app").rglob(".lock"))


def test_too_few_analysed_traces_and_too_many_bytes_are_errors(made, monkeypatch):
    folder, _ = made
    with pytest.raises(InputError, match="fewer than 20 traces"):
        write_real_example(folder / "study", folder / "other", licence=folder / "LICENSE", n=20)
    monkeypatch.setattr(real_example, "MOST_BYTES", 10)
    with pytest.raises(InputError, match="take fewer traces"):
        write_real_example(folder / "study", folder / "other", licence=folder / "LICENSE", n=4)


def test_the_folder_that_a_model_was_loaded_from_is_not_shown(made, monkeypatch):
    folder, _ = made
    analysed = real_example._analysed
    monkeypatch.setattr(
        real_example,
        "_analysed",
        lambda *given: [replace(one, model={"name": "/models/mine"}) for one in analysed(*given)],
    )
    with pytest.raises(InputError, match=r"is named /models/mine.*the id that it has on the hub"):
        write_real_example(folder / "study", folder / "other", licence=folder / "LICENSE", n=4)


def test_what_is_too_large_is_left_out_and_named(made, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(real_example, "_LARGEST", 10)
    left_out = write_real_example(folder / "study", folder / "other", licence=folder / "LICENSE", n=4)
    assert len(left_out) == 8 and left_out[0].startswith("entropy of ")


def test_the_app_opens_the_real_example_first():
    assert list(EXAMPLES) == ["GSM8K", "GSM8K, steered", "example"]
