"""The first-order estimate of all heads: against taking them out one by one, and its band against random directions that were run."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from reasonscope.analysis.causal.attribution_patching import _Passes, head_attribution, heads_are_few
from reasonscope.analysis.statistics import mean_band
from reasonscope.data.text.parse import build_trace, trace_from_text
from reasonscope.data.text.steps_and_sentences import sentence_of_each, sentences
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model

TEXT = "<think>\nI ADD. SO IT IS 7.\n\nWAIT. IT IS 8.\n</think>\n\n8"


@pytest.fixture(scope="module")
def model(tiny):
    """A tiny model whose heads write little, so that the first order is all there is."""
    quiet = load_model(deepcopy(tiny("qwen3").hf), tokenizer=tiny("qwen3").tokenizer)
    with torch.no_grad():
        for layer in range(quiet.n_layers):
            quiet.layout.module(quiet.hf, Site("z", layer)).weight.mul_(1e-2)
    return quiet


@pytest.fixture(scope="module")
def trace(model):
    ids = model.tokenizer.encode(f"3+4?{TEXT}", add_special_tokens=False)
    problem = Problem(id="p", prompt="3+4?")
    return build_trace(id="p/0", problem=problem, token_ids=ids, n_prompt_tokens=4, tokenizer=model.tokenizer_backend)


def log_probability(model, trace, write):
    ids = torch.tensor([trace.token_ids[:-1].tolist()])
    logits = model.backend.forward(ids, mask=None, write=write).logits[0, trace.n_prompt_tokens - 1 :].double()
    written = torch.as_tensor(trace.token_ids[trace.n_prompt_tokens :])[:, None]
    return float(logits.log_softmax(-1).gather(1, written).mean())


def test_the_estimate_is_the_loss_without_the_head_where_heads_write_little(model, trace):
    n = model.n_layers * model.n_heads
    found = head_attribution(model, trace, sentences(trace), n_checked=n)
    assert found.values.shape == (model.n_layers, model.n_heads)
    checked = found.numbers["checked"]
    assert len(checked) == n
    estimates, exact = (np.array([row[key] for row in checked]) for key in ("estimate", "exact"))
    np.testing.assert_allclose(estimates, exact, atol=0.05 * np.abs(exact).max())
    assert np.corrcoef(estimates, exact)[0, 1] > 0.99
    np.testing.assert_allclose(found.arrays["by_token"].sum(-1), found.values, rtol=1e-3, atol=1e-9)
    assert (found.interval.low <= found.values).all() and (found.values <= found.interval.high).all()
    assert all(weight.requires_grad for weight in model.hf.parameters())  # as it was before
    n_tokens = len(trace.token_ids) - trace.n_prompt_tokens
    assert (found.unit, found.numbers["tokens"]) == ("nats per token", n_tokens)
    of = sentence_of_each(sentences(trace), len(trace.token_ids))[trace.n_prompt_tokens :]
    expected = mean_band(found.arrays["by_token"].astype(np.float64) * n_tokens, of)
    np.testing.assert_allclose(found.interval.low, expected.low, rtol=1e-3, atol=1e-9)


def test_the_band_holds_random_directions_as_long(model, trace):
    found, layer, head = head_attribution(model, trace, n_checked=0), 1, 0
    start = trace.n_prompt_tokens - 1
    generator, seen = torch.Generator().manual_seed(0), {}

    def keep(z, where):
        seen["z"] = z.clone()
        return z

    plain = log_probability(model, trace, {Site("z", layer): keep})
    alone = torch.zeros_like(seen["z"])
    alone[:, :, head] = seen["z"][:, :, head]
    project = model.layout.module(model.hf, Site("z", layer))
    length = project(alone.flatten(2)).norm(dim=-1, keepdim=True)

    def moved(activation, where):
        noise = torch.nn.functional.normalize(torch.randn(activation.shape, generator=generator), dim=-1)
        noise[:, :start] = 0
        return activation + length * noise

    changes = np.array([log_probability(model, trace, {Site("attn_out", layer): moved}) - plain for _ in range(300)])
    inside = (changes > found.null.low[layer, head]) & (changes < found.null.high[layer, head])
    assert 0.9 < inside.mean() < 0.985


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_a_random_direction_moves_the_stream_as_far_as_the_head(tiny, trace, family):
    """Also if a norm comes between the heads and the stream."""
    model, layer, start = tiny(family), 1, trace.n_prompt_tokens - 1
    passes, stream, seen = _Passes(model, trace), Site("resid_mid", layer), {}

    def read(z, where):
        seen["z"] = z[0, start:].clone()
        return z

    def without(head):
        def edit(z, where):
            changed = z.clone()
            changed[:, start:, head] = 0
            return changed

        return edit

    def stream_of(edit):
        return passes._run({Site("z", layer): edit}, [stream])[1][stream][0, start:]

    with torch.no_grad():
        whole = stream_of(read)
        moved = [(whole - stream_of(without(head))).norm(dim=-1) for head in range(seen["z"].shape[1])]
    torch.testing.assert_close(passes._lengths(layer, seen["z"]), torch.stack(moved, dim=1), rtol=1e-3, atol=1e-5)


def test_a_small_model_is_measured_exactly_and_a_text_without_tokens_is_undefined(model, trace):
    assert heads_are_few(model, trace)
    text = trace_from_text(id="t", problem=Problem(id="t", prompt="a?"), prompt="a?", completion=TEXT)
    assert "no tokens" in head_attribution(model, text).reason
