"""Early exits: rules on hand-made signals, thresholds that are judged on other problems, and the whole of it on the organism."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reasonscope.analysis.exits.evaluation import _outcomes, calibrate, exit_report, thoughts
from reasonscope.analysis.exits.live import live_outcomes
from reasonscope.analysis.exits.outcomes import Outcomes, outcomes_at, thresholds
from reasonscope.analysis.exits.probe import false_alarm_threshold, fit_exit_probe
from reasonscope.analysis.exits.run import ExitStudy, _scored, early_exits
from reasonscope.analysis.exits.signals import ExitSignals, exit_signals
from reasonscope.analysis.exits.summary import exit_summary
from reasonscope.analysis.figures import exit_frontier
from reasonscope.analysis.studies.steps.exits import ExitStep
from reasonscope.app.cli import app
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.intervals import Estimate
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.text.answers import equivalent
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.branches import SequenceWriter
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.forced_answers import _boxed_answer
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.steering import SteeringVector
from reasonscope.steering.decoding.monitor import EXIT_TARGET, _left_alone
from reasonscope.steering.exits.places import Places
from reasonscope.steering.exits.rules import FIXED_BUDGET, PROBE, RULES, rule_named, slug, stopping_place
from reasonscope.steering.exits.signals import PlaceReader, closing_ids
from reasonscope.steering.experiments.held_out import split_run
from reasonscope.steering.recipes.controls import exit_part
from reasonscope.steering.recipes.following import follow
from reasonscope.steering.recipes.recipe import Recipe, RecipePart

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
        "draw": np.linspace(0.1, 0.9, n),
        "total": step * (n + 1),
        "finished": finished,
    }
    return ExitSignals(**{**about, **more})


def test_each_rule_stops_where_its_signal_says_so():
    one = [signals(known=1)]
    at = {"probe": (0.5, 20), "closing margin": (-1.0, 20), "stated answers": (1.0, 20), "fixed budget": (25.0, 30)}
    assert _outcomes(BY_NAME["random stops"], one, 0.5).tokens.tolist() == [30]
    for name, (threshold, tokens) in at.items():
        found = _outcomes(BY_NAME[name], one, threshold)
        assert found.tokens.tolist() == [tokens] and found.right.tolist() == [1.0], name
    doubt = _outcomes(BY_NAME["confidence before a doubt"], one, 0.9)
    assert doubt.tokens.tolist() == [30 + 2 * 3]  # only at cuts 0 and 2 a doubt follows, and both tries are paid
    stable = _outcomes(BY_NAME["stable answers"], one, 2.0)
    assert stable.tokens.tolist() == [30 + 3 * 3]  # the same answer twice, at cuts 1 and 2
    never = _outcomes(BY_NAME["probe"], one, float("inf"))
    assert never.tokens.tolist() == [60] and never.right.tolist() == [1.0]
    again = signals(answers=("7", "7", "8", "8", "8"))
    thrice = _outcomes(BY_NAME["stable answers"], [again], 3.0)
    assert thrice.tokens.tolist() == [50 + 5 * 3]
    assert {name for name, rule in BY_NAME.items() if rule.passes} == {"confidence before a doubt", "closing margin"}
    assert rule_named("stable-answers") is BY_NAME["stable answers"] and slug("stable answers") == "stable-answers"
    tried = _outcomes(BY_NAME["stable answers"], one, float("inf"))
    assert tried.tokens.tolist() == [60 + 5 * 3]


def test_a_rule_never_stops_at_an_undefined_number():
    assert stopping_place(np.array([np.nan, 0.2, 0.9]), 0.5) == 2
    assert stopping_place(np.array([np.nan]), -1.0) is None
    assert thresholds(BY_NAME["closing margin"], [signals(margin=np.full(5, np.nan))]) == [float("inf")]
    silent = [signals(i, score=np.full(5, np.nan)) for i in range(4)]
    report = exit_report(silent[:2], silent[2:], n_resamples=50)
    assert "probe" not in {point.rule for point in report.points}
    without = signals(answers=(None, None, "7", None, "7"))
    assert _outcomes(BY_NAME["stable answers"], [without], 1.0).tokens.tolist() == [30 + 3 * 3]


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
        assert (probe.budget_saving_p < 0.01) == clear
        assert report.whole[0].value == 1 and report.whole[1].value == 90
    report = exit_report(many[:40], many[40:], n_resamples=300)
    probe = next(p for p in report.at(0.0) if p.rule == "probe")
    assert probe.accuracy.value == 1 and probe.change.low <= 0 <= probe.change.high
    assert probe.tokens.value == pytest.approx(np.mean([10 * (k + 1) for k in known[40:]]))
    assert probe.random[1] < 0.8 and probe.random_tokens == pytest.approx(probe.tokens.value)


def study_of(report, **more):
    about = {"judged": (), "calibrated": (), "fitted": None, "probe": None, "without_probe": "", "n_kept": 0}
    return ExitStudy(report=report, places=("paragraph", 4), seed=0, n_traces=8, **{**about, **more})


def test_the_best_rule_is_named_only_if_it_saves_whichever_rule_is_looked_at():
    many = [signals(i, known=1 + i % 3) for i in range(8)]
    report = exit_report(many[:4], many[4:], n_resamples=100)
    n = len(report.at(0.02)) - 1  # without the fixed budgets

    def finding(p, low=0.01):
        points = tuple(
            replace(
                one,
                budget_saving=Estimate(value=0.1, low=low, high=0.2),
                budget_saving_p=p if one.rule == "probe" else 0.9,
            )
            for one in report.points
        )
        said = exit_summary(study_of(replace(report, points=points)))
        assert (
            f"The best of {n} rules is named, so it has to save in all but 0.025 / {n} of the resamples." in said.notes
        )
        return said.finding

    assert n == 6
    assert finding(0.025 / n - 1e-9).startswith("Stopping by “probe” saves 10 %")
    assert finding(0.025 / n + 1e-4).startswith("No rule clearly saves tokens")
    assert finding(0.001, low=0.0).startswith("No rule clearly saves tokens")


def test_a_saving_below_nothing_is_not_called_the_most_that_is_saved():
    never = [signals(i, known=9, finished=False) for i in range(8)]
    report = exit_report(never[:4], never[4:], n_resamples=100)
    loss = Estimate(value=-0.04, low=-4.28, high=-0.01)
    report = replace(report, points=tuple(replace(one, budget_saving=loss) for one in report.points))
    assert exit_summary(study_of(report)).finding == (
        "No rule saves tokens against the best fixed budget of equal accuracy, at a tolerance of 0.02: "
        "the best, stopping by “probe”, comes to −4 % [−428, −1]."
    )


def test_the_finding_leaves_out_a_live_run_whose_tokens_are_not_all_known():
    many = [signals(i, known=1 + i % 3) for i in range(8)]
    live = {"live": Outcomes(right=np.ones(4), tokens=np.ones(4))}
    report = exit_report(many[:4], many[4:], live=live, n_resamples=500)
    assert exit_summary(study_of(report)).finding.startswith("Stopping by “live” saves")
    said = exit_summary(study_of(report, uncounted={"live": "the run has lost its recipe"}))
    assert "“live”" not in said.finding and said.rows[-1][0] == "live"
    assert any("“live” lacks the tokens" in note and "lost its recipe" in note for note in said.notes)
    assert any("The best of 6 rules" in note for note in said.notes)


def test_a_tolerance_has_thresholds_of_its_own_or_is_refused():
    many = [signals(i, known=1 + i % 3) for i in range(8)]
    report = exit_report(many[:4], many[4:], tolerances=(0.02, 0.3), n_resamples=50)
    assert len(report.at(0.3)) == len(report.at(0.02)) == 7
    assert "cost at most 0.3 of accuracy" in str(exit_summary(study_of(report), tolerance=0.3))
    with pytest.raises(InputError, match=r"no threshold was chosen at a tolerance of 0.03; choose from 0.02, 0.3"):
        exit_summary(study_of(report), tolerance=0.03)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="from 0 to 1"):
            early_exits(FakeStore(), None, tolerance=wrong)
        with pytest.raises(InputError, match="from 0 to 1"):
            ExitStep(exit="run", tolerance=wrong)


def test_thresholds_are_judged_on_other_problems():
    one, two, three = signals(0), signals(1), signals(2)
    with pytest.raises(InputError, match="'p0' is calibrated on and judged"):
        exit_report([one, two], [three, one])
    with pytest.raises(InputError, match="fewer than two groups"):
        exit_report([one], [two, three])


def test_false_alarms_are_calibrated_on_problems_that_the_probe_never_saw():
    rng = np.random.default_rng(0)
    many = [signals(i, score=rng.random(5).round(4), right=np.arange(5) > 2) for i in range(60)]
    probe = LinearProbe(
        coef=np.ones(2), intercept=0.0, site=Site("resid_post", 0), task="binary", method="test", model={},
        provenance={"learned_from": ["p99"], "target": EXIT_TARGET},
    )  # fmt: skip
    threshold = false_alarm_threshold(probe, many, false_alarms=0.1)
    highest = np.array([one.score[:3].max() for one in many])
    assert np.mean(highest >= threshold) <= 0.1 < np.mean(highest >= threshold - 0.05)
    for learned in ([], ["p3"]):
        with pytest.raises(InputError, match="that the probe did not learn from"):
            false_alarm_threshold(replace(probe, provenance={"learned_from": learned}), many, false_alarms=0.1)
    with pytest.raises(InputError, match="`reasonscope steer exit --run OTHER --probe PROBE --false-alarms"):
        _left_alone(probe, [])


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
    places = Places.of(model)
    found = exit_signals(PlaceReader(model), places, trace)
    assert len(found.cuts) >= 2 and found.spent.tolist() == [cut - trace.tokens.thinking.start for cut in found.cuts]
    assert all(trace.tokens.thinking.start < cut < trace.tokens.thinking.stop for cut in found.cuts)
    assert all(model.tokenizer.decode(trace.token_ids[:cut]).endswith("\n\n") for cut in found.cuts)
    assert (np.diff(Places.of(model, every=30).of_trace(trace)[1]) >= 30).all()
    sentences = Places.of(model, kind="sentence").of_trace(trace)[0]
    assert set(found.cuts.tolist()) <= set(sentences)
    assert found.total == trace.n_thinking_tokens and (np.diff(found.spent) > 0).all()
    assert ((found.confidence > 0) & (found.confidence <= 1)).all() and (found.margin >= 0).all()
    closing = model.tokenizer.encode("\n</think>", add_special_tokens=False)
    for cut, margin in zip(found.cuts, found.margin, strict=True):
        text = torch.tensor([[*trace.token_ids[:cut].tolist(), *closing]])
        logits = model.backend.forward(text, mask=None).logits[0, cut - 1 : -1].float()
        below = [float(row.max() - row[token]) for row, token in zip(logits, closing, strict=True)]
        assert margin == pytest.approx(sum(below), abs=2e-3)
    assert ((found.draw >= 0) & (found.draw < 1)).all() and len(set(found.draw)) == len(found.draw)
    later = found.then(found)
    assert later.answers == found.answers * 2 and later.spent.tolist() == found.spent.tolist() * 2
    stub = model.tokenizer.encode("\n</think>\n\nThe answer is \\boxed{", add_special_tokens=False)
    for cut, answer, right in zip(found.cuts, found.answers, found.right, strict=True):
        prompt = [*trace.token_ids[:cut].tolist(), *stub]
        (said,) = generate(model, [prompt], Sampling(temperature=0.0, max_new_tokens=32), seeds=[0])
        text = model.tokenizer.decode(said.token_ids[len(prompt) :].tolist())
        assert _boxed_answer(f"\\boxed{{{text}") == answer
        assert right == (answer is not None and equivalent(answer, trace.problem.answer))


def test_places_are_inside_the_thinking_that_was_written(model, run):
    """Neither in the prompt nor at the very end of a text that was cut off there, and a single token may end a thought."""
    trace = max(run, key=lambda one: one.n_thinking_tokens)
    places = Places.of(model)
    cuts, spent = places.of_trace(trace)
    cut_off = SimpleNamespace(token_ids=trace.token_ids[: cuts[1]], n_prompt_tokens=trace.n_prompt_tokens)
    assert places.of_trace(cut_off) == (cuts[:1], spent[:1])
    prefilled = SimpleNamespace(token_ids=trace.token_ids, n_prompt_tokens=cuts[0])
    assert places.of_trace(prefilled) == (cuts[1:], spent[1:])
    pieces = [model.tokenizer.decode([i]) for i in range(model.vocabulary)]
    assert places.ends.tolist() == ["\n\n" in piece for piece in pieces]
    ends = int(places.ends.nonzero()[0, 0])
    assert places.ended(torch.tensor([[ends], [places.ends.int().argmin()]])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("is 3.14. So", ["is 3.14. So"]),
        ("is 3.14\n", []),
        ("is 42. So", ["is 42. So"]),
        ("is 42.\n\nSo", ["is 42.\n\n"]),
        ("is 42! So", ["is 42!"]),
        ("is so. So", ["is so."]),
        ("file2.py", []),
    ],
)
def test_a_full_stop_after_a_digit_ends_a_sentence_once_white_space_follows(model, text, sentences):
    ids = model.encode_continuation(text)
    places = Places.of(model, kind="sentence")
    assert [model.decode([i]) for i in ids][-1] != text  # one token cannot tell
    ended = [model.decode(ids[:n]) for n in range(1, len(ids) + 1) if places.ended(torch.tensor([ids[:n]]))[0]]
    assert ended == sentences
    assert not any(mask.any() for mask in (Places.of(model).stop, Places.of(model).digit, Places.of(model).blank))


def test_a_finished_text_and_one_that_is_written_have_the_same_sentences(model, doubting):
    places = Places.of(model, kind="sentence", every=1)
    trace = max(doubting, key=lambda one: one.n_thinking_tokens)
    ids = torch.from_numpy(trace.token_ids)[None]
    live = [n for n in range(1, ids.shape[1]) if places.ended(ids[:, :n])[0]]
    inside = [n for n in live if n > trace.n_prompt_tokens and places.written(ids[0, :n]) > 0]
    assert places.of_trace(trace)[0] == inside and len(inside) > 3


def test_a_probe_of_one_half_of_a_run_is_calibrated_and_judged_on_the_other(model, run):
    """`probe correctness --held-out 0.5` and this share one way to split, so the half that is left has to be split again."""
    learned = {run.trace(id).problem.group for id in split_run(run, share=0.5, n=None, seed=0).ids}
    probe = LinearProbe(
        coef=np.ones(model.d_model), intercept=0.0, site=Site("resid_post", 4), task="binary", method="test",
        model=model.fingerprint, provenance={"learned_from": sorted(learned)},
    )  # fmt: skip
    study = early_exits(run, model, probe=probe, held_out=0.5, tolerance=0.03)
    judged = {run.trace(id).problem.group for id in study.judged}
    assert len(judged) == len(study.calibrated) == 3 and not judged & set(study.calibrated)
    assert not learned & {*judged, *study.calibrated}
    assert {point.tolerance for point in study.report.points} == {0.0, 0.02, 0.05, 0.1, 0.03}
    assert "at most 0.03 of accuracy" in str(exit_summary(study, tolerance=0.03))


def test_thinking_without_places_on_the_side_of_the_thresholds_is_said(model, run):
    last = {trace.id: max(Places.of(model).of_trace(trace)[1], default=0) for trace in run}
    longest = max(last, key=last.__getitem__)
    sides = ((seed, split_run(run, share=0.5, n=None, seed=seed).ids) for seed in range(20))
    seed, learn = next((seed, ids) for seed, ids in sides if longest not in ids)
    every = 1 + max(last[id] for id in learn)
    assert Places.of(model, every=every).of_trace(run.trace(longest))[0]
    with pytest.raises(InputError, match="no thinking that thresholds come from has the end of a paragraph"):
        early_exits(run, model, every=every, seed=seed)


@pytest.mark.parametrize(("rule", "threshold"), [("stable answers", 2), ("confidence before a doubt", 0.5)])
def test_a_live_run_pays_for_the_answers_that_its_rule_forced(rule, threshold, model, doubting, tmp_path):
    recipe = Recipe(name="stop", controls=(exit_part(rule, threshold),), provenance={"groups": []})
    problems = list({trace.problem.id: trace.problem for trace in doubting}.values())
    sampling = Sampling(temperature=0.7, max_new_tokens=200)
    live = record(model, problems, tmp_path / "live", sampling=sampling, steer=recipe)
    reader, judged = PlaceReader(model), list(doubting)
    signals = [exit_signals(reader, Places.of(model), trace) for trace in judged]
    stops = [stopping_place(BY_NAME[rule].statistic(one), threshold) for one in signals]
    tries = _outcomes(BY_NAME[rule], signals, threshold).tokens - outcomes_at(signals, stops).tokens
    written = [len(live.trace(trace.id).written_thinking) for trace in judged]
    found, why_not = live_outcomes(live, judged, model, reader)
    assert (found.tokens - written).tolist() == tries.tolist() and tries.sum() > 0 and not why_not
    pushed = SteeringVector(directions={Site("resid_post", 3): np.ones(model.d_model, dtype=np.float32)}, method="test")
    push = RecipePart(vector=replace(pushed, provenance={"groups": []}), scope={"on": "think"})
    replace(recipe, parts=(push,)).save(live.recipe)
    assert live_outcomes(live, judged, model, reader)[1] == "vectors steered the model that wrote them"
    live.recipe.unlink()
    found, why_not = live_outcomes(live, judged, model, reader)
    assert found.tokens.tolist() == written and why_not == "the run has lost its recipe"


def test_the_whole_study_runs_on_a_run_and_says_what_it_found(model, run):
    study = early_exits(run, model, held_out=0.5, seed=0, live={"live": run})
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
    again = early_exits(run, model, held_out=0.5, seed=0, live={"live": run})
    assert str(again.report) == str(study.report)
    with pytest.raises(InputError, match="gold answer"):
        bare = [replace(trace, correct=None, problem=replace(trace.problem, answer=None)) for trace in run]
        early_exits(FakeStore(bare), model)


def test_a_live_run_is_not_judged_on_problems_that_its_monitor_learned_from(model, run):
    judged = list(run)[:2]
    groups = [trace.problem.group for trace in judged]

    def stopped(**about):
        store = FakeStore(judged)
        store.path, store.ids, store.trace = run.path, [trace.id for trace in judged], run.trace
        store.meta, store.recipe = {"monitor": {"stop_above": 0.5, **about}}, None
        return store

    reader = PlaceReader(model)
    found, why_not = live_outcomes(stopped(learned_from=["elsewhere"]), judged, model, reader)
    assert found.tokens.tolist() == [len(trace.written_thinking) for trace in judged] and not why_not
    with pytest.raises(InputError, match=f"learned from 1 of the problems to judge on .'{groups[1]}'"):
        live_outcomes(stopped(learned_from=groups[1:]), judged, model, reader)
    with pytest.raises(InputError, match="does not say which problems it learned from"):
        live_outcomes(stopped(), judged, model, reader)


def test_the_command_saves_numbers_a_figure_and_the_probe_for_a_monitor(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder / "store")
    asked = ["steer", "exit", "--run", str(folder), "--at", "fixed budget=40"]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0 and "against the best fixed budget" in done.stdout
    kept = json.loads((folder / "numbers" / "exit.json").read_text(encoding="utf-8"))
    assert {rule["tolerance"] for rule in kept["numbers"]["rules"]} == {None, 0.0, 0.02, 0.05, 0.1}
    assert (folder / "figures" / "exit_frontier.html").exists()
    probe = LinearProbe.load(folder / "probes" / "exit.safetensors")
    judged = {trace.problem.group for trace in run} - set(probe.provenance["learned_from"])
    assert len(judged) == 6  # the half that the rules are judged on
    own = next(r for r in kept["numbers"]["rules"] if r["rule"] == "fixed budget = 40")
    assert own["threshold"] == 40 and own["tolerance"] is None
    recipe = Recipe.load(folder / "steering" / "exit-fixed-budget-40.recipe.safetensors")
    assert recipe.controls[0].settings["threshold"] == 40 and not judged & set(recipe.provenance["groups"])
    assert "kept from before" not in done.stdout
    again = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert "The forced answers of 12 of 12 traces were kept from before" in " ".join(again.stdout.split())
    same = json.loads((folder / "numbers" / "exit.json").read_text(encoding="utf-8"))
    assert same["numbers"] == kept["numbers"]
    wrong = CliRunner().invoke(app, [*asked, "--at", "patience=3"])
    assert isinstance(wrong.exception, InputError) and "no exit rule is called 'patience'" in str(wrong.exception)


@pytest.fixture(scope="module")
def doubting(model, tmp_path_factory):
    """Whole ledgers, in which the organism doubts and checks."""
    path = tmp_path_factory.mktemp("exits") / "doubting"
    problems = load_problems("ledger", n=8, seed=3)
    return record(model, problems, path, sites=["resid_post.4"], sampling=Sampling(temperature=0.7, max_new_tokens=200))


# Rules that count have a threshold here; that of the others is reached at every fifth place or so.
COUNTS = {"stable answers": 2, "stated answers": 1, "fixed budget": 45}


@pytest.mark.parametrize("rule", [rule.name for rule in (*RULES, FIXED_BUDGET)])
def test_a_recipe_stops_a_model_at_the_token_at_which_the_rule_stops_the_finished_text(rule, model, doubting, tmp_path):
    """One evaluator: the model that writes and its finished text are stopped at the same token, whatever the batch."""
    kind = (
        "sentence" if rule == "stated answers" else "paragraph"
    )  # the organism states its answer in the last sentence
    reader, places, named = PlaceReader(model, seed=3), Places.of(model, kind=kind), rule_named(rule)
    signals, probe = [exit_signals(reader, places, trace) for trace in doubting], None
    if rule == PROBE:
        fitted = fit_exit_probe(doubting, signals, [Site("resid_post", 4)], folds=3)
        probe, signals = fitted.probe, _scored(fitted.probe, doubting, signals)
    values = np.concatenate([named.statistic(one) for one in signals])
    threshold = COUNTS.get(rule, float(np.nanquantile(values, 0.8, method="nearest")))
    recipe = Recipe(name="stop", controls=(exit_part(rule, threshold, probe=probe, kind=kind, seed=3),))
    recipe.save(tmp_path / "stop.recipe.safetensors")
    recipe = Recipe.load(tmp_path / "stop.recipe.safetensors")
    problems = list({trace.problem.id: trace.problem for trace in doubting}.values())
    sampling = Sampling(temperature=0.7, max_new_tokens=200)
    live = record(model, problems, tmp_path / "live", sampling=sampling, batch_size=3, steer=recipe)
    stops = {one.trace: stopping_place(named.statistic(one), threshold) for one in signals}
    assert sum(at is not None for at in stops.values()) > 1
    close = list(closing_ids(model))
    decided = read_scores(tmp_path / "live-results" / "scores" / f"control-exit-{slug(rule)}.safetensors")
    for one, plain in zip(signals, doubting, strict=True):
        stopped, at = live.trace(one.trace), stops[one.trace]
        cut = len(plain.token_ids) if at is None else int(one.cuts[at])
        assert stopped.token_ids[:cut].tolist() == plain.token_ids[:cut].tolist()
        assert at is None or stopped.token_ids[cut : cut + len(close)].tolist() == close
        line, seen = decided.scores[one.trace], one.cuts[: None if at is None else at + 1] - 1
        told = named.statistic(one)[: len(seen)]
        known = np.isfinite(told)
        assert np.flatnonzero(np.isfinite(line)).tolist() == seen[known].tolist()
        np.testing.assert_allclose(line[seen[known]], told[known], rtol=1e-5)


def test_an_exit_rule_and_a_vector_in_one_recipe_force_answers_of_the_steered_model(model, run, tmp_path):
    drawn = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(directions={Site("resid_post", 3): 8 * drawn}, method="by hand")
    push = Recipe(name="push", parts=(RecipePart(vector=vector, scope={"on": "think"}),))
    problems = list({trace.problem.id: trace.problem for trace in run}.values())[:3]
    sampling = Sampling(temperature=0.7, max_new_tokens=120)
    steered = record(model, problems, tmp_path / "steered", sampling=sampling, steer=push)
    both = push.merged(Recipe(name="stop", controls=(exit_part("stable answers", 2),)))
    stopped = record(model, problems, tmp_path / "both", sampling=sampling, steer=both)
    places, named = Places.of(model), rule_named("stable answers")
    for trace in steered:
        prompt = trace.token_ids[: trace.n_prompt_tokens].tolist()
        cuts, spent = places.of_trace(trace)
        ids = trace.token_ids.tolist()
        with follow(model, push, [prompt]):
            reader = PlaceReader(model, writer=SequenceWriter(model))
            found = reader.forced(reader.read(ids, cuts, spent, margins=False), ids, cuts)
        at = stopping_place(named.statistic(found), 2)
        cut = len(ids) if at is None else cuts[at]
        assert stopped.trace(trace.id).token_ids[:cut].tolist() == ids[:cut]
        assert at is None or stopped.trace(trace.id).token_ids[cut] == closing_ids(model)[0]


class FakeStore(list):
    """Traces in place of a store."""
