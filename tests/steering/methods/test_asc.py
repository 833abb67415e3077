"""ASC on a model: pairs of completions, exact derivatives of the logits, and a KL that keeps to its bound."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model
from reasonscope.steering.methods.asc import (
    CompletionPair,
    _logit_derivatives,
    calibrate,
    extract_asc_from_pairs,
    last_token_kl,
)
from reasonscope.steering.vectors.vector import SteeringVector

SITE = Site("resid_post", 1)
CONTEXTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16]]


@pytest.fixture(scope="module")
def model(character_tokenizer):
    loaded = load_model(tiny_model("gpt2"), tokenizer=character_tokenizer)
    loaded.hf.double()  # second differences need the digits, and RMSNorm rounds to float32 in between
    return loaded


def test_pairs_are_read_at_the_last_token_of_question_and_answer(model):
    pairs = [
        CompletionPair(question="q", concise="a", verbose="aab"),
        CompletionPair(question="pq", concise="b", verbose="cc"),
    ]
    direction = extract_asc_from_pairs(model, pairs, [SITE], batch_size=3).directions[SITE]

    def last(text):
        ids = torch.tensor([model.encode_text(text)])
        return model.backend.forward(ids, mask=torch.ones_like(ids), read=[SITE]).activations[SITE][0, -1].numpy()

    expected = (last("qa") + last("pqb") - last("qaab") - last("pqcc")) / 2
    np.testing.assert_allclose(direction, expected, atol=1e-5)
    with pytest.raises(InputError, match="no pair"):
        extract_asc_from_pairs(model, [], [SITE])


def test_derivatives_are_those_of_finite_differences(model):
    direction = torch.randn(model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = direction / direction.norm()
    slopes, curvatures = _logit_derivatives(model, SITE, direction, CONTEXTS[:2])
    step = 1e-3

    def logits(context, gamma):
        def edit(activation, _):
            moved = activation.clone()
            moved[:, -1] += gamma * direction
            return moved

        ids = torch.tensor([context])
        return model.backend.forward(ids, mask=torch.ones_like(ids), write={SITE: edit}).logits[0, -1]

    for context, slope, curvature in zip(CONTEXTS, slopes, curvatures, strict=False):
        low, middle, high = (logits(context, gamma) for gamma in (-step, 0.0, step))
        assert slope == pytest.approx(float((high - low).norm()) / (2 * step), rel=1e-3)
        assert curvature == pytest.approx(float((high + low - 2 * middle).norm()) / step**2, rel=1e-2)


def test_the_kl_keeps_to_its_bound_and_0_costs_nothing(model):
    direction = np.random.default_rng(1).standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(directions={SITE: direction}, method="asc")
    found = calibrate(model, vector, CONTEXTS, CONTEXTS, epsilon=1e-3, slope_quantile=1.0, curvature_quantile=1.0)
    assert found.within == 1.0 and (found.measured > 0).all() and len(found.random) == len(CONTEXTS)
    assert found.multiplier * vector.norms[SITE] == pytest.approx(found.bound.gamma_star)
    assert last_token_kl(model, SITE, torch.zeros(model.d_model), CONTEXTS[:1]).tolist() == [0.0]


def test_what_cannot_be_calibrated_is_refused(model):
    zero = SteeringVector(directions={SITE: np.zeros(model.d_model, dtype=np.float32)}, method="asc")
    with pytest.raises(InputError, match="vector is 0"):
        calibrate(model, zero, CONTEXTS, CONTEXTS)
    with pytest.raises(InputError, match="0 contexts"):
        calibrate(model, zero, [], CONTEXTS)
