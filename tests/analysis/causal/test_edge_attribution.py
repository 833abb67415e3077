"""Edges carry the whole change of the logits, and the same model twice has no emergent head."""

import numpy as np
import pytest
import torch

from reasonscope.analysis.causal.edge_attribution import _edge_scores, emergent_heads
from reasonscope.analysis.tokens.lens import logit_lens
from reasonscope.data.errors import InputError

CLEAN, CORRUPTED = [8, 9, 10, 11, 12], [8, 30, 10, 41, 12]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_edges_of_the_embedding_add_up_to_the_loss(tiny, family):
    model = tiny(family)
    found = _edge_scores(model, CLEAN, CORRUPTED, steps=48)
    assert found.completeness == pytest.approx(1, abs=0.05)
    assert found.scores.shape == (1 + 3 * (model.n_heads + 1), 7)
    assert not found.scores[found.sources.index("mlp 2"), :6].any(), "only the logits read the last MLP"


def test_more_steps_come_closer(tiny):
    gaps = [abs(_edge_scores(tiny("qwen3"), CLEAN, CORRUPTED, steps=n).completeness - 1) for n in (1, 32)]
    assert gaps[1] < gaps[0]


def test_the_same_model_twice_has_no_emergent_head(tiny):
    model = tiny("llama")
    found = emergent_heads(model, model, [(CLEAN, CORRUPTED), (CORRUPTED, CLEAN)], steps=2)
    assert not found.values.any() and found.arrays["base"].sum() == pytest.approx(1)


def test_what_cannot_be_attributed_is_named(tiny):
    with pytest.raises(InputError, match="same length"):
        _edge_scores(tiny("llama"), CLEAN, CORRUPTED[:-1])
    with pytest.raises(InputError, match="are the same"):
        _edge_scores(tiny("llama"), CLEAN, CLEAN)
    with pytest.raises(InputError, match="not a sum over heads"):
        _edge_scores(tiny("gemma2"), CLEAN, CORRUPTED)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_lens_ends_in_the_model_itself(tiny, family):
    model, fed = tiny(family), torch.tensor([CLEAN])
    says = model.backend.forward(fed, mask=torch.ones_like(fed)).logits[0].log_softmax(-1)
    found = logit_lens(model, CLEAN, rows=2)
    assert found.token[-1].tolist() == says.argmax(-1).tolist()
    np.testing.assert_allclose(found.logprob[-1], says.max(-1).values, atol=1e-4)
    np.testing.assert_allclose(found.final[-1], found.logprob[-1])
    assert (found.logprob >= found.final).all() and (found.entropy >= 0).all()
