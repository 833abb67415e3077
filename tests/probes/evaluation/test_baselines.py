"""Baselines: what each knows of a run in which not every trace or problem says everything."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.evaluation.baselines import BASELINE_WORDS, BASELINES, TEXT_BASELINES, Points, baseline_features
from reasonscope.probes.generation.recording import record, record_written


def of_difficulties(store, difficulties):
    traces = [store.trace(id) for id in sorted(store.ids)]
    pairs = zip(traces, difficulties, strict=True)
    return [replace(trace, problem=replace(trace.problem, difficulty=stated)) for trace, stated in pairs]


@pytest.fixture
def model(model_of):
    return model_of("llama")


@pytest.fixture
def store(model, tmp_path):
    problems = [Problem(id=f"p{i}", messages=(Message(role="user", content=str(i)),)) for i in range(3)]
    return record(model, problems, tmp_path / "run", sites="resid_post.0", sampling=Sampling(max_new_tokens=4))


def test_the_words_of_the_prompt_are_those_before_the_first_written_token(store):
    points = Points.last_prompt_tokens([store.trace(id) for id in sorted(store.ids)])
    words = BASELINES["bag_of_words"](points)
    assert words.dtype == object
    for trace, text in zip(points.traces, words, strict=True):
        assert text == trace.text[: trace.chars.prompt.stop] and trace.problem.id[1:] in text


def test_a_run_of_the_first_layer_has_its_state_at_each_token(store):
    traces = [store.trace(id) for id in sorted(store.ids)]
    points = Points(traces=traces, tokens=[trace.n_prompt_tokens - 1 + i for i, trace in enumerate(traces)])
    found = baseline_features(points, store, ("prompt_length",))
    assert list(found) == ["prompt_length", "first_layer", "next_token"]
    for row, trace, token in zip(found["first_layer"], traces, points.tokens, strict=True):
        np.testing.assert_array_equal(row, store.activations(trace.id, "resid_post.0")[token])


def test_the_next_token_is_the_one_after_the_row(store):
    traces = [store.trace(id) for id in sorted(store.ids)]
    first, last = traces[0].n_prompt_tokens - 1, len(traces[1].token_ids) - 2
    points = Points(traces=traces[:2], tokens=[first, last])
    expected = [[trace.entropies[i], trace.logprobs[i]] for trace, i in zip(traces, (0, -1), strict=False)]
    np.testing.assert_array_equal(BASELINES["next_token"](points), expected)
    for token in (first - 1, len(traces[0].token_ids) - 1):
        with pytest.raises(InputError, match="no token was generated after"):
            BASELINES["next_token"](Points(traces=traces[:1], tokens=[token]))


@pytest.mark.parametrize("name", ["entropies", "logprobs"])
def test_a_run_of_which_one_trace_has_no_scores_has_no_next_token(store, name):
    traces = [store.trace(id) for id in sorted(store.ids)]
    points = Points.last_prompt_tokens([replace(traces[0], **{name: None}), *traces[1:]])
    assert "next_token" not in baseline_features(points, store, ())
    with pytest.raises(InputError, match="has no entropies and log-probabilities"):
        BASELINES["next_token"](points)


def test_every_baseline_has_words_of_its_own_for_a_sentence():
    assert BASELINE_WORDS.keys() >= {*BASELINES, *TEXT_BASELINES}
    assert len(set(BASELINE_WORDS.values())) == len(BASELINE_WORDS)
    assert all(words.startswith(("the ", "whether ", "a ")) for words in BASELINE_WORDS.values())


def test_a_problem_without_difficulty_does_not_drop_the_baseline(store):
    points = Points.last_prompt_tokens(of_difficulties(store, [2.0, None, 4.0]))
    found = baseline_features(points, store, ())
    np.testing.assert_array_equal(found["difficulty"], [[2, 1], [3, 0], [4, 1]])


def test_problems_without_any_difficulty_have_no_such_baseline(store):
    points = Points.last_prompt_tokens(of_difficulties(store, [None] * 3))
    assert "difficulty" not in baseline_features(points, store, ())
    with pytest.raises(InputError, match="no problem states a difficulty"):
        BASELINES["difficulty"](points)


def test_text_by_another_program_has_no_next_token_that_is_nan(model, store, tmp_path):
    unknown = [
        replace(trace, logprobs=np.full_like(trace.logprobs, np.nan), entropies=np.full_like(trace.entropies, np.nan))
        for trace in of_difficulties(store, [None] * 3)
    ]
    assert "next_token" not in baseline_features(Points.last_prompt_tokens(unknown), store, ())
    read = record_written(model, unknown, tmp_path / "read", sites="resid_post.0")
    points = Points.last_prompt_tokens([read.trace(id) for id in read.ids])
    assert np.isfinite(baseline_features(points, read, ())["next_token"]).all()
