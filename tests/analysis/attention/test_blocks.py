"""Attention block by block equals the eager matrix in every family, and nothing of it survives the pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.rows.block import ScoreRule, attention_blocks
from reasonscope.data.errors import ContextError, InputError
from reasonscope.probes.architecture.families import FAMILIES, VOCAB
from reasonscope.probes.architecture.sites import Site

N = 40


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (N,), generator=torch.Generator().manual_seed(0)).tolist()


def eager(model, ids):
    """Attention (layer, head, query, key) as the model's own eager code has it."""
    fed = torch.tensor([ids])
    sites = [Site("attn_probs", layer) for layer in range(model.n_layers)]
    seen = model.backend.forward(fed, mask=torch.ones_like(fed), read=sites).activations
    return torch.stack([seen[site][0] for site in sites])


def rows_of(query, key, rule, **more):
    """The rows of every block (head, query, key), a key that a block does not hold with weight 0."""
    found = []
    for one in attention_blocks(query, key, rule, **more):
        whole = torch.zeros(*one.probabilities.shape[:2], key.shape[1], dtype=one.probabilities.dtype)
        whole[..., one.keys.slice] = one.probabilities
        found.append(whole)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_attends_as_its_own_code_says(tiny, ids, family):
    model = tiny(family)
    found = torch.zeros(model.n_layers, model.n_heads, N, N)

    def read(one):
        found[one.layer, :, one.rows.slice, one.keys.slice] = one.probabilities.float()

    read_attention(model, ids, read, block=7)
    torch.testing.assert_close(found, eager(model, ids), rtol=0, atol=1e-5)


def test_no_block_is_wider_than_asked_and_the_model_is_as_before(tiny, ids):
    model = tiny("gemma2")
    before, sizes = model.hf.config._attn_implementation, []
    read_attention(model, ids, lambda block: sizes.append((block.layer, block.probabilities.shape)), block=7)
    assert model.hf.config._attn_implementation == before
    assert {layer for layer, _ in sizes} == {0, 1, 2}
    assert max(shape[1] for _, shape in sizes) == 7
    windowed = [shape[2] for layer, shape in sizes if layer == 0]
    assert max(windowed) == 7 + 5, "a layer with a window of 6 needs no key further back"


def test_a_reader_that_fails_leaves_no_trace(tiny, ids):
    model = tiny("llama")
    before = model.hf.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        read_attention(model, ids, lambda block: 1 / 0)
    assert model.hf.config._attn_implementation == before


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 20),
    block=st.integers(1, 25),
    window=st.none() | st.integers(1, 8),
    softcap=st.none() | st.just(2.0),
    sink=st.booleans(),
)
def test_blocks_are_the_rows_of_the_softmax(n, block, window, softcap, sink):
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(4, n, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    rule = ScoreRule(scaling=0.7, softcap=softcap, window=window, sink=torch.ones(4) if sink else None)
    scores = query @ key.repeat_interleave(2, dim=0).mT * 0.7
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = scores.masked_fill((distance < 0) | (distance >= (window or n)), -torch.inf)
    if sink:
        scores = torch.cat([scores, torch.ones(4, n, 1, dtype=torch.float64)], dim=-1)
    expected = scores.softmax(-1)[..., :n]
    found = rows_of(query, key, rule, block=block)
    torch.testing.assert_close(found, expected)
    widths = [one.probabilities.shape[1] for one in attention_blocks(query, key, rule, block=block)]
    assert sum(widths) == n and max(widths) <= block


def test_the_last_queries_see_all_keys_before_them():
    query, key = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    rule = ScoreRule(scaling=0.5)
    whole = rows_of(query, key, rule)
    torch.testing.assert_close(rows_of(query[:, 4:], key, rule), whole[:, 4:])


def test_what_cannot_be_read_is_named(tiny, ids):
    model = tiny("llama")
    with pytest.raises(InputError, match="no token"):
        read_attention(model, [], lambda block: None)
    with pytest.raises(ContextError, match="holds 128"):
        read_attention(model, [3] * 129, lambda block: None)
    with pytest.raises(InputError, match="vocabulary"):
        read_attention(model, [VOCAB], lambda block: None)
