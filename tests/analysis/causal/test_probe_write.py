"""A probe's logit is exactly the sum of what heads, MLPs, biases and the embedding write, in every family."""

import numpy as np
import pytest
import torch

from reasonscope.analysis.causal.head_edits import head_states, without_heads
from reasonscope.analysis.causal.probe_write import _total_effects, probe_write_result, probe_writes
from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.families import FAMILIES
from reasonscope.probes.architecture.heads import Head, all_heads, random_heads
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe


def probe_of(model, site, seed=0):
    coef = np.random.default_rng(seed).standard_normal(model.d_model)
    return LinearProbe(coef=coef, intercept=0.5, site=site, task="binary", method="test", model=model.fingerprint)


def traces_of(model, n=2):
    rng = np.random.default_rng(1)
    return [
        build_trace(
            id=f"t{i}",
            problem=Problem(id=f"t{i}", prompt="?"),
            token_ids=np.array([10, 3, *rng.integers(5, 90, 6 + i), 4, 11, 12]),
            n_prompt_tokens=1,
            tokenizer=model.tokenizer_backend,
            finish_reason="stop",
            model=model.fingerprint,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_the_logit(tiny, family):
    model = tiny(family)
    found = probe_writes(model, probe_of(model, Site("resid_post", 2)), traces_of(model))
    np.testing.assert_allclose(found.total, found.logit, atol=1e-4 * max(1, np.abs(found.heads).max()))
    assert np.abs(found.heads).max() > 0 and np.abs(found.mlps).max() > 0


def test_layers_behind_the_probe_write_nothing(tiny):
    model = tiny("qwen3")
    found = probe_writes(model, probe_of(model, Site("resid_pre", 2)), traces_of(model))
    assert not found.heads[:, 2].any() and found.heads[:, 1].all()


def test_in_the_last_block_the_total_effect_of_a_head_is_more_than_direct_only_by_the_mlp(tiny):
    """GPT-NeoX reads its MLP from the block's input, so a head of the last block acts directly or not at all."""
    model = tiny("gpt_neox")
    probe, traces = probe_of(model, Site("resid_post", 2)), traces_of(model)
    heads = [Head(layer=2, index=i) for i in range(model.n_heads)]
    direct = probe_writes(model, probe, traces).heads[:, 2]
    np.testing.assert_allclose(_total_effects(model, probe, traces, heads=heads), direct, atol=1e-4)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_an_edit_replaces_its_heads_and_no_other(tiny, how):
    model = tiny("llama")
    bank = head_states(model, traces_of(model))
    edits = without_heads(model, [Head(layer=1, index=2)], how=how, bank=bank).edits
    fed = torch.randint(5, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    site = Site("z", 1)
    before = model.backend.forward(fed, mask=torch.ones_like(fed), read=[site]).activations[site]
    after = model.backend.forward(fed, mask=torch.ones_like(fed), read=[site], write=edits).activations[site]
    kept = [0, 1, 3]
    torch.testing.assert_close(after[:, :, kept], before[:, :, kept])
    if how == "zero":
        assert not after[:, :, 2].any()
    elif how == "mean":
        torch.testing.assert_close(after[0, 0, 2], bank[site][:, 2].mean(0))
    else:
        assert all((bank[site][:, 2] == row).all(-1).any() for row in after[0, :, 2])


def test_control_sets_are_different_and_from_the_same_layers_where_there_are_enough(tiny):
    model, heads = tiny("llama"), [Head(layer=1, index=0), Head(layer=2, index=1)]
    sets = random_heads(heads, all_heads(model.layout), n_controls=9)
    assert len(set(sets)) == 9 and all({head.layer for head in drawn} == {1, 2} for drawn in sets)
    assert not {head for drawn in sets for head in drawn} & set(heads)
    one = random_heads(heads[:1], all_heads(model.layout), n_controls=11)
    assert len(one) == model.n_heads - 1 and {head.layer for (head,) in one} == {1}


def test_the_result_has_null_interval_and_a_checked_sum(tiny):
    model = tiny("gemma2")
    found = probe_write_result(model, probe_of(model, Site("resid_post", 1)), traces_of(model), n_controls=20)
    assert found.values.shape == (3, 4) and found.null is not None and found.interval is not None
    assert found.numbers["largest_gap"] < 1e-3
    assert np.isfinite(found.arrays["total"]).all()


def test_what_cannot_be_decomposed_is_named(tiny):
    model = tiny("llama")
    with pytest.raises(SiteError, match="resid_pre and resid_post"):
        probe_writes(model, probe_of(model, Site("mlp_out", 1)), traces_of(model))
    with pytest.raises(InputError, match="at least one"):
        probe_writes(model, probe_of(model, Site("resid_post", 1)), [])
    cut = build_trace(
        id="cut", problem=Problem(id="cut", prompt="?"), token_ids=[10, 3, 20, 21, 22, 4], n_prompt_tokens=1,
        tokenizer=model.tokenizer_backend,
    )  # fmt: skip
    for read in (probe_writes, _total_effects, probe_write_result):  # the closing tag was written last and never fed
        with pytest.raises(InputError, match="no position window"):
            read(model, probe_of(model, Site("resid_post", 1)), [cut])
    with pytest.raises(InputError, match="bank="):
        without_heads(model, [Head(layer=0, index=0)], how="mean")
