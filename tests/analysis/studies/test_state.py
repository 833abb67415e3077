"""Whether a step of a study has to run, from what is kept of it; nothing is recorded here."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from reasonscope.analysis.studies.plan import read_plan
from reasonscope.analysis.studies.runner import open_lab
from reasonscope.analysis.studies.state import Finished, _by_name, finished, forget_failed, inputs_of, why_stale

PLAN = """
name: tiny
model: organism
problems:
  sums: {source: ledger, n: 6, parts: {learn: 4}}
steps:
  run: {record: sums.learn, sites: [resid_post.4]}
  length: {probe: length, run: run}
  entropy: {analyse: entropy, run: run, traces: {n: 2}, after: [length]}
"""


@pytest.fixture
def lab(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(PLAN, encoding="utf-8")
    return open_lab(read_plan(path), tmp_path / "out")


def keep(lab, name, **about):
    Finished(inputs=inputs_of(lab, name), **{"seconds": 100.0, **about}).save(lab, name)


def test_a_step_that_was_never_run(lab):
    assert why_stale(lab, "run") == "has not run yet"
    keep(lab, "run")
    assert why_stale(lab, "run") == ""
    assert why_stale(lab, "length") == "has not run yet"


@pytest.mark.parametrize(("seconds", "again"), [(0.0, True), (59.9, True), (60.0, False), (60.5, False)])
def test_a_step_that_failed_soon_is_tried_again(lab, seconds, again):
    keep(lab, "run", failed="no room", seconds=seconds)
    assert why_stale(lab, "run") == ("could not be measured (no room)" if again else "")


def test_a_step_that_reads_one_that_failed_waits_until_that_is_measured(lab):
    keep(lab, "run")
    keep(lab, "length", failed="too few problems")
    keep(lab, "entropy", failed="it reads length, which could not be measured", lost="length")
    assert why_stale(lab, "entropy") == ""
    keep(lab, "length")
    assert why_stale(lab, "entropy") == "reads length, which is measured now"


def test_only_what_failed_is_forgotten(lab):
    keep(lab, "run")
    keep(lab, "length", failed="too few problems")
    forget_failed(lab)
    assert finished(lab, "run") is not None and finished(lab, "length") is None and finished(lab, "entropy") is None


def test_a_run_that_was_recorded_again_makes_those_stale_that_read_it(lab):
    manifest = lab.where("run").store / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}", encoding="utf-8")
    keep(lab, "run")
    keep(lab, "length")
    inputs = inputs_of(lab, "length")
    assert set(inputs["runs"]) == {"run"} and set(inputs["reads"]) == {"run"} and why_stale(lab, "length") == ""
    assert inputs_of(lab, "entropy")["runs"].keys() == {"run"}  # `length` records nothing
    manifest.write_text("{ }", encoding="utf-8")
    assert why_stale(lab, "length") == "the traces of run have changed"
    assert why_stale(lab, "run") == ""  # a file that the step does not list


def test_dataclasses_count_by_their_fields():
    @dataclass(frozen=True)
    class Inner:
        a: int
        path: Path

    one = Inner(1, Path("x"))
    assert _by_name({"k": [one, (2,)], 3: one}) == {"k": [vars(one), [2]], "3": vars(one)}
    assert _by_name(replace(one, a=2)) != _by_name(one)
