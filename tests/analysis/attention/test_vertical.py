"""Sentence attention and receiver heads: golden numbers, the closed form of uniform attention, and what depth control takes out."""

import numpy as np
import pytest
import torch

from reasonscope.analysis.attention.receiver_heads import _receiver_score
from reasonscope.analysis.attention.rows.block import AttentionBlock
from reasonscope.analysis.attention.rows.functionals import SentenceMeans
from reasonscope.analysis.attention.sentence_attention import sentence_attention, uniform_attention
from reasonscope.analysis.attention.vertical import (
    kurtosis,
    split_half_reliability,
    top_heads,
    vertical_scores,
)
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site


def means(blocks, attention, spans):
    layers, heads, tokens = np.shape(attention)[:3]
    reader = SentenceMeans(spans, tokens, layers, heads)
    for block in blocks(attention):
        reader(block)
    return reader.result().matrix


def numbers(values):
    return np.array(values, dtype=np.float64)


def test_golden_sentence_attention(golden, blocks):
    for case in golden("sentence_attention"):
        inputs, expected = case["inputs"], case["expected"]
        spans = [Span(*span) for span in inputs["spans"]]
        matrix = means(blocks, inputs["attention"], spans)
        np.testing.assert_allclose(matrix, numbers(expected["corrected"]["sentence_matrix"]), atol=1e-9)
        clipped = [Span(span.start, min(span.stop, len(inputs["attention"][0][0]) - 1)) for span in spans]
        if len(clipped[-1]):
            reference = means(blocks, inputs["attention"], clipped)
            np.testing.assert_allclose(
                reference[..., -1, :], numbers(expected["reference"]["sentence_matrix_last_row"]), atol=1e-9
            )
        for name, depth in (("", False), ("_depth", True)):
            vertical = vertical_scores(matrix, proximity=inputs["proximity"], depth_control=depth)
            np.testing.assert_allclose(vertical, numbers(expected["vertical" + name]), atol=1e-9)
            peaked = kurtosis(vertical)
            np.testing.assert_allclose(peaked, numbers(expected["kurtosis" + name]), atol=1e-9)
            heads = top_heads(peaked, inputs["top"])
            assert [[head.layer, head.index] for head in heads] == expected["top_heads" + name]
            score = _receiver_score(vertical, heads)
            np.testing.assert_allclose(score, numbers(expected["receiver_score" + name]), atol=1e-9)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_a_model_is_read_as_its_eager_matrix(tiny, family):
    model, spans = tiny(family), [Span(3, 9), Span(9, 10), Span(12, 30)]
    ids = torch.randint(3, 90, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    found = sentence_attention(model, ids, spans)
    fed = torch.tensor([ids])
    seen = model.backend.forward(fed, mask=torch.ones_like(fed), read=[Site("attn_probs", 1)]).activations
    dense = seen[Site("attn_probs", 1)][0].double()
    for i, target in enumerate(spans):
        for j, source in enumerate(spans):
            mean = dense[:, target.slice, source.slice].mean(dim=(1, 2))
            np.testing.assert_allclose(found.matrix[1, :, i, j], mean, atol=1e-6)
    np.testing.assert_allclose(found.sink[1], dense[:, :, 0].mean(dim=1), atol=1e-6)


def test_the_closed_form_of_uniform_attention_is_its_matrix(blocks):
    n, spans = 30, [Span(0, 4), Span(4, 5), Span(7, 20), Span(20, 30)]
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    np.testing.assert_allclose(means(blocks, uniform[None, None].tolist(), spans)[0, 0], uniform_attention(spans, n))


def test_uniform_attention_looks_like_a_receiver_head_the_longer_the_more():
    """Why a kurtosis means nothing alone: it grows with the number of sentences where there is no receiver head at all."""
    found = []
    for n in (20, 40, 60, 150, 300):
        spans = [Span(20 * i, 20 * i + 20) for i in range(n)]
        found.append(float(kurtosis(vertical_scores(uniform_attention(spans, 20 * n), depth_control=False))))
    assert found == sorted(found)
    assert found[0] < 0 and found[-1] > 3


def test_depth_control_leaves_nothing_of_uniform_attention():
    spans = [Span(10 * i, 10 * i + 10) for i in range(20)]
    controlled = vertical_scores(uniform_attention(spans, 200))[:16]
    late = vertical_scores(uniform_attention(spans, 200), depth_control=False)[:16]
    assert np.ptp(controlled) / controlled.mean() < np.ptp(late) / late.mean()


def test_a_sink_is_left_out_of_the_ranks_too():
    matrix = np.tril(np.ones((8, 8)))
    matrix[:, 0] = 50
    kept = vertical_scores(matrix, exclude=[0])
    assert np.isnan(kept[0]) and np.isfinite(kept[1:4]).all()
    np.testing.assert_allclose(kept[1:4], vertical_scores(matrix[1:, 1:])[:3])


def test_heads_are_ranked_behind_the_layers_that_are_left_out():
    scores = np.array([[9.0, 8.0], [1.0, np.nan], [3.0, 2.0]])
    assert top_heads(scores, 3, from_layer=1) == [
        Head(layer=2, index=0),
        Head(layer=2, index=1),
        Head(layer=1, index=0),
    ]


def test_what_repeats_over_traces_is_reliable_and_noise_is_not():
    rng = np.random.default_rng(0)
    own, noise = rng.standard_normal((1, 6, 8)), rng.standard_normal((40, 6, 8))
    assert split_half_reliability(own + 0.5 * noise) > 0.9
    assert abs(split_half_reliability(noise)) < 0.3
    assert np.isnan(split_half_reliability(noise[:1]))


def test_a_sentence_without_tokens_is_not_a_number_and_no_sentence_is_an_error(blocks):
    attention = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    found = means(blocks, attention[None, None].tolist(), [Span(0, 2), Span(2, 2), Span(2, 4)])
    assert np.isnan(found[0, 0, 1]).all() and np.isnan(found[0, 0, :, 1]).all() and np.isfinite(found[0, 0, 2, 0])
    for spans in ([], [Span(0, 3), Span(2, 4)], [Span(2, 9)]):
        with pytest.raises(InputError):
            SentenceMeans(spans, 4, 1, 1)
    with pytest.raises(InputError, match="proximity"):
        vertical_scores(found, proximity=0)
    with pytest.raises(InputError, match="receiver head"):
        _receiver_score(np.ones((1, 1, 3)), [])


def test_blocks_of_a_window_carry_the_place_of_their_keys():
    reader = SentenceMeans([Span(0, 2), Span(2, 4)], 4, 1, 1)
    reader(AttentionBlock(layer=0, rows=Span(2, 4), keys=Span(1, 4), probabilities=torch.ones(1, 2, 3)))
    assert reader.result().matrix[0, 0, 1].tolist() == [0.5, 1.0]
