"""The four reports answer by one protocol; their sentence says both verdicts; an error names a remedy that helps."""

import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from reasonscope import probes
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.intervals import Estimate
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.problems import ledger_of, request_of
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.organism.writer import closing_sentence, write_ledger, write_request
from reasonscope.data.ranks import spearman
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.text.parse import build_trace
from reasonscope.probes.evaluation.comparison import Comparison, compare
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap, difference_to_best
from reasonscope.probes.evaluation.permutation_null import Null
from reasonscope.probes.properties.report import ProbeReport, class_shortage, truncation_notes
from reasonscope.probes.properties.request_outcomes import CONTRASTS

REFUSAL_ALONE = {"refusal": CONTRASTS["refusal"]}
REPORTS = {
    "length": (probes.length, "ledgers"),
    "remaining": (partial(probes.remaining, per_trace=2), "ledgers"),
    "refusal": (partial(probes.refusal, contrasts=REFUSAL_ALONE), "requests"),
    "correctness": (probes.correctness, "ledgers"),
}


def written(problem, bpe, rng):
    """A trace of the grammar; half of the answers to ledgers are wrong."""
    if problem.answer is None:
        writing = write_request(request_of(problem), rng)
        answer = writing.answer
    else:
        writing = write_ledger(ledger_of(problem), "default", rng)
        answer = closing_sentence(int(problem.answer) + rng.randrange(2))
    prompt, completion = chat(problem.messages[0].content, writing.thinking, answer)
    given, made = bpe.encode(prompt).ids, bpe.encode(completion).ids
    return build_trace(
        id=f"{problem.id}/0", problem=problem, token_ids=given + made, n_prompt_tokens=len(given), tokenizer=bpe
    )


@pytest.fixture(scope="module")
def traces():
    bpe, rng = train_tokenizer(tokenizer_texts(0, 50)), random.Random(0)
    return {
        kind: [written(problem, bpe, rng) for problem in load_problems(source, n=n)]
        for kind, source, n in (("ledgers", "ledger", 30), ("requests", "requests", 80))
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory, traces):
    """Every token knows length, refusal and correctness; there is no first layer to be a baseline."""
    noise, made = np.random.default_rng(0), {}
    for kind, own in traces.items():
        states = [noise.standard_normal((len(trace.token_ids) - 1, 4)).astype(np.float32) for trace in own]
        for trace, rows in zip(own, states, strict=True):
            rows[:, 0] += 5 * np.log(trace.n_thinking_tokens)
            rows[:, 1] += 5 * (behaviour(trace) == "refused")
            rows[:, 2] += 5 * bool(trace.correct)
        made[kind] = TraceStore.create(tmp_path_factory.mktemp(kind) / "store", sites=["resid_post.1"])
        made[kind].append(own, {"resid_post.1": states})
    return made


@pytest.fixture(scope="module", params=REPORTS)
def report(request, stores) -> ProbeReport:
    measure, kind = REPORTS[request.param]
    return measure(stores[kind], folds=3, seed=1)


def test_every_report_answers_by_the_same_protocol(report):
    found = report.comparison
    assert found.metric in ("Spearman", "AUROC")
    assert found.score.low <= found.score.value <= found.score.high
    assert {"prompt_length", "bag_of_words"} < found.baselines.keys()
    assert found.beats == (found.difference.low > 0)
    best = found.baselines[found.best_baseline].value
    assert found.difference.value == pytest.approx(found.score.value - best)
    text = max(found.baselines[name].value for name in ("prompt_length", "bag_of_words"))
    assert found.text_difference.value == pytest.approx(found.score.value - text)
    assert str(report.probe.site) == "resid_post.1"
    assert report.n_groups >= found.n_groups > 1
    assert found.n_problems >= found.n_groups


def test_its_numbers_are_plain_json_and_hold_the_comparison(report):
    numbers = report.to_dict()
    again = json.loads(json.dumps(numbers))
    comparison = again["comparison"]
    assert comparison["score"] == report.comparison.score.to_dict()
    assert comparison["metric"] == report.comparison.metric
    assert comparison["baselines"].keys() == report.comparison.baselines.keys()
    assert comparison["shuffled"].keys() == {"observed", "mean", "highest", "p_value", "n_permutations"}
    assert again["probe"]["site"] == "resid_post.1"
    assert again["n_groups"] == report.n_groups


