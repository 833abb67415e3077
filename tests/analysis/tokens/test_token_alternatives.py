"""What else could have been written, what steering makes of what was, and where each token looked: against the plain computation."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from reasonscope.analysis.attention.maps import REGIONS, attention_map
from reasonscope.analysis.tokens.token_alternatives import alternatives, head_effects, steering_shift, with_entropies
from reasonscope.data.text.parse import build_trace, trace_from_text
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

TEXT = "<think>\nI ADD. SO IT IS 7.\n\nWAIT. IT IS 8.\n</think>\n\n8"


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("qwen3")


@pytest.fixture(scope="module")
def trace(model):
    ids = model.tokenizer.encode(f"3+4?{TEXT}", add_special_tokens=False)
    problem = Problem(id="p", prompt="3+4?")
    return build_trace(id="p/0", problem=problem, token_ids=ids, n_prompt_tokens=4, tokenizer=model.tokenizer_backend)


@pytest.fixture(scope="module")
def logprobs(model, trace):
    logits, _ = run_with_cache(model, trace.token_ids[:-1].tolist(), [])
    return logits[0, trace.n_prompt_tokens - 1 :].log_softmax(dim=-1)


def test_alternatives_are_the_likeliest_tokens_and_the_null_is_the_models_own_draw(model, trace, logprobs):
    found = alternatives(model, trace, sentences(trace), top=3)
    written = trace.token_ids[trace.n_prompt_tokens :]
    np.testing.assert_allclose(found.values, logprobs[torch.arange(len(written)), written].numpy(), atol=1e-6)
    best = logprobs.topk(3)
    assert found.arrays["ids"].tolist() == best.indices.tolist()
    np.testing.assert_allclose(found.arrays["logprobs"], best.values.numpy(), atol=1e-6)
    assert found.axis("token").labels == tuple(str(i) for i in range(4, len(trace.token_ids)))
    assert {str(id) for id in np.unique(found.arrays["ids"])} == set(found.numbers["pieces"])
    likeliest = found.numbers["first_choice"]
    assert likeliest["value"] == pytest.approx(np.mean(best.indices[:, 0].numpy() == written))
    assert likeliest["ci"][0] <= likeliest["value"] <= likeliest["ci"][1]
    # Of 4,000 tokens that the model draws itself, 95 % lie within the band.
    draws = torch.distributions.Categorical(logits=logprobs).sample((4000,))
    said = logprobs.gather(1, draws.T).numpy()
    inside = (said >= found.null.low[:, None] - 1e-6) & (said <= found.null.high[:, None] + 1e-6)
    assert inside.mean() >= 0.94


def test_steering_shifts_what_stands_behind_it_and_strength_0_nothing(model, trace, logprobs):
    width, site = model.hf.config.hidden_size, Site("resid_post", 0)
    vector = SteeringVector(directions={site: np.full(width, 3.0, dtype=np.float32)}, method="test", provenance={})
    scope = Scope.thinking(model)
    found = steering_shift(model, trace, vector, 1.0, scope, sentences(trace), n_controls=5)
    mean = found.numbers["mean"]
    assert mean["value"] == pytest.approx(found.values.mean()) and mean["ci"][0] < mean["value"] < mean["ci"][1]
    opened = (
        trace.tokens.open.start - trace.n_prompt_tokens
    )  # the tag itself, and what follows it, are said before any edit
    assert not found.values[: opened + 2].any() and found.values[opened + 2 :].all()
    assert (found.arrays["kl"] >= -1e-6).all() and 0 < found.numbers["touched"] < len(trace.token_ids)
    assert found.null.what.startswith("random vectors of the same norm, 5 draws") and found.arrays["random"].shape == (
        5,
    )
    still = steering_shift(model, trace, vector, 0.0, scope, n_controls=5)
    assert not still.values.any() and not still.null.high.any()
    away = steering_shift(model, trace, vector, 1.0, Scope(prompt_positions=(99,)), n_controls=5)
    assert not away.measured and "scope" in away.reason


def test_a_head_that_writes_nothing_has_no_effect_and_the_others_that_of_their_absence(model, trace):
    model = load_model(deepcopy(model.hf), tokenizer=model.tokenizer)
    weight = model.layout.block(model.hf, 1).self_attn.o_proj.weight
    size = weight.shape[1] // model.n_heads
    with torch.no_grad():
        weight[:, :size] = 0
    found = head_effects(model, trace, sentences(trace), n_controls=3)
    assert found.values.shape == (model.n_layers, model.n_heads) and found.numbers["tokens"] == len(trace.token_ids) - 4
    assert found.values[1, 0] == 0 and found.null.low[1, 0] == found.null.high[1, 0] == 0
    assert (found.null.low[0] > 0).all() and (found.null.low <= found.null.high).all()
    ids = torch.tensor([trace.token_ids[:-1].tolist()])

    def silenced(z, where):
        return torch.cat([z[:, :, :1], 0 * z[:, :, 1:2], z[:, :, 2:]], dim=2)

    with torch.no_grad():
        plain = model.backend.forward(ids, mask=None).logits[0, 3:].double().softmax(-1)
        without = (
            model.backend.forward(ids, mask=None, write={Site("z", 1): silenced}).logits[0, 3:].double().softmax(-1)
        )
    by_hand = (plain * (plain / without).log()).sum(-1).mean()
    assert found.values[1, 1] == pytest.approx(float(by_hand), rel=1e-3, abs=1e-7) and by_hand > 0
    assert found.interval.low[1, 1] <= found.values[1, 1] <= found.interval.high[1, 1]


def test_a_text_without_tokens_is_a_state(model):
    text = trace_from_text(id="t", problem=Problem(id="t", prompt="a?"), prompt="a?", completion=TEXT)
    assert "no tokens" in alternatives(model, text).reason and "no tokens" in head_effects(model, text).reason
    assert not attention_map(model, text, sentences(text)).measured


def test_the_attention_map_holds_the_strongest_keys_and_shares_that_sum_to_1(model, trace):
    known = sentences(trace)
    found = attention_map(model, trace, known, keys=4)
    assert [axis.name for axis in found.axes] == ["region", "layer", "head"] and len(found.values) == len(REGIONS)
    np.testing.assert_allclose(found.values.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(found.null.low.sum(axis=0), 1, atol=1e-9)
    assert (found.interval.low <= found.values).all() and (found.values <= found.interval.high).all()
    assert found.interval.what.startswith(f"bootstrap over {len(known)} sentences")
    first, stop = found.numbers["first"], known[-1].tokens.stop
    _, seen = run_with_cache(model, trace.token_ids[:stop].tolist(), [Site("attn_probs", 1)])
    dense = seen[Site("attn_probs", 1)][0, :, first:]
    np.testing.assert_allclose(found.arrays["weight"][1], dense.topk(4).values.numpy(), atol=1e-3)
    assert (found.arrays["key"][1] == dense.topk(4).indices.numpy()).mean() > 0.95  # ties apart
    own, source = known[1].tokens, known[0].tokens
    mean = dense[:, own.start - first : own.stop - first, source.slice].mean(dim=(1, 2)).numpy()
    np.testing.assert_allclose(found.arrays["matrix"][1, :, 1, 0], mean, rtol=2e-3)


def test_the_entropies_that_a_model_reads_are_those_that_it_wrote_with(model):
    sampling = Sampling(temperature=0.7, max_new_tokens=12)
    (written,) = rollouts(model, [Problem(id="p", prompt="3+4?")], sampling)
    read = with_entropies(model, replace(written, entropies=np.full_like(written.entropies, np.nan)))
    np.testing.assert_allclose(read.entropies, written.entropies, atol=1e-4)
