"""Correctness is found at its layer and position; disguised length does not beat length; pairs are compared within problems."""

import numpy as np
import pytest

from reasonscope import probes
from reasonscope.data.errors import InputError
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem
from reasonscope.probes.fitting.positions import has_position, row_at
from reasonscope.probes.properties.correctness_probe import within_problem


@pytest.fixture(scope="module")
def traces():
    """Two samples of each problem; long thinking is mostly wrong; some are cut off, and wrong."""
    rng, bpe, made = np.random.default_rng(0), train_tokenizer(tokenizer_texts(0, 50)), []
    for i in range(80):
        words = int(rng.integers(5, 40))
        right = (words < 22) ^ (rng.random() < 0.1)
        prompt, completion = chat(
            f"What is {i // 2}?" + " It rains." * (i // 2 % 4), "Wait. " * words, str(7 if right else 8)
        )
        given, written = bpe.encode(prompt).ids, bpe.encode(completion).ids
        written = written[:20] if i % 10 == 9 else written
        problem = Problem(id=f"{i // 2}", prompt=prompt, answer="7")
        made.append(
            build_trace(
                id=f"{i // 2}/{i % 2}",
                problem=problem,
                token_ids=given + written,
                n_prompt_tokens=len(given),
                tokenizer=bpe,
                sample=i % 2,
            )
        )
    return made


def stored(path, traces, known):
    """`known(trace)` stands in dimension 3 half-way through the thinking, and nowhere else."""
    rng = np.random.default_rng(1)
    states = [rng.standard_normal((len(t.token_ids) - 1, 8)).astype(np.float32) for t in traces]
    for trace, rows in zip(traces, states, strict=True):
        rows[row_at(trace, 0.5), 3] += 6 * known(trace)
    store = TraceStore.create(path, sites=["resid_post.1"])
    store.append(traces, {"resid_post.1": states})
    return store


def test_it_is_found_at_its_position_and_not_at_another(tmp_path, traces):
    store = stored(tmp_path, traces, lambda trace: trace.correct)
    found = probes.correctness(store, traces, position=0.5, folds=3)
    assert found.comparison.score.low > 0.95
    assert found.comparison.beats
    assert found.within_problem.share.value > 0.9
    assert (found.n_traces, found.n_truncated, found.n_left_out, found.n_groups) == (80, 8, 0, 40)
    elsewhere = probes.correctness(store, traces, position="window", folds=3)
    assert not elsewhere.comparison.beats
    assert (elsewhere.n_truncated, elsewhere.n_left_out) == (0, 8)


def test_shuffles_and_resamples_can_be_fewer(tmp_path, traces):
    store = stored(tmp_path, traces, lambda trace: trace.correct)
    settings = {"position": 0.5, "folds": 3, "n_permutations": 19}
    one, other = (probes.correctness(store, traces, n_resamples=n, **settings) for n in (50, 60))
    assert one.comparison.shuffled.p_value == 1 / 20
    assert one.comparison.difference.value == other.comparison.difference.value
    assert one.comparison.difference.interval != other.comparison.difference.interval
    assert one.comparison.metrics["brier"].interval != other.comparison.metrics["brier"].interval


def test_a_probe_of_the_length_does_not_beat_the_length(tmp_path, traces):
    store = stored(tmp_path, traces, lambda trace: -np.log1p(trace.n_thinking_tokens))
    closed = [trace for trace in traces if trace.state == "closed"]
    found = probes.correctness(store, closed, position=0.5, folds=3)
    assert found.comparison.score.low > 0.5
    assert not found.comparison.beats
    assert {"thinking_length", "truncated", "elapsed_position"} <= found.comparison.baselines.keys()


def test_pairs_are_of_one_problem():
    right = np.array([True, False, True, False, True, False])
    problems = ["a", "a", "b", "b", "c", "c"]
    # Between problems the scores are upside down; within each the right one is higher, or as high.
    found = within_problem(right, np.array([1.0, 0.0, 5.0, 4.0, 9.0, 9.0]), problems)
    assert (found.share.value, found.n_pairs) == (pytest.approx(2.5 / 3), 3)
    alone = within_problem(right, np.zeros(6), list("abcdef"))
    assert np.isnan(alone.share.value)
    assert "several samples" in alone.why_not


def test_positions_are_rows(traces):
    closed, cut = traces[0], traces[9]
    assert row_at(closed, "prompt") == closed.n_prompt_tokens - 1
    assert row_at(closed, 0.0) == closed.tokens.thinking.start
    assert row_at(closed, 1.0) == closed.tokens.thinking.stop - 1
    assert row_at(closed, "window") == closed.tokens.close_window.stop - 1
    assert row_at(cut, 1.0) == len(cut.token_ids) - 2
    assert [has_position(cut, at) for at in ("prompt", 0.5, "window")] == [True, True, False]
    for wrong in ("middle", 1.5):
        with pytest.raises(InputError, match="write prompt, window"):
            row_at(closed, wrong)


def test_one_class_is_refused(tmp_path, traces):
    store = stored(tmp_path, traces, lambda trace: 0)
    with pytest.raises(InputError, match="class"):
        probes.correctness(store, [trace for trace in traces if trace.correct], folds=3)
    with pytest.raises(InputError, match="gold answer"):
        probes.correctness(store, [])