def test_its_summary_says_what_was_found_and_against_what(report):
    summary, found = report.summary(), report.comparison
    assert f"({found.metric} " in summary.finding and f"{found.n_problems} problems" in summary.finding
    assert summary.finding.endswith(".") and "\n" not in summary.finding
    names = [row[0] for row in summary.rows]
    assert names[0] == "probe" and "bag of words" in names and "probe − best baseline" in names
    assert any(name.startswith("shuffled labels") for name in names)
    assert {len(row) for row in summary.rows} == {len(summary.columns)}


def test_difficulty_is_among_the_baselines_where_the_problems_state_it(stores):
    for name in ("length", "remaining", "correctness"):
        measure, kind = REPORTS[name]
        assert "difficulty" in measure(stores[kind], folds=3).comparison.baselines


def comparison(score, baselines, *, p_value=1 / 21, spread=0.03, metric="Spearman", n_groups=240):
    best = max(baselines.values())
    return Comparison(
        metric=metric,
        score=Estimate(value=score, low=score - spread, high=score + spread),
        baselines={name: Estimate(value=value, low=value, high=value) for name, value in baselines.items()},
        difference=Estimate(value=score - best, low=score - best - spread, high=score - best + spread),
        text_difference=None,
        shuffled=Null(observed=score, null=np.zeros(20), p_value=p_value),
        metrics={},
        n_rows=240,
        n_problems=240,
        n_groups=n_groups,
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            comparison(0.92, {"prompt_length": 0.35, "difficulty": 0.95}),
            "It predicts its length (Spearman 0.92 [0.89, 0.95], 240 problems), "
            "but not better than the difficulty that the problem set states (0.95).",
        ),
        (
            comparison(0.92, {"prompt_length": 0.35}),
            "It predicts its length (Spearman 0.92 [0.89, 0.95], 240 problems), "
            "better than the length of the prompt (0.35), the best baseline: +0.57 [0.54, 0.60].",
        ),
        (
            comparison(0.92, {"bag_of_words": 0.91}, n_groups=12),
            "It predicts its length (Spearman 0.92 [0.89, 0.95], 240 problems in 12 groups), "
            "but not clearly better than the words of the prompt (0.91; difference +0.01 [−0.02, 0.04]).",
        ),
        (
            comparison(0.51, {"bag_of_words": 0.40}, metric="AUROC", p_value=0.4),
            "It does not predict its length better than chance (AUROC 0.51 [0.48, 0.54], 240 problems); shuffled labels: p = 0.4.",
        ),
        (
            comparison(0.71, {"bag_of_words": 0.40}, metric="AUROC", p_value=0.4),
            "It does not predict its length better than chance (AUROC 0.71 [0.68, 0.74], 240 problems); shuffled labels: p = 0.4.",
        ),
    ],
    ids=["not better", "better", "not clearly better", "chance", "shuffled labels do as well"],
)
def test_the_finding_is_one_sentence_with_its_verdict(found, said):
    assert found.finding("It", "its length") == said


def test_a_difference_that_reaches_down_to_nothing_beats_nothing():
    found = comparison(0.5, {"prompt_length": 0.25})
    for low, beats in ((0.0, False), (0.001, True)):
        assert replace(found, difference=Estimate(value=0.25, low=low, high=0.5)).beats is beats


