"""The published table: read and checked, filled from a study, drawn, and compared with a small study."""

import json
import re
from dataclasses import replace

import pytest

from reasonscope.analysis.studies.claims import (
    Comparison,
    _inner,
    compare,
    comparison_summary,
    filled,
    findings_table,
    read_findings,
    verify_claims,
    write_findings,
)
from reasonscope.analysis.studies.plan import read_plan
from reasonscope.analysis.studies.runner import open_lab
from reasonscope.analysis.studies.state import Finished
from reasonscope.data import Estimate, InputError

TABLE = """
models:
  organism: {name: the organism, study: demo, check: demo-quick}
claims:
  length:
    claim: The state tells the length
    paper: a paper
    measure: Spearman
    found:
      organism: {number: "length_probe: comparison/score", check: "length_probe: comparison/score", control: text .35}
  dose:
    claim: Steering | shortens
    paper: another
    measure: tokens
    found:
      organism: {number: "steering: doses/0/*change", scale: -1}
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "findings.yaml"
    path.write_text(TABLE, encoding="utf-8")
    return read_findings(path)


def keep(out, plan, step, numbers):
    Finished(inputs={}, seconds=1.0, numbers=numbers).save(open_lab(plan, out), step)


def estimate(value, low, high):
    return Estimate(value=value, low=low, high=high)


def test_a_table_is_filled_from_a_study_and_read_again(table, tmp_path):
    score = {"value": 0.9, "low": 0.8, "high": 0.95}
    keep(tmp_path, "demo", "length_probe", {"comparison": {"score": score}, "n_groups": 240})
    keep(tmp_path, "demo", "steering", {"doses": [{"the change": {"value": -12.0, "low": -20.0, "high": -4.0}}]})
    found = filled(table, "organism", tmp_path)
    assert found.claims["length"].found["organism"].estimate == estimate(0.9, 0.8, 0.95)
    assert found.claims["length"].found["organism"].n == 240
    assert found.claims["dose"].found["organism"].estimate == estimate(12.0, 4.0, 20.0)  # scaled by −1
    write_findings(found, tmp_path / "again.yaml")
    assert read_findings(tmp_path / "again.yaml") == found
    assert "| 0.9 [0.8, 0.95], n = 240 | text .35 |" in findings_table(found)
    assert "**Steering / shortens** (another): tokens | the organism |" in findings_table(found)


def test_what_a_study_lacks_stays_as_it_was(table, tmp_path):
    assert filled(table, "organism", tmp_path) == table
    assert findings_table(table).count("| – | not measured yet |") == 2
    assert findings_table(table).splitlines()[1] == "| --- | --- | --- | --- | --- |"
    assert _inner([5, 6], "1") == 6 and _inner([5, 6], "2") is None and _inner("56", "1") is None
    assert _inner({"a of 3": 1, "a of 4": 2}, "*of 4") == 2


def test_a_small_study_is_compared_number_by_number(table, tmp_path):
    keep(tmp_path / "full", "demo", "length_probe", {"comparison": {"score": {"value": 0.9, "low": 0.8, "high": 0.95}}})
    published = filled(table, "organism", tmp_path / "full")
    keep(tmp_path, "demo-quick", "length_probe", {"comparison": {"score": {"value": 0.7, "low": 0.5, "high": 0.88}}})
    (one,) = compare(published, "organism", tmp_path)  # the other claim has no check
    assert one.claim == "length" and one.again == estimate(0.7, 0.5, 0.88) and one.agrees is True
    summary = comparison_summary("organism", [one])
    assert "1 of 1 findings on organism came out again" in summary.finding
    keep(tmp_path, "demo-quick", "length_probe", {"other": 1})
    (one,) = compare(published, "organism", tmp_path)
    assert one.agrees is None and one.why_not == "length_probe has no number comparison/score"


@pytest.mark.parametrize(
    ("again", "agrees"),
    [
        (estimate(0.85, 0.75, 0.9), True),
        (estimate(0.99, 0.98, 1.0), False),  # .09 apart, and the ends that face each other allow .051
        (estimate(0.5, 0.1, 0.95), True),  # a wide interval
        (estimate(0.5, 0.45, 0.55), False),
    ],
)
def test_numbers_agree_if_their_difference_is_within_both_intervals(again, agrees):
    assert Comparison(claim="a", published=estimate(0.9, 0.8, 0.95), again=again).agrees is agrees


def test_an_unknown_model_is_named_with_those_that_are_known(table, tmp_path):
    with pytest.raises(InputError, match="no model of the table is called 'organsm'; did you mean 'organism'"):
        verify_claims("organsm", tmp_path, found=table)
    (tmp_path / "wrong.yaml").write_text(
        TABLE.replace('organism: {number: "l', 'organsm: {number: "l'), encoding="utf-8"
    )
    with pytest.raises(InputError, match=re.escape("length: unknown model 'organsm'")):
        read_findings(tmp_path / "wrong.yaml")


def test_every_place_of_the_shipped_table_is_a_step_of_its_plan():
    found = read_findings()
    for claim in found.claims.values():
        for model, one in claim.found.items():
            places = [(one.number, found.models[model].study), (one.check, found.models[model].check)]
            for place, plan in places:
                assert not place or place.partition(":")[0] in read_plan(plan).steps, (place, plan)


def test_verifying_runs_the_small_study_and_compares_it(table, tmp_path, monkeypatch):
    known = replace(table.claims["length"].found["organism"], value=0.9, low=0.8, high=0.95)
    claims = {"length": replace(table.claims["length"], found={"organism": known})}
    asked = []

    def run(plan, out, **_):
        asked.append((plan.name, plan.model))
        keep(out, plan, "length_probe", {"comparison": {"score": {"value": 0.1, "low": 0.0, "high": 0.2}}})

    monkeypatch.setattr("reasonscope.analysis.studies.claims.study", run)
    (one,) = verify_claims("organism", tmp_path, found=replace(table, claims=claims), source="organism-base")
    assert asked == [("demo-quick", "organism-base")]
    assert one.agrees is False and json.dumps(one.published.to_dict())
