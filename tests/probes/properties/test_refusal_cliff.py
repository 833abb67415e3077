"""Trajectories equal the golden numbers; a constant score stays constant and has no cliff; the end is the state before the answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from reasonscope.data.errors import InputError
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.tokenizer import train_tokenizer
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import has_cliff, thinking_to_window
from reasonscope.probes.properties.refusal_cliff import (
    _plateau_and_end,
    cliff,
    mean_trajectory,
    random_direction_drops,
    token_scores,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "masked_trajectory.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(tokenizer_texts(0, 50))


@pytest.fixture
def traces(bpe):
    """Thinking of very different lengths; the newline before the closing tag is merged with the full stop."""
    return [
        trace_from_text(
            id=f"{i}/0",
            problem=Problem(id=str(i), prompt="What?"),
            prompt="What?<think>\n",
            completion="Wait, let me check that. " * (2 + 7 * i) + "Yes.\n</think>\n\nSure, here is how.",
            tokenizer=bpe,
        )
        for i in range(6)
    ]


def constant(traces, value=0.8):
    return {trace.id: np.full(len(trace.token_ids) - 1, value) for trace in traces}


def falling(traces):
    """.9 in the thinking, .2 from the close window on."""
    scores = constant(traces, 0.9)
    for trace in traces:
        scores[trace.id][trace.tokens.close_window.start :] = 0.2
    return scores


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("variant", "key"), [("corrected", "corrected"), ("published", "reference")])
def test_golden_means(case, variant, key):
    curve = mean_trajectory([np.array(scores) for scores in case["inputs"]["scores"]], variant=variant)
    assert curve.mean == pytest.approx(case["expected"][key], rel=case["tolerance"], abs=case["tolerance"])
    assert curve.n.tolist() == case["expected"]["n"]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.floats(-5, 5))
def test_a_constant_stays_constant_whatever_the_lengths(lengths, value):
    curve = mean_trajectory([np.full(length, value) for length in lengths])
    assert np.allclose(curve.mean, value, rtol=1e-12, atol=0)


def test_zero_padding_draws_a_rise_that_is_not_there():
    curve = mean_trajectory([np.full(length, 0.8) for length in (4, 10)], variant="published")
    assert curve.mean[0] == pytest.approx(0.4)


def test_the_interval_of_a_mean_is_students_over_problems():
    values = np.array([0.1, 0.4, 0.5, 0.9])
    alone = mean_trajectory([np.array([value]) for value in values], groups=list("abcd"))
    reach = scipy.stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert alone.high[0] - alone.mean[0] == pytest.approx(reach) == alone.mean[0] - alone.low[0]
    copies = mean_trajectory(
        [np.array([value]) for value in values.repeat(5)], groups=[g for g in "abcd" for _ in range(5)]
    )
    assert copies.high[0] == pytest.approx(alone.high[0])  # five copies of a trace tell no more than one
    assert np.isnan(mean_trajectory([np.array([value]) for value in values]).low).all()
    with pytest.raises(InputError, match="groups"):
        mean_trajectory([np.zeros(3)], groups=["a", "b"])


def test_the_interval_of_a_mean_holds_in_95_of_100_studies():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        problems = rng.normal(0.3, 1, 8)
        scores = [np.array([mean + rng.normal(0, 0.5)]) for mean in problems for _ in range(3)]
        curve = mean_trajectory(scores, groups=[str(i) for i in range(8) for _ in range(3)])
        held += bool(curve.low[0] <= 0.3 <= curve.high[0])
    assert 0.92 <= held / 400 <= 0.98


def test_the_end_is_the_state_that_decides_the_first_token_of_the_answer(traces):
    for trace in traces:
        rows = thinking_to_window(trace)
        assert trace.text[trace.offsets[rows[-1] + 1, 0] :] == "Sure, here is how."
        scores = np.zeros(len(trace.token_ids) - 1)
        scores[rows[-1]] = 1.0
        assert _plateau_and_end(scores, trace) == (0.0, 1.0)


def test_the_plateau_is_the_median_of_the_end_of_the_thinking_before_the_window(traces):
    trace = traces[3]
    start, stop = trace.tokens.thinking.start, trace.tokens.close_window.start
    scores = np.arange(len(trace.token_ids) - 1, dtype=float)
    assert _plateau_and_end(scores, trace, plateau=1.0)[0] == np.median(scores[start:stop])
    assert _plateau_and_end(scores, trace, plateau=1e-9)[0] == stop - 1
    for share in (0, 1.1):
        with pytest.raises(InputError, match="share of the thinking"):
            _plateau_and_end(scores, trace, plateau=share)


def test_a_cliff_is_found_with_its_interval(traces):
    found = cliff(falling(traces), traces)
    assert (found.plateau.value, found.end.value) == (pytest.approx(0.9), pytest.approx(0.2))
    assert found.drop.value == pytest.approx(0.7)
    assert found.drop.low <= found.drop.value <= found.drop.high
    assert found.drops == pytest.approx([0.7] * 6)


def test_constant_scores_have_no_cliff(traces):
    scores = constant(traces)
    assert cliff(scores, traces).drop.interval == (0, 0)


def test_traces_without_a_cliff_are_refused(traces, bpe):
    def trace(completion):
        problem = Problem(id="p", prompt="What?")
        return trace_from_text(id="t", problem=problem, prompt="What?<think>\n", completion=completion, tokenizer=bpe)

    for without in (trace("Wait, let me"), trace("Wait.\n</think>\n\n"), trace("\n</think>\n\nSure")):
        assert not has_cliff(without)
        with pytest.raises(InputError, match="leave it out"):
            thinking_to_window(without)
    with pytest.raises(InputError, match="no trace"):
        cliff({}, [])
    with pytest.raises(InputError, match="one score per row"):
        _plateau_and_end(np.zeros(3), traces[0])
    with pytest.raises(InputError, match="at least one score"):
        mean_trajectory([])
    with pytest.raises(InputError, match="choose"):
        mean_trajectory([np.zeros(3)], variant="padded")


def stored(path, traces, drop):
    """Noise, and along dimension 2 a plateau that falls by `drop` at the close window."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((len(trace.token_ids) - 1, 16)).astype(np.float32) for trace in traces]
    for trace, states in zip(traces, rows, strict=True):
        states[:, 2] += 2
        states[trace.tokens.close_window.start :, 2] -= drop
    store = TraceStore.create(path, sites=["resid_post.1"])
    store.append(traces, {"resid_post.1": rows})
    return store


@pytest.fixture
def probe():
    coef = np.zeros(16)
    coef[2] = 2.0
    return LinearProbe(
        coef=coef,
        intercept=0.0,
        site=Site("resid_post", 1),
        task="binary",
        method="logistic",
        model={},
        provenance={},
    )


def test_tokens_are_scored_by_probability(tmp_path, traces, probe):
    store = stored(tmp_path, traces, 6.0)
    scores = token_scores(probe, store, traces[1])
    states = store.activations(traces[1].id, "resid_post.1")
    assert scores == pytest.approx(1 / (1 + np.exp(-2.0 * states[:, 2])))


def test_random_directions_fall_less_than_the_direction_that_falls(tmp_path, traces, probe):
    store = stored(tmp_path, traces, 6.0)
    drop = cliff({trace.id: token_scores(probe, store, trace) for trace in traces}, traces).drop
    drops = random_direction_drops(probe, store, traces, n_controls=100)
    assert drops.shape == (100, 6)
    means = drops.mean(axis=1)
    assert drop.low > np.quantile(means, 0.975)
    assert means.min() < 0 < means.max()