def test_one_pass_over_the_resamples_gives_what_each_interval_gives_alone():
    rng = np.random.default_rng(0)
    true, ours, theirs, words = rng.standard_normal((4, 60))
    ours, theirs = true + ours, true + 2 * theirs
    groups = [str(i // 2) for i in range(60)]
    null = Null(observed=0.5, null=np.zeros(20), p_value=0.05)
    baselines = {"elapsed_position": theirs, "bag_of_words": words}
    found = compare("Spearman", true, ours, baselines, groups, problems=groups, shuffled=null, metrics={}, seed=3)
    assert found.score == cluster_bootstrap(spearman, true, ours, groups, seed=3)
    assert found.baselines["elapsed_position"] == cluster_bootstrap(spearman, true, theirs, groups, seed=3)
    assert found.difference == difference_to_best(spearman, true, ours, baselines, groups, seed=3)
    assert found.text_difference == difference_to_best(spearman, true, ours, {"bag_of_words": words}, groups, seed=3)
    with pytest.raises(InputError, match="one group"):
        compare("Spearman", true, ours, baselines, ["a"] * 60, problems=groups, shuffled=null, metrics={}, seed=3)


def test_a_run_without_requests_is_told_how_to_record_some(stores):
    with pytest.raises(
        InputError, match=r"no problem of this run is a request.*--problems requests.*\"harmful\": true"
    ):
        probes.refusal(stores["ledgers"])


def test_a_run_without_gold_answers_is_told_how_to_record_some(stores):
    with pytest.raises(InputError, match=r'none of the 80 traces has a gold answer.*--problems ledger.*"answer"'):
        probes.correctness(stores["requests"])


@pytest.mark.parametrize("measure", [probes.length, probes.remaining])
def test_a_run_without_thinking_is_not_told_to_record_more_tokens(tmp_path, traces, measure):
    plain = [replace(trace, state="absent") for trace in traces["ledgers"]]
    store = TraceStore.create(tmp_path / "empty", sites=["resid_post.1"])
    with pytest.raises(InputError, match=r"has no traces to learn from; record some"):
        measure(store)
    states = [np.zeros((len(trace.token_ids) - 1, 4), np.float32) for trace in plain]
    store.append(plain, {"resid_post.1": states})
    with pytest.raises(InputError, match=r"none of the 30 traces has thinking.*without --no-think"):
        probes.length(store)


@pytest.mark.parametrize("kind", ["requests", "ledgers"])
def test_where_every_trace_was_cut_off_more_tokens_are_the_remedy(stores, traces, kind):
    measure = {"requests": partial(probes.refusal, contrasts=REFUSAL_ALONE), "ledgers": probes.correctness}[kind]
    cut = [replace(trace, state="truncated") for trace in traces[kind]]
    with pytest.raises(InputError, match=rf"none of the {len(cut)} .*{len(cut)} were cut off.*larger --max-new-tokens"):
        measure(stores[kind], cut)


def test_a_class_that_is_too_rare_is_counted_in_the_words_of_the_property(stores, traces):
    right = [trace for trace in traces["ledgers"] if trace.correct]
    wrong = next(trace for trace in traces["ledgers"] if not trace.correct)
    with pytest.raises(InputError, match=rf"right answers in {len(right)} and the wrong answers in 1; .*--samples"):
        probes.correctness(stores["ledgers"], [*right, wrong])
    assert "--folds 3" in class_shortage({"rare": 3, "common": 9}, 5, "record more")
    assert class_shortage({"rare": 5, "common": 9}, 5, "record more") == ""
    assert class_shortage({"rare": 2, "common": 9}, 5, "record more").endswith("; record more")  # 2 folds do not work


def test_a_contrast_that_lacks_a_class_is_named_and_the_others_are_measured(stores, traces):
    """No harmful request was complied with: what was asked can be learned, but nothing falls at the closing tag."""
    kept = [t for t in traces["requests"] if not t.problem.meta["harmful"] or behaviour(t) == "refused"]
    contrasts = {name: CONTRASTS[name] for name in ("refusal", "harmfulness")}
    found = probes.refusal(stores["requests"], kept, contrasts=contrasts, folds=3)
    assert (found.main, found.comparisons.keys()) == ("harmfulness", {"harmfulness"})
    assert found.cliffs == {} and found.undefined.keys() == {"refusal", "cliff"}
    assert "negative class (harmful complied) in 0" in found.undefined["refusal"]
    said = found.summary()
    assert "predicts whether the request is harmful" in said.finding
    assert sum(note.startswith("Undefined") for note in said.notes) == 2


def test_many_cut_off_traces_are_a_warning():
    assert truncation_notes(1, 100, "So what") == []
    [warning] = truncation_notes(20, 100, "Their length is unknown")
    assert warning.startswith("Warning: 20 of 100 traces (20 %) were cut off") and "Their length is unknown" in warning


@pytest.mark.parametrize("measure", [probes.refusal, probes.correctness])
def test_an_empty_run_is_told_to_record(tmp_path, measure):
    with pytest.raises(InputError, match=r"the run has no traces to learn from; record some"):
        measure(TraceStore.create(tmp_path / "empty", sites=["resid_post.1"]))
