"""Baselines: what each knows of a run in which not every trace or problem says everything."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.evaluation.baselines import BASELINES, Points, baseline_features
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
