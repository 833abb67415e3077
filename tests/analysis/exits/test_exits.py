"""Early exits: rules on hand-made signals, thresholds that are judged on other problems, and the whole of it on the organism."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.analysis.exits.evaluation import calibrate, exit_report, thoughts
from reasonscope.analysis.exits.rules import FIXED_BUDGET, RULES, Outcomes, outcomes, stopping_cut, thresholds
from reasonscope.analysis.exits.run import early_exits
from reasonscope.analysis.exits.signals import ExitSignals, exit_points, exit_signals
from reasonscope.analysis.exits.summary import exit_summary
from reasonscope.analysis.figures import exit_frontier
from reasonscope.app.cli import app
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.text.answers import equivalent
from reasonscope.data.trace import Sampling
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.branches import PrefixWriter
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.forced_answers import boxed_answer
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model

BY_NAME = {rule.name: rule for rule in (*RULES, FIXED_BUDGET)}


def signals(i=0, *, known=2, n=5, step=10, finished=True, **more):
    """A trace of n cuts, every `step` tokens, whose forced answer is right from the cut `known` on."""
    right = np.arange(n) >= known
    about = {
        "trace": f"p{i}/0",
        "group": f"p{i}",
        "cuts": 100 + step * np.arange(1, n + 1),
        "spent": step * np.arange(1, n + 1),
        "answers": tuple("7" if one else f"{k}" for k, one in enumerate(right)),
        "right": right,
        "confidence": np.where(right, 0.99, 0.5),
        "trial": np.full(n, 3),
        "margin": np.where(right, 1.0, 9.0),
        "transition": np.arange(n) % 2 == 0,
        "candidates": right.astype(np.int64),
        "score": np.where(right, 0.9, 0.1),
        "total": step * (n + 1),
        "finished": finished,
    }
    return ExitSignals(**{**about, **more})


def test_each_rule_stops_where_its_signal_says_so():
    one = [signals(known=1)]
    at = {"probe": (0.5, 20), "closing margin": (-1.0, 20), "stated answers": (1.0, 20), "fixed budget": (25.0, 30)}
    for name, (threshold, tokens) in at.items():
        found = outcomes(BY_NAME[name], one, threshold)
        assert found.tokens.tolist() == [tokens] and found.right.tolist() == [1.0], name
    doubt = outcomes(BY_NAME["confidence before a doubt"], one, 0.9)
    assert doubt.tokens.tolist() == [30 + 2 * 3]  # only at cuts 0 and 2 a doubt follows, and both tries are paid
    stable = outcomes(BY_NAME["stable answers"], one, 2.0)
    assert stable.tokens.tolist() == [30 + 3 * 3]  # the same answer twice, at cuts 1 and 2
    never = outcomes(BY_NAME["probe"], one, float("inf"))
    assert never.tokens.tolist() == [60] and never.right.tolist() == [1.0]
    tried = outcomes(BY_NAME["stable answers"], one, float("inf"))
    assert tried.tokens.tolist() == [60 + 5 * 3]


def test_a_rule_never_stops_at_an_undefined_number():
    assert stopping_cut(np.array([np.nan, 0.2, 0.9]), 0.5) == 2
    assert stopping_cut(np.array([np.nan]), -1.0) is None
    assert thresholds(BY_NAME["closing margin"], [signals(margin=np.full(5, np.nan))]) == [float("inf")]
    silent = [signals(i, score=np.full(5, np.nan)) for i in range(4)]
    report = exit_report(silent[:2], silent[2:], n_resamples=50)
    assert "probe" not in {point.rule for point in report.points}
    without = signals(answers=(None, None, "7", None, "7"))
    assert outcomes(BY_NAME["stable answers"], [without], 1.0).tokens.tolist() == [30 + 3 * 3]


def test_the_threshold_is_the_cheapest_that_keeps_the_accuracy():
    many = [signals(i, known=1 + i % 3) for i in range(9)]
    assert calibrate(BY_NAME["probe"], many, 0.0) == pytest.approx(0.9)
    assert calibrate(FIXED_BUDGET, many, 0.0) == 40  # all know the answer after four cuts
    assert calibrate(FIXED_BUDGET, many, 0.34) == 30  # a third does not after three
    wrong = [replace(one, right=np.zeros(5, dtype=bool)) for one in many]
    assert calibrate(BY_NAME["probe"], wrong, 0.1) == float("inf")


def test_a_rule_that_knows_saves_tokens_and_one_that_does_not_saves_none():
    rng = np.random.default_rng(0)
    known = rng.integers(0, 8, size=80)
    many = [signals(i, known=k, n=8) for i, k in enumerate(known)]
    blind = [replace(one, score=rng.random(8)) for one in many]
    for side, clear in ((many, True), (blind, False)):
        report = exit_report(side[:40], side[40:], n_resamples=300, seed=1)
        probe, budget = (next(p for p in report.at(0.02) if p.rule == name) for name in ("probe", "fixed budget"))
        assert (probe.budget_saving.low > 0.15) == clear
        assert not (budget.budget_saving.low > 0)
        assert report.whole[0].value == 1 and report.whole[1].value == 90
    report = exit_report(many[:40], many[40:], n_resamples=300)
    probe = next(p for p in report.at(0.0) if p.rule == "probe")
    assert probe.accuracy.value == 1 and probe.change.low <= 0 <= probe.change.high
    assert probe.tokens.value == pytest.approx(np.mean([10 * (k + 1) for k in known[40:]]))
    assert probe.random[1] < 0.8 and probe.random_tokens == pytest.approx(probe.tokens.value)


def test_thresholds_are_judged_on_other_problems():
    one, two, three = signals(0), signals(1), signals(2)
    with pytest.raises(InputError, match="'p0' is calibrated on and judged"):
        exit_report([one, two], [three, one])
    with pytest.raises(InputError, match="fewer than two groups"):
        exit_report([one], [two, three])


def test_live_runs_stand_in_the_same_report():
    many = [signals(i, known=1 + i % 3) for i in range(8)]
    live = {"live": Outcomes(right=np.ones(4), tokens=np.full(4, 30.0))}
    report = exit_report(many[:4], many[4:], live=live, n_resamples=100)
    point = report.points[-1]
    assert point.rule == "live" and point.tokens.value == 30 and point.saving.value == pytest.approx(0.5)
    assert point in report.at(0.02) and point in report.at(0.1)


def test_thoughts_that_were_right_before_they_went_on():
    ends_right = [signals(i, known=1) for i in range(2)]  # doubts follow cuts 0, 2 and 4
    ends_wrong = [signals(2, known=3, finished=False), signals(3, known=9, finished=False)]
    found = thoughts([*ends_right, *ends_wrong])
    assert found.right_before_going_on.value == pytest.approx((2 + 2 + 1 + 0) / 12)
    assert found.overthinking.value == pytest.approx(1 - 20 / 60)
    assert found.underthinking.value == pytest.approx((1 - 40 / 60) / 2)
    assert thoughts(ends_right).underthinking is None


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    problems = load_problems("ledger:brief", n=12)
    path = tmp_path_factory.mktemp("exits") / "run"
    return record(model, problems, path, sites=["resid_post.4"], sampling=Sampling(temperature=0.7, max_new_tokens=160))


def test_the_signals_of_a_trace_are_what_the_model_says_at_its_cuts(model, run):
    trace = max(run, key=lambda one: one.n_thinking_tokens)
    points, found = exit_points(trace), exit_signals(model, PrefixWriter(model), trace)
    assert found.cuts.tolist() == list(points.cuts) and len(points.cuts) >= 2
    assert all(trace.tokens.thinking.start < cut < trace.tokens.thinking.stop for cut in points.cuts)
    assert len(exit_points(trace, most=2).cuts) == 2
    assert found.total == trace.n_thinking_tokens and (np.diff(found.spent) > 0).all()
    assert ((found.confidence > 0) & (found.confidence <= 1)).all() and (found.margin >= 0).all()
    stub = model.tokenizer.encode("\n</think>\n\nThe answer is \\boxed{", add_special_tokens=False)
    for cut, answer, right in zip(found.cuts, found.answers, found.right, strict=True):
        prompt = [*trace.token_ids[:cut].tolist(), *stub]
        (said,) = generate(model, [prompt], Sampling(temperature=0.0, max_new_tokens=32), seeds=[0])
        text = model.tokenizer.decode(said.token_ids[len(prompt) :].tolist())
        assert boxed_answer(f"\\boxed{{{text}") == answer
        assert right == (answer is not None and equivalent(answer, trace.problem.answer))


def test_the_whole_study_runs_on_a_run_and_says_what_it_found(model, run):
    study = early_exits(run, model, held_out=0.5, most=6, seed=0, live={"live": run})
    live = study.report.points[-1]
    assert live.saving.value == 0 and live.change.value == 0  # nothing stopped that run
    said = exit_summary(study)
    text = str(said)
    assert "whole thinking" in text and "fixed budget" in text and "Thresholds come from" in text
    assert len(said.rows[0]) == len(said.columns)
    assert {trace.name for trace in exit_frontier(study.report).data} >= {
        "every fixed budget",
        "whole thinking",
        "live",
    }
    again = early_exits(run, model, held_out=0.5, most=6, seed=0, live={"live": run})
    assert str(again.report) == str(study.report)
    with pytest.raises(InputError, match="gold answer"):
        bare = [replace(trace, correct=None, problem=replace(trace.problem, answer=None)) for trace in run]
        early_exits(FakeStore(bare), model)


def test_the_command_saves_numbers_a_figure_and_the_probe_for_a_monitor(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder / "store")
    asked = ["steer", "exit", "--run", str(folder), "--cuts", "4"]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0 and "against the best fixed budget" in done.stdout
    kept = json.loads((folder / "numbers" / "exit.json").read_text(encoding="utf-8"))
    assert {rule["tolerance"] for rule in kept["numbers"]["rules"]} == {0.0, 0.02, 0.05, 0.1}
    assert (folder / "figures" / "exit_frontier.html").exists()
    probe = LinearProbe.load(folder / "probes" / "exit.safetensors")
    judged = {trace.problem.group for trace in run} - set(probe.provenance["learned_from"])
    assert len(judged) == 6  # the half that the rules are judged on
    by_probe = next(r for r in kept["numbers"]["rules"] if r["rule"] == "probe" and r["tolerance"] == 0.02)
    said = "".join(done.stdout.split())
    assert ("--stop-atparagraph" in said) == (by_probe["stopped"] > 0)  # the recording that its threshold is for


class FakeStore(list):
    """Traces in place of a store."""
