"""Peaks, their words and the null, on states whose dependence on the answer is known; and the experiments with thinking tokens."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from reasonscope.analysis.tokens import thinking_tokens
from reasonscope.analysis.tokens.mi import (
    LEAST_OTHERS,
    comparison,
    emitting_rows,
    find_peaks,
    gold_text,
    mi_of_trace,
    peak_words,
    representations,
    thinking_token_table,
    top_k,
)
from reasonscope.analysis.tokens.recycling import Recycling, _recycle, recycling_study
from reasonscope.analysis.tokens.thinking_tokens import (
    _different_controls,
    _frequency_matched,
    _think_longer,
    time_scaling,
    token_ids_of,
    token_suppression,
)
from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.text.steps_and_sentences import sentence_of_each, sentences
from reasonscope.data.trace import Sampling, Span
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.rollout import rollouts, trace_seed
from reasonscope.probes.models.model import load_model
from reasonscope.steering import SteeringExperiment

SITE = Site("resid_post", 1)
SAMPLING = Sampling(temperature=0.7, max_new_tokens=24)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def problems():
    return load_problems("ledger:brief", n=3, seed=5)


@pytest.fixture(scope="module")
def traces(model, problems):
    return rollouts(model, problems, SAMPLING)


def test_peaks_are_those_of_definition_2_and_the_k_highest():
    values = np.array([1.0, 2, 3, 4, 5, 30])
    assert np.flatnonzero(find_peaks(values)).tolist() == [5]
    assert np.flatnonzero(top_k(values, 2)).tolist() == [4, 5]


@pytest.mark.parametrize(
    ("n", "null"), [(LEAST_OTHERS - 1, "permuted coordinates"), (LEAST_OTHERS, "answers of other problems")]
)
def test_the_null_is_of_other_answers_if_there_are_enough(traces, n, null):
    trace, rng = traces[0], np.random.default_rng(0)
    hidden = {"resid_post.1": rng.standard_normal((len(trace.token_ids) - 1, 16))}
    others = [{"resid_post.1": rng.standard_normal(16)} for _ in range(n)]
    found = mi_of_trace(
        trace, hidden, {"resid_post.1": rng.standard_normal(16)}, sentences=sentences(trace), others=others
    )
    assert found.null.what.startswith(null)


def test_three_tokens_have_no_quartiles():
    trace = SimpleNamespace(
        id="t", state="closed", n_prompt_tokens=4, token_ids=np.arange(9), thinking_positions=np.array([4, 5, 6])
    )
    found = mi_of_trace(trace, {}, {}, sentences=[])
    assert not found.measured and found.reason == "3 tokens; quartiles need at least 4"


def test_a_token_that_carries_the_answer_peaks_above_its_null(traces):
    trace, rng = traces[0], np.random.default_rng(0)
    rows, width = emitting_rows(trace), 64
    hidden = rng.standard_normal((len(trace.token_ids) - 1, width))
    gold = rng.standard_normal(width)
    hidden[rows[3]] = gold + 0.1 * rng.standard_normal(width)
    others = [{SITE: rng.standard_normal(width)} for _ in range(8)]
    for foreign in (others, []):
        found = mi_of_trace(trace, {SITE: hidden}, {SITE: gold}, foreign)
        assert found.values[0].argmax() == 3 and found.arrays["peaks"][0, 3] and found.arrays["peaks"].mean() < 0.2
        assert found.values[0, 3] > found.null.high[0, 3] and found.arrays["r2"][0, 3] > 0.9
        assert found.numbers[str(SITE)]["share_above_null"]["value"] < 0.5
        assert found.numbers[str(SITE)]["aom"]["value"] > 3
    labels = found.axis("token").labels
    assert int(labels[0]) == trace.tokens.thinking.start and len(labels) == trace.n_thinking_tokens
    assert len(peak_words(trace, found)) == len(labels)
    short = replace(trace, tokens=replace(trace.tokens, thinking=trace.tokens.thinking))
    assert mi_of_trace(short, {SITE: hidden}, {SITE: gold}, region="generated").measured


def test_numbers_of_one_trace_have_intervals_over_its_sentences(traces):
    trace, rng = traces[0], np.random.default_rng(0)
    hidden, gold = rng.standard_normal((len(trace.token_ids) - 1, 64)), rng.standard_normal(64)
    cut = sentences(trace)
    told = mi_of_trace(trace, {SITE: hidden}, {SITE: gold}, sentences=cut).numbers[str(SITE)]
    for name in ("mean", "median", "share_peaks", "share_above_null"):
        low, high = told[name]["ci"]
        assert low <= told[name]["value"] <= high and low < high
    assert "ci" not in told["peak_gap_tokens"] and "ci" not in told["std"]
    # Sentences whose tokens are all alike say as little as there are sentences: more is not known for having more tokens.
    owner = sentence_of_each(cut, len(trace.token_ids))[1:]
    alike = rng.standard_normal((owner.max() + 2, 64))[owner]
    wide = mi_of_trace(trace, {SITE: alike}, {SITE: gold}, sentences=cut).numbers[str(SITE)]["mean"]["ci"]
    one_a_token = [replace(cut[0], tokens=Span(i, i + 1)) for i in range(len(trace.token_ids))]
    narrow = mi_of_trace(trace, {SITE: alike}, {SITE: gold}, sentences=one_a_token).numbers[str(SITE)]["mean"]["ci"]
    assert wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])
    none = mi_of_trace(trace, {SITE: hidden}, {SITE: gold}).numbers[str(SITE)]["mean"]["ci"]
    assert np.isnan(none).all()


def test_words_at_peaks_are_told_from_words_everywhere():
    words = [["So", "x", "the", "the"] * 10] * 4
    peaks = [np.array([word == "So" for word in line]) for line in words]
    rows = {row.word: row for row in thinking_token_table(words, peaks, n_permutations=300)}
    assert rows["So"].enrichment == 4 and rows["So"].q_value < 0.05 and rows["So"].listed
    assert rows["the"].at_peaks == 0 and rows["the"].p_value == 1
    with pytest.raises(InputError, match="no token"):
        thinking_token_table(words, [np.zeros(40, dtype=bool)] * 4)


def test_two_models_are_compared_on_the_same_traces(traces):
    rng = np.random.default_rng(0)

    def measured(scale):
        found = []
        for trace in traces:
            gold = rng.standard_normal(64)
            hidden = scale * gold + rng.standard_normal((len(trace.token_ids) - 1, 64))
            found.append(mi_of_trace(trace, {SITE: hidden}, {SITE: gold}, n_permutations=2, tau=0))
        return found

    change = comparison(measured(0.2), measured(1.0))
    assert change.axis("number").labels[0] == "mean" and change.interval.low[0] > 0
    assert "fewer than 2 traces" in comparison([], measured(1.0)).reason


def test_gold_is_the_solution_or_the_models_own_answer(model, traces):
    trace = traces[0]
    assert f"boxed{{{trace.problem.answer}}}" in gold_text(trace)
    (state,) = representations(model, [gold_text(trace)], [SITE])
    assert state[SITE].shape == (model.d_model,) and state[SITE].dtype == np.float64
    silent = replace(trace, problem=replace(trace.problem, meta={}))
    with pytest.raises(InputError, match="no reference solution"):
        gold_text(silent)
    assert gold_text(replace(silent, problem=replace(silent.problem, meta={"solution": "It is 3."}))) == "It is 3."


def test_recycling_nothing_is_plain_generation_and_recycling_repeats(model, problems):
    prompts, seeds = [model.encode_prompt(p) for p in problems[:2]], [3, 4]
    tokens = tuple(token_ids_of(model, ["So", "Then", "First", "The"]))
    plain = generate(model, prompts, SAMPLING, seeds=seeds)
    off = _recycle(model, prompts, SAMPLING, Recycling(layer=0, tokens=tokens, probability=0.0), seeds=seeds)
    assert off.recycled == (0, 0)
    for one, other in zip(off.completions, plain, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    everywhere = Recycling(layer=1, tokens=tokens, at_random=1.0)
    twice = [_recycle(model, prompts, SAMPLING, everywhere, seeds=seeds) for _ in range(2)]
    assert min(twice[0].recycled) > 3 and twice[0].recycled == twice[1].recycled
    np.testing.assert_array_equal(twice[0].completions[0].token_ids, twice[1].completions[0].token_ids)
    with pytest.raises(InputError, match="layer 99"):
        _recycle(model, prompts, SAMPLING, Recycling(layer=99, tokens=tokens), seeds=seeds)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_near_the_end_of_the_context_leaves_the_others_their_room(tiny, family):
    model = tiny(family)
    prompts, off = [[5, 6, 7], [9] * 126], Recycling(layer=0, tokens=(8,), probability=0.0)
    plain = generate(model, prompts, SAMPLING, seeds=[3, 4])
    found = _recycle(model, prompts, SAMPLING, off, seeds=[3, 4])
    assert [len(one.token_ids) for one in plain] == [27, 128]
    for one, other in zip(found.completions, plain, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        assert one.finish_reason == other.finish_reason
    assert _recycle(model, [], SAMPLING, off, seeds=[]).completions == []
    with pytest.raises(ContextError, match="at least one token can follow"):
        _recycle(model, [[5, 6], [9] * 128], SAMPLING, off, seeds=[3, 4])
    for wrong, seeds, message in (
        (prompts, [3], "1 seeds"),
        ([[], [9]], [3, 4], "prompt 0 has no tokens"),
        ([[999]], [3], "vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            _recycle(model, wrong, SAMPLING, off, seeds=seeds)


def test_arms_differ_in_their_coins_and_not_in_their_draws(model, problems):
    long = Sampling(temperature=1.0, max_new_tokens=80)
    never = Recycling(layer=1, tokens=(0,), probability=0.0)  # nothing is recycled, so that only the draws are left
    found = recycling_study(model, problems, long, never, n_controls=2)
    assert found.numbers["share"] == 0 and (found.values == found.values[0]).all()
    prompts, half = [model.encode_prompt(problems[0])], replace(never, at_random=0.5)
    fallen = [_recycle(model, prompts, long, replace(half, coins=i), seeds=[3]).recycled for i in range(3)]
    assert len(set(fallen)) > 1


def test_recycling_stands_beside_as_many_steps_recycled_at_random(model, problems):
    tokens = tuple(token_ids_of(model, ["So", "Then", "First", "The"]))
    how = Recycling(layer=1, tokens=tokens, probability=1.0)
    short = Sampling(temperature=0.7, max_new_tokens=16)
    found = recycling_study(model, problems[:2], short, how, n_controls=2)
    assert found.axis("arm").labels == ("base", "recycled", "random 1", "random 2")
    counts, steps = found.numbers["recycled"], 2 * found.at(metric="tokens")[1]
    assert counts["base"] == 0 and 0 < counts["recycled"] < steps
    assert found.numbers["share"] == pytest.approx(counts["recycled"] / steps)
    randoms = [found.at(metric="tokens")[2:].min(), found.at(metric="tokens")[2:].max()]
    assert [found.null.low[0, 1], found.null.high[0, 1]] == randoms


def test_forbidden_words_are_not_written_and_the_control_is_as_frequent(model, problems, traces):
    ids = token_ids_of(model, ["The", "So"])
    matched = _frequency_matched(ids, traces)
    assert not set(matched) & set(ids)
    found = token_suppression(model, problems, SAMPLING, words=("The", "So"), n_controls=2)
    assert found.axis("arm").labels == ("base", "thinking", "random 1", "random 2")
    assert found.null.low.shape == (4, 2) and found.numbers["tokens"] == len(ids)
    controls = _different_controls(ids[:1], traces, 9, 0)
    assert len(controls) == len({frozenset(one) for one in controls}) == 5  # all of the nearest
    assert _different_controls(ids[:1], traces, 3, 0) == controls[:3]
    with pytest.raises(InputError, match="no token"):
        token_ids_of(model, ["Zzyzx"])


def test_thinking_on_from_a_word_gives_answers(model, problems):
    whole = rollouts(model, problems, Sampling(temperature=0.0, max_new_tokens=120))
    answers = _think_longer(model, whole, "", SAMPLING)
    assert len(answers) == 3
    agree = [a == t.final_answer for a, t in zip(answers, whole, strict=True) if t.state == "closed"]
    assert agree and all(agree)  # greedy, and nothing was added
    found = time_scaling(model, whole, SAMPLING, words=("So",), controls=("the",))
    assert found.axis("word").labels == ("(none)", "So", "the") and np.isfinite(found.values).all()


def test_a_trace_knows_the_seed_that_it_was_drawn_with(model, problems, traces, monkeypatch):
    decode = lambda prompts, seeds: generate(model, prompts, SAMPLING, seeds=seeds)  # noqa: E731
    done = SteeringExperiment(model, problems, SAMPLING, batch_size=2).run("own loop", decode=decode).traces
    assert [one.sampling for one in done] == [one.sampling for one in traces]
    longer = []

    def keep(writer, trace, *_):
        longer.append(trace)
        return SimpleNamespace(answers=((None,),))

    monkeypatch.setattr(thinking_tokens, "forced_answers", keep)
    _think_longer(model, traces[:1], "So", replace(SAMPLING, max_new_tokens=2))
    assert longer[0].sampling.seed == trace_seed(SAMPLING.seed, f"{traces[0].id}/longer/0")
