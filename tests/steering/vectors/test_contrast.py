"""Vectors that are differences between two classes: of which means, and which classes are invalid."""

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.steering.methods.asc import CompletionPair, extract_asc, load_pairs, mode_pairs
from reasonscope.steering.methods.efficiency import _efficient_pairs, extract_efficiency
from reasonscope.steering.vectors.contrast import mean_difference, state_of, vector_of_probe
from reasonscope.steering.vectors.vector import covariance_matched

SITE = Site("resid_post", 0)


def asked(name, mode="default", answer="7"):
    return Problem(id=f"{name}-{mode}", prompt="q", answer=answer, group=name, meta={"mode": mode})


def test_a_state_is_read_where_it_says(written_store):
    store = written_store([(asked("a"), 0, "abc", "\\boxed{7}")])
    trace = store.trace(store.ids[0])
    start, stop = trace.tokens.thinking.start, trace.tokens.thinking.stop
    index = {"prompt": trace.n_prompt_tokens - 1, "thinking_end": stop - 1, "end": len(trace.token_ids) - 2}
    assert {read: state_of(store, trace, SITE, read)[1] for read in index} == index
    assert state_of(store, trace, SITE, "thinking_mean")[1] == (start + stop - 1) / 2
    with pytest.raises(InputError, match="read='middle'"):
        state_of(store, trace, SITE, "middle")


def test_asc_goes_from_the_detailed_to_the_brief_answer(written_store):
    rows = [(asked(name, mode), 0, text, "7") for name in "ab" for mode, text in (("brief", "x"), ("detail", "xyyyyy"))]
    store = written_store(rows)
    direction = extract_asc(store, [SITE]).directions[SITE]
    np.testing.assert_allclose(direction, [0, -5, 0, 0])  # read at the same last token, five positions earlier
    assert extract_asc(store, [SITE]).provenance["pairs"] == 2


def test_a_missing_side_is_named(written_store, tmp_path):
    store = written_store(
        [(asked("a", "brief"), 0, "x", "7"), (asked("a", "detail"), 0, "xy", "7"), (asked("b", "brief"), 0, "x", "7")]
    )
    with pytest.raises(InputError, match="b/0 was answered in mode 'brief' only"):
        extract_asc(store, [SITE])
    with pytest.raises(InputError, match="no problem of the run was asked"):
        mode_pairs([])
    with pytest.raises(InputError, match="a pair has no 'verbose'"):
        CompletionPair(question="q", concise="x", verbose=" ")
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "q", "concise": "a", "verbose": "b"}\n{"question": "q", "concise": "a"}\n')
    with pytest.raises(InputError, match=r"line 2.*a pair has no 'verbose'"):
        load_pairs(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_pairs(tmp_path / "none.jsonl")


def test_efficiency_compares_the_shortest_with_the_longest_right_answer(written_store):
    right, wrong = "\\boxed{7}", "\\boxed{8}"
    rows = [
        (asked("a"), 0, "xx", right),
        (asked("a"), 1, "xxxxxx", right),
        (asked("a"), 2, "x", wrong),
        (asked("b"), 0, "xx", right),
    ]
    store = written_store(rows)
    pairs = _efficient_pairs(store)
    assert [(short.sample, long.sample) for short, long in pairs] == [(0, 1)]
    np.testing.assert_allclose(extract_efficiency(store, [SITE], read="thinking_end").directions[SITE], [0, -4, 0, 0])
    with pytest.raises(InputError, match="no problem has two"):
        extract_efficiency(store, [SITE], read="end", ids=[store.ids[-1]])


def test_an_empty_class_and_nan_are_refused():
    with pytest.raises(InputError, match="2 activations of one class and 0"):
        mean_difference(np.zeros((2, 3)), np.zeros((0, 3)))
    with pytest.raises(InputError, match="NaN"):
        mean_difference(np.full((2, 3), np.nan), np.zeros((2, 3)))
    with pytest.raises(InputError, match="same sites"):
        mean_difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_a_random_direction_varies_as_the_states_do():
    states = np.random.default_rng(0).standard_normal((500, 3)) * [10.0, 1.0, 0.0]
    drawn = np.array([covariance_matched(states, norm=2.0, seed=seed) for seed in range(200)])
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 2.0, rtol=1e-5)
    assert np.abs(drawn[:, 0]).mean() > 4 * np.abs(drawn[:, 1]).mean() and np.abs(drawn[:, 2]).max() < 1e-6
    with pytest.raises(InputError, match="do not vary"):
        covariance_matched(np.ones((3, 2)), norm=1.0, seed=0)


def test_the_normal_of_a_probe_raises_what_it_reads():
    probe = LinearProbe(
        coef=np.array([3.0, 4.0]), intercept=1.0, site=SITE, task="regression", method="RidgeProbe", model={}
    )
    vector = vector_of_probe(probe, norm=10.0)
    np.testing.assert_allclose(vector.directions[SITE], [6.0, 8.0])
    assert probe.scores(vector.directions[SITE]) == pytest.approx(51.0)
