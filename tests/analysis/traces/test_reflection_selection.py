"""Reflection is counted by hand-made traces, selection rules by samples whose outcome is known, graphs by their edges."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope.analysis.results import Axis, Result
from reasonscope.analysis.traces.agreement import _per_sentence, signal_agreement, signals_of
from reasonscope.analysis.traces.reflection import (
    KINDS,
    failed_step_fraction,
    find_candidates,
    reflection_of_trace,
    review_ratio,
    transitions,
    unused_steps,
    within_question_correlation,
)
from reasonscope.analysis.traces.selection import _best_rule, best_by, early_stop, majority, short_m, simulate
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_hash
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.published_chunks import published_sentences
from reasonscope.data.text.steps_and_sentences import sentences, sentences_at
from reasonscope.data.trace import Problem, Span

THINKING = (
    "Let me add the numbers. So the answer is 8. Wait, I am not sure. The answer is 8 again? "
    "Let me check: 3 + 4 = 7. So the answer is 7. The answer is 9. The answer is \\boxed{7}."
)


def trace(thinking=THINKING, *, problem="a", sample=0, answer="7", gold="7"):
    return trace_from_text(
        id=f"{problem}/{sample}",
        problem=Problem(id=problem, prompt="Add.", answer=gold),
        prompt="Add.\n<think>\n",
        completion=f"{thinking}\n</think>\n\n\\boxed{{{answer}}}",
        tokenizer=None,
        sample=sample,
    )


def test_reflection_is_counted_after_the_first_candidate():
    known = sentences(trace())
    candidates = find_candidates(known, "7")
    assert [c.answer for c in candidates] == ["8", "8 again?", "7", "9", "7"] or len(candidates) == 5
    found = reflection_of_trace(trace(), known)
    assert dict(zip(KINDS, found.values, strict=True))["correcting"] == 2
    assert dict(zip(KINDS, found.values, strict=True))["breaking"] == 1
    assert found.numbers["first"] == 1 and found.numbers["first_correct"] is False and found.numbers["last_correct"]
    assert 0.5 < found.numbers["reflection"] < 1 and 0 < found.numbers["review"] < 1
    silent = reflection_of_trace(trace("I think."), sentences(trace("I think.")))
    assert not silent.measured and "states an answer" in silent.reason
    assert transitions(candidates[:1]) == [] and np.isnan(review_ratio([]))


def test_reflection_reads_published_sentences_of_which_one_is_left_out():
    texts = ["Nobody wrote this.", "I add them.", "So the answer is 8.", "Wait, the answer is 7."]
    chunks = [{"chunk": text, "chunk_idx": i, "function_tags": []} for i, text in enumerate(texts)]
    whole = replace(trace(" ".join(texts[1:])), meta={"chunks": chunks})
    known = published_sentences(whole)
    found = reflection_of_trace(whole, known)
    assert found.arrays["candidates"].tolist() == [1, 2] and found.numbers["answers"] == ["8", "7"]
    behind = whole.chars.thinking.stop - known[1].chars.stop
    assert found.numbers["first"] == 1 and found.numbers["reflection"] == behind / len(whole.thinking)


def test_a_step_that_the_last_does_not_hang_on_is_unused():
    assert unused_steps([[], [0], [0], [1]]).tolist() == [False, False, True, False]
    assert failed_step_fraction([True, False, False, False]) == 0.25
    with pytest.raises(InputError, match="only depend on earlier ones"):
        unused_steps([[], [1]])
    with pytest.raises(InputError, match="without steps"):
        failed_step_fraction([])


def test_within_problems_the_difficulty_of_problems_is_gone():
    rng = np.random.default_rng(0)
    problems = [str(i // 8) for i in range(160)]
    hard = np.repeat(rng.standard_normal(20), 8) * 5
    x, y = hard + rng.standard_normal(160), -hard + rng.standard_normal(160)
    apart = within_question_correlation(x, y, problems, n_resamples=200)
    assert np.corrcoef(x, y)[0, 1] < -0.8 and apart.p_value > 0.01 and abs(apart.value) < 0.2
    tied = within_question_correlation(x, x + 0.3 * y, problems, n_resamples=200)
    assert tied.value > 0.5 and tied.p_value < 0.02
    with pytest.raises(InputError, match="differ in both"):
        within_question_correlation([1, 2], [1, 2], ["a", "b"])


@pytest.fixture(scope="module")
def samples():
    """Two problems of four samples: right ones are short, of 10 tokens, wrong ones of 40 and disagree."""
    made = []
    for problem in ("a", "b"):
        for i, right in enumerate((True, True, False, False)):
            one = trace(problem=problem, sample=i, answer="7" if right else str(i))
            n = 10 if right else 40
            ids, offsets = np.zeros(n, dtype=np.int64), np.zeros((n, 2), dtype=np.int64)
            cut = replace(one.tokens, answer=replace(one.tokens.answer, stop=n))
            made.append(replace(one, token_ids=ids, offsets=offsets, tokens=cut, n_prompt_tokens=0))
    return made


def test_rules_choose_as_they_say_and_cost_what_they_generate(samples):
    rules = {
        "majority": majority,
        "short-1": short_m(1),
        "oracle": best_by(lambda t: float(bool(t.correct))),
        "longest": best_by(lambda t: float(len(t.token_ids))),
        "stop": early_stop(lambda t: np.array([0.0, 1.0]), 0.5, lambda t, at: "7"),
    }
    found = simulate(samples, rules, k=4, repeats=10)
    accuracy = dict(zip(found.axis("rule").labels, found.at(metric="accuracy"), strict=True))
    tokens = dict(zip(found.axis("rule").labels, found.at(metric="tokens"), strict=True))
    assert accuracy["majority"] == accuracy["short-1"] == accuracy["oracle"] == accuracy["stop"] == 1
    assert accuracy["longest"] == 0 and 0.2 < accuracy["single"] < 0.8
    assert tokens["majority"] == 100 and tokens["short-1"] == 40
    assert found.null.low[1, 0] == found.interval.low[0, 0] and found.numbers["any_right"] == 1
    with pytest.raises(InputError, match="fewer than 5 samples"):
        simulate(samples, rules, k=5)
    with pytest.raises(InputError, match="no gold answer"):
        unknown = replace(samples[0], correct=None, problem=replace(samples[0].problem, answer=None))
        simulate([unknown], rules, k=1)
    not_decided = [replace(trace, correct=None) if trace is samples[0] else trace for trace in samples]
    assert simulate(not_decided, rules, k=4, repeats=10).numbers["any_right"] == 1  # it counts as wrong


def _many(gains, seed=0):
    """Four samples of each of 40 problems and as many rules, each right as often as a single sample plus its gain."""
    rng = np.random.default_rng(seed)
    of = [f"p{i}" for i in range(40)]
    single = rng.integers(0, 5, size=40) / 4
    rules = [np.clip(single + rng.normal(gain, 0.2, size=40), -1, 2) for gain in gains]
    right = np.stack([single, *rules], axis=1)
    return np.stack([right, np.ones_like(right)], axis=2), of


def test_the_best_of_many_rules_has_to_beat_the_best_of_chance():
    names = ["single", *"abcdefgh"]
    chance = [_best_rule(names, *_many([0.0] * 8, seed), seed=seed)["p_value"] for seed in range(60)]
    assert 0.3 < np.mean(chance) < 0.7 and np.mean(np.array(chance) <= 0.2) < 0.35
    alone = [_best_rule(names[:2], *_many([0.0], seed), seed=seed)["p_value"] for seed in range(60)]
    assert 0.3 < np.mean(alone) < 0.7
    found = _best_rule(names, *_many([0.0] * 3 + [0.3] + [0.0] * 4), seed=0)
    assert found["rule"] == "d" and found["gain"] == pytest.approx(0.3, abs=0.1) and found["p_value"] == 1 / 1001
    table, of = _many([0.3, 0.3])
    table[:, 2] = table[:, 1]
    table[:, 1, 1] = 2.0  # equal, and dearer
    assert _best_rule(names[:3], table, of, 0)["rule"] == "b"
    assert _best_rule(names[:3], table, ["one"] * 40, 0)["p_value"] > 0.4  # problems of a group are exchanged together


def test_stopping_early_saves_nothing_that_was_given(samples):
    stop = early_stop(lambda t: np.array([1.0] + [0.0] * 3), 0.5, lambda t, at: "7")
    one = samples[2]
    thinking = replace(
        one.tokens, thinking=Span(0, 20), close=Span(20, 20), answer=Span(20, 40), close_window=Span(20, 20)
    )
    spent = [
        stop([replace(one, tokens=thinking, n_prompt_tokens=given)], np.random.default_rng(0)).tokens
        for given in (0, 2, 10, 20, 30)
    ]
    assert spent == [25, 23, 20, 20, 10]


def over(n, *, cut=None, **more):
    """A result over `n` sentences, which says that they are those of `cut`."""
    about = {"null_missing": "by hand", "quantity": "q", "unit": "1", **more}
    axes = about.pop("axes", (Axis.of("sentence", n),))
    about.setdefault("values", np.arange(float(n)))
    return Result(axes=axes, provenance={} if cut is None else {"cut": cut}, **about)


def test_known_signals_are_taken_sentence_by_sentence():
    known = [replace(one, tokens=Span(3 * i, 3 * i + 3)) for i, one in enumerate(sentences(trace()))]
    n, cut = len(known), cut_hash(known)
    effects = np.full((n, n), np.nan)
    effects[2:, 1] = 3.0
    square = over(
        n, cut=cut, method="suppression", axes=(Axis.of("target", n), Axis.of("source", n)), values=effects, reason="by hand"
    )  # fmt: skip
    importance = over(
        n, cut=cut, method="anchors", axes=(Axis.of("metric", ("accuracy", "forced_kl")), Axis.of("sentence", n)),
        values=np.stack([np.zeros(n), np.arange(n)]),
    )  # fmt: skip
    by_token = over(
        2, method="entropy", axes=(Axis.of("token", ["3", "5"]),), values=np.array([1.0, 3.0])
    )  # fmt: skip
    found = signals_of({"suppression": square, "anchors": importance, "entropy": by_token}, known)
    assert set(found.lines) == {"suppression", "anchors: forced_kl", "entropy"} and not found.left_out
    np.testing.assert_array_equal(found.lines["anchors: forced_kl"], np.arange(n))
    assert found.lines["suppression"][1] == 3 and np.isnan(found.lines["suppression"][0])
    assert found.lines["entropy"][1] == 2 and np.isnan(found.lines["entropy"][0])


def test_results_of_another_cut_are_not_joined_though_they_have_as_many_sentences():
    one = trace()
    known = sentences(one)
    n = len(known)
    # The same text, its first two sentences joined and its last one cut in two: as many, and not the same.
    half = (known[-1].chars.start + known[-1].chars.stop) // 2
    spans = [
        Span(known[0].chars.start, known[1].chars.stop),
        *(sentence.chars for sentence in known[2:-1]),
        Span(known[-1].chars.start, half),
        Span(half, known[-1].chars.stop),
    ]
    other = sentences_at(one, spans, ["unknown"] * n)
    assert len(other) == n and cut_hash(other) != cut_hash(known)
    results = {
        "close_attention": over(n, cut=cut_hash(known), method="close_attention"),
        "receiver_scores": over(n, cut=cut_hash(other), method="receiver_scores"),
        "suppression": over(n, method="suppression", axes=(Axis.of("target", n), Axis.of("source", n)), values=np.ones((n, n))),
    }  # fmt: skip
    found = signals_of(results, known)
    assert set(found.lines) == {"close_attention"} and set(found.left_out) == {"receiver_scores", "suppression"}
    assert "another cut" in found.left_out["receiver_scores"] and "earlier version" in found.left_out["suppression"]
    told = signal_agreement(one, known, found.lines, left_out=found.left_out)
    assert told.numbers["left_out"] == found.left_out and told.provenance["cut"] == cut_hash(known)
    nothing = signal_agreement(one, known, {}, left_out=found.left_out)
    assert not nothing.measured and "receiver_scores: it is over another cut" in nothing.reason


def test_signals_are_ranked_side_by_side():
    known = sentences(trace())
    n = len(known)
    rising = np.arange(n, dtype=float)
    by_sentence = Result(
        method="x", quantity="q", unit="1", axes=(Axis.of("metric", ("a", "b")), Axis.of("sentence", n)),
        values=np.stack([rising, -rising]), null_missing="by hand",
    )  # fmt: skip
    np.testing.assert_array_equal(_per_sentence(by_sentence, known, "a"), rising)
    np.testing.assert_array_equal(_per_sentence(by_sentence, known), -rising)
    gap = np.where(rising == 2, np.nan, rising)
    found = signal_agreement(trace(), known, {"one": rising, "two": rising**2, "three": gap}, n_permutations=200)
    assert found.numbers["top"][0] == n - 1 and found.at(signal="one")[0] == 0 and found.at(signal="one")[-1] == 1
    assert found.numbers["agreement"]["one ~ two"]["spearman"] == pytest.approx(1)
    assert np.isnan(found.numbers["agreement"]["one ~ two"]["p_value"]), (
        "both rise along the thinking, and that is all they do"
    )
    assert np.isnan(found.at(signal="three")[2])
    wave, rising = np.random.default_rng(0).normal(size=6 * n), np.arange(6.0 * n) / n
    signals = {"one": wave, "two": wave + rising}
    [pair] = signal_agreement(trace(), known * 6, signals).numbers["agreement"].values()
    assert pair["beyond_place"] > 0.8 and pair["holm"] < 0.05
    assert not signal_agreement(trace(), known[:2], {"one": rising[:2]}).measured
