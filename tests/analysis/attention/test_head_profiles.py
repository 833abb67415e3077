"""The rhythm of heads: golden WAAD, FAI and spans, and heads whose behaviour is known by construction."""

import numpy as np
import pytest
import torch

from reasonscope.analysis.attention.head_profiles import _induction_scores, head_rhythm, local_and_global, over
from reasonscope.analysis.attention.rows.functionals import Rhythm
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span
from reasonscope.probes.architecture.sites import Site


def rhythm(blocks, attention, start, window=10, horizon=(10, 50)):
    layers, heads, tokens = np.shape(attention)[:3]
    reader = Rhythm(Span(start, tokens), layers, heads, window=window, horizon=tuple(horizon))
    for block in blocks(attention):
        reader(block)
    return reader.result()


def test_golden_metrics(golden, blocks):
    for case in golden("waad_fai"):
        inputs, expected = case["inputs"], case["expected"]
        if inputs["kind"] == "metrics":
            both = [[inputs["local_attention"], inputs["global_attention"]]]
            found = rhythm(blocks, both, inputs["response_start"], inputs["window"], inputs["horizon"])
            np.testing.assert_allclose(found.waad[0, 0], expected["waad"], atol=1e-9)
            np.testing.assert_allclose(found.fai[0, 1], expected["fai"], atol=1e-9)


def test_golden_heads(golden, blocks):
    case = next(case for case in golden("waad_fai") if case["inputs"]["kind"] == "heads")
    inputs, expected = case["inputs"], case["expected"]
    for horizon, fai in zip(inputs["horizons"], expected["fai"], strict=True):
        found = rhythm(blocks, inputs["attention"], inputs["response_start"], inputs["window"], horizon)
        np.testing.assert_allclose(found.span.mean(axis=-1), expected["span"], atol=1e-9)
        local, wide = local_and_global(found.span.mean(axis=-1), inputs["share"])
        assert sorted([head.layer, head.index] for head in local) == sorted(expected["local_heads"])
        assert sorted([head.layer, head.index] for head in wide) == sorted(expected["global_heads"])
        np.testing.assert_allclose(over(found.waad, local), expected["waad"], atol=1e-9)
        np.testing.assert_allclose(over(found.fai, wide), fai if isinstance(fai, list) else fai["fai"], atol=1e-9)


def test_a_head_that_looks_one_back_has_a_span_of_one(blocks):
    before, itself = np.eye(12, k=-1), np.eye(12)
    before[0, 0] = 1
    found = rhythm(blocks, [[before, itself]], 4, horizon=(0, None))
    assert found.span.tolist() == found.previous.tolist() == [[[1.0] * 8, [0.0] * 8]]
    assert found.waad[0, 0].tolist() == [1.0] * 8
    assert found.fai[0, 1, -1] == 1.0, "the last token is seen by itself alone"


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_windows_and_sinks_are_read_as_the_eager_matrix(tiny, family):
    model, rows = tiny(family), Span(8, 30)
    ids = torch.randint(3, 90, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    found = head_rhythm(model, ids, rows, horizon=(2, 9))
    fed = torch.tensor([ids])
    seen = model.backend.forward(fed, mask=torch.ones_like(fed), read=[Site("attn_probs", 2)]).activations
    dense = seen[Site("attn_probs", 2)][0].double().numpy()
    far = np.arange(30)[:, None] - np.arange(30)
    np.testing.assert_allclose(found.span[2], (dense * far)[:, 8:].sum(-1), atol=1e-5)
    np.testing.assert_allclose(found.waad[2], (dense * np.minimum(far, 10))[:, 8:].sum(-1), atol=1e-5)
    inside = (far >= 2) & (far <= 9) & (np.arange(30)[:, None] >= 8)
    expected = (dense * inside).sum(1)[:, 8:] / np.maximum(inside.sum(0)[8:], 1)
    np.testing.assert_allclose(found.fai[2], expected, atol=1e-6)


def test_no_head_of_random_weights_inducts(tiny):
    found = _induction_scores(tiny("llama"), length=20, repeats=2)
    assert found.shape == (3, 4, 40) and (found > 0).all() and (found.mean(axis=-1) < 0.5).all()


def test_empty_rows_and_impossible_windows_are_errors(tiny):
    for options in ({"rows": Span(3, 3)}, {"rows": Span(0, 3), "window": 0}, {"rows": Span(0, 3), "horizon": (5, 2)}):
        with pytest.raises(InputError):
            Rhythm(options.pop("rows"), 1, 1, **options)
    with pytest.raises(InputError, match="rounds to 0"):
        local_and_global(np.ones((1, 2)))
