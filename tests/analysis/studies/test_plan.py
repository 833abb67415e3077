"""Plans: what they say, and one clear line for whatever is wrong."""

import re

import pytest

from reasonscope.analysis.studies.lab import Lab, sites_of
from reasonscope.analysis.studies.plan import _shipped_plans, changed, read_plan
from reasonscope.data import InputError

PLAN = """
model: organism
problems:
  sums: {source: ledger, n: 24, parts: {judge: 6, learn: 12}}
steps:
  run: {record: sums.learn, sites: 'resid_post.*', max_new_tokens: 40}
  length: {probe: length, run: run}
  sweep: {sweep: ['seal:1'], run: run, problems: sums.judge}
"""


def plan_of(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return read_plan(path)


def test_a_plan_is_named_after_its_file_and_keeps_the_order_of_its_steps(tmp_path):
    plan = plan_of(tmp_path, PLAN)
    assert plan.name == "mine"
    assert list(plan.steps) == ["run", "length", "sweep"]
    assert plan.steps["sweep"].needs == ("run",)
    assert plan.steps["run"].problems == ("sums.learn",)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("probe: length", "prob: length", "step length: unknown kind of step 'prob'; did you mean 'probe'?"),
        ("probe: length", "probe: lenght", "step length, probe: 'lenght'; choose from length, remaining"),
        ("max_new_tokens", "max_new_token", "step run: unknown option 'max_new_token'; did you mean 'max_new_tokens'?"),
        ("max_new_tokens: 40", "max_new_tokens: many", "step run, max_new_tokens: 'many' is not a whole number"),
        ("model: organism\n", "", "model is missing; add it"),
        ("model:", "modle:", "unknown option 'modle'; did you mean 'model'?"),
        ("length, run: run", "length, run: rnu", "step length needs an unknown step 'rnu'; did you mean 'run'?"),
        ("length, run: run", "length, run: sweep", "step length needs sweep, which comes later; put it before"),
        ("length, run: run", "length", "step length: run is missing; add it"),
        ("sums.learn", "sum.learn", "step run asks unknown problems 'sum'; did you mean 'sums'?"),
        ("sums.learn", "sums.lean", "step run: sums has no part 'lean'; did you mean 'learn'?"),
        ("source: ledger", "sources: ledger", "problems, sums: unknown option 'sources'; did you mean 'source'?"),
        ("probe: length", "analyse: entropi", "unknown analysis 'entropi'; did you mean 'entropy'?"),
        ("probe: length", "analyse: entropy, options: {sed: 1}", "this analysis does not take 'sed'"),
        ("steps:", "steps: 3\nrest:", "steps: write names with values, not 3"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, old, new, said):
    assert old in PLAN
    with pytest.raises(InputError, match=re.escape(said)) as failed:
        plan_of(tmp_path, PLAN.replace(old, new, 1))
    assert "\n" not in str(failed.value)


def test_a_file_that_does_not_exist_names_the_shipped_plans():
    with pytest.raises(InputError, match=r"one of the shipped plans: .*gsm8k"):
        read_plan("nowhere.yaml")


@pytest.mark.parametrize("name", _shipped_plans())
def test_every_shipped_plan_is_valid(name):
    plan = read_plan(name)
    assert plan.name == name
    assert plan.steps


def test_the_real_plan_judges_on_enough_problems_and_learns_from_enough():
    parts = {name: told.parts for name, told in read_plan("gsm8k").problems.items()}
    assert all(of["learn"] >= 150 and of["judge"] >= 60 for of in parts.values())


def test_no_group_of_problems_is_in_two_parts_and_the_same_parts_hold_the_same_problems(tmp_path):
    text = PLAN.replace("\nsteps:", "\n  brief: {source: 'ledger:brief', n: 24, parts: {judge: 6, learn: 12}}\nsteps:")
    lab = Lab(plan_of(tmp_path, text), tmp_path)
    groups = {name: {p.group for p in lab.problems([name])} for name in ("sums.judge", "sums.learn", "brief.judge")}
    assert groups["sums.judge"] == groups["brief.judge"]
    assert not groups["sums.judge"] & groups["sums.learn"]
    assert len(lab.problems(["sums.learn"])) == 12 and len(lab.problems(["sums"])) == 24


def test_parts_that_ask_for_too_many_problems_say_so(tmp_path):
    lab = Lab(plan_of(tmp_path, PLAN.replace("learn: 12", "learn: 19")), tmp_path)
    with pytest.raises(InputError, match="sums has 24 problems in 24 groups, too few for parts of 6, 19"):
        lab.problems(["sums.learn"])


def test_messages_come_before_every_problem(tmp_path):
    before = "before: [{role: system, content: Be brief.}], parts"
    (first, *_) = Lab(plan_of(tmp_path, PLAN.replace("parts", before, 1)), tmp_path).problems(["sums.learn"])
    assert [message.role for message in first.messages] == ["system", "user"]


def test_a_model_and_problems_of_ones_own_are_a_change_of_two_lines(tmp_path):
    plan = changed(plan_of(tmp_path, PLAN), model="mine/model", sources=["sums=problems.jsonl"])
    assert (plan.model, plan.problems["sums"].source) == ("mine/model", "problems.jsonl")
    with pytest.raises(InputError, match="the plan has no problem set 'sum'; did you mean 'sums'"):
        changed(plan, sources=["sum=problems.jsonl"])


def test_sites_can_be_shares_of_the_depth():
    assert list(map(str, sites_of(["resid_post.50%", "resid_post.95%", "z.0"], 24))) == [
        "resid_post.12",
        "resid_post.22",
        "z.0",
    ]
