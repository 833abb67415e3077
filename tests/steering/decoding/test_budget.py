"""Budget guidance equals the golden numbers; the predictor learns; guidance shortens or lengthens as it predicts."""

import inspect
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.recording import as_numpy
from reasonscope.steering.decoding.budget import (
    TRUST,
    LengthPredictor,
    Trust,
    _fits_in,
    _guidance_weights,
    _guided_distribution,
    _remaining_budget,
    _training_rows,
    negative_log_density,
    train_predictor,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "budget_gamma.json").read_text(encoding="utf-8"))


def golden(kind):
    cases = [case for case in GOLDEN["cases"] if case["inputs"]["kind"] == kind]
    return pytest.mark.parametrize("case", cases, ids=lambda case: str(case.get("name")))


def tensors(given, *names):
    return (torch.tensor(given[name], dtype=torch.float64) for name in names)


@golden("scalar")
def test_golden_chances(case):
    shape, rate, budget = tensors(case["inputs"], "alpha", "lambda", "budget")
    expected, tolerance = case["expected"], case["tolerance"]
    assert _fits_in(shape, rate, budget).item() == pytest.approx(expected["cdf"], abs=tolerance)
    assert TRUST.kept(shape, rate).item() == expected["keep"]
    found = negative_log_density(shape, rate, budget).item()
    assert found == pytest.approx(expected["negative_log_density"], rel=tolerance)


@golden("vocabulary")
def test_golden_distributions(case):
    logits, shape, rate, budget = tensors(case["inputs"], "logits", "alpha", "lambda", "budget")
    expected, tolerance = case["expected"], case["tolerance"]
    weights = _guidance_weights(logits, shape, rate, budget)
    np.testing.assert_allclose(_fits_in(shape, rate, budget), expected["cdf"], atol=tolerance)
    assert TRUST.kept(shape, rate).tolist() == expected["keep"]
    np.testing.assert_allclose(weights, expected["weights"], atol=tolerance)
    np.testing.assert_allclose(_guided_distribution(logits, weights), expected["guided_distribution"], atol=tolerance)


@golden("countdown")
def test_golden_countdown(case):
    steps = torch.arange(case["inputs"]["steps"])
    assert _remaining_budget(case["inputs"]["budget"], steps).tolist() == case["expected"]


def test_the_closing_tag_is_a_target_that_counts_one(written_store):
    asked = [Problem(id=name, prompt="q", answer="7") for name in "abc"]
    store = written_store([(asked[0], 0, "one two", "7"), (asked[1], 0, "one", "7"), (asked[2], 0, "cut off", None)])
    states, following, left = _training_rows(store, [Site("resid_post", 0)], store.ids)
    closed = [trace for trace in store if trace.state == "closed"]
    lengths = [trace.n_thinking_tokens + 1 for trace in closed]
    assert len(states) == len(following) == sum(lengths)
    ends = np.cumsum(lengths) - 1
    assert left[ends].tolist() == [1.0] * len(closed)
    assert following[ends].tolist() == [trace.token_ids[trace.tokens.thinking.stop] for trace in closed]


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_states_are_learned_from_in_the_type_in_which_they_are_stored(written_store, tmp_path, kind):
    """Float32 is made of a batch, and not of all rows; the same predictor is learned."""
    asked = [Problem(id=name, prompt="q", answer="7") for name in "ab"]
    traces = written_store([(asked[0], 0, "one two", "7"), (asked[1], 0, "one", "7")])
    site, losses = Site("resid_post", 0), []
    for folder, as_type in (("stored", kind), ("wide", np.float32)):
        with TraceStore.create(tmp_path / folder, sites=[str(site)]) as store:
            states = [traces.activations(id, str(site)).astype(kind).astype(as_type) for id in traces.ids]
            store.append(list(traces), {str(site): states})
        assert as_numpy(_training_rows(store, [site], store.ids)[0]).dtype == as_type
        losses.append(train_predictor(store, [site], vocabulary=500, epochs=2, width=16, depth=1)[1])
    assert losses[0] == losses[1]


def test_the_predictor_gives_a_distribution_for_every_next_token():
    shape, rate = LengthPredictor(8, 5, width=16, depth=1)(torch.randn(3, 4, 8))
    assert shape.shape == rate.shape == (3, 5)
    assert (shape > 0).all() and (rate > 0).all()


def test_the_predictor_has_the_sizes_that_its_run_is_told():
    predictor = LengthPredictor(8, 5)
    assert predictor.summary.shape == (1, 1, 128) and predictor.project.weight.shape == (128, 8)
    assert [len(predictor.encoder.layers), predictor.encoder.layers[0].linear1.out_features] == [2, 512]
    defaults = inspect.signature(train_predictor).parameters
    assert {name: defaults[name].default for name in ("ids", "epochs", "batch_size")} == {
        "ids": None,
        "epochs": 5,
        "batch_size": 64,
    }


def test_a_mode_at_its_bound_is_trusted():
    """exp((2 − 1) / 1) − 1, in the precision of the predictions."""
    one, two = torch.ones(1), 2 * torch.ones(1)
    bound = torch.expm1(one).item()
    assert Trust(rate=1.0, mode=bound).kept(two, one).all()
    assert not Trust(rate=1.0, mode=1.001 * bound).kept(two, one).any()
    assert not Trust(rate=0.0, mode=-1.0).kept(one, one).any()


def test_a_trained_predictor_learns_no_more(written_store):
    asked = [Problem(id=name, prompt="q", answer="7") for name in "ab"]
    store = written_store([(asked[0], 0, "one two", "7"), (asked[1], 0, "one", "7")])
    vocabulary = max(int(trace.token_ids.max()) for trace in store) + 1
    predictor, _ = train_predictor(store, [Site("resid_post", 0)], vocabulary=vocabulary, epochs=1, width=16, depth=1)
    assert not predictor.training and not any(one.requires_grad for one in predictor.parameters())
