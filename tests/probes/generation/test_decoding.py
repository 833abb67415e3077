"""The decoding loop: the sampler by hand and by property, then greedy against Hugging Face, capture, edits and limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reasonscope.data.errors import ContextError, InputError, SiteError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.families import tiny_of
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.decoding import generate, sample
from reasonscope.probes.models.model import load_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [33, 34, 35, 36, 37]]
HOT = Sampling(temperature=1.0, max_new_tokens=24)
GREEDY = Sampling(max_new_tokens=16)


def run(model, prompts=PROMPTS, sampling=HOT, seeds=None, **kwargs):
    return generate(model, prompts, sampling, seeds=range(len(prompts)) if seeds is None else seeds, **kwargs)


def without_stop(model):
    """The model with nothing that ends a completion early."""
    model = replace(model)
    model.__dict__["stop_ids"] = frozenset()
    return model


def test_sampler_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76, 0.99])
    token, logprob, entropy = sample(logits, Sampling(temperature=1.0), uniform)
    assert token.tolist() == [0, 0, 1, 1, 2, 3]
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.125, 0.125]))
    torch.testing.assert_close(entropy, torch.full((6,), 1.75 * math.log(2)))


def test_sampler_with_top_p_and_temperature():
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log().repeat(3, 1)
    cut, logprob, _ = sample(logits, Sampling(temperature=1.0, top_p=0.6), torch.tensor([0.0, 0.66, 0.67]))
    assert cut.tolist() == [1, 1, 3]  # .5 and .25 are the nucleus; they weigh 2/3 and 1/3 in it
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.5, 0.5, 0.25]))  # reported before the cut
    sharp, logprob, _ = sample(logits, Sampling(temperature=0.5), torch.tensor([0.0, 0.9, 0.99]))
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.125, 0.5, 0.125, 0.25])[sharp] ** 2 / (11 / 32))
    greedy, logprob, entropy = sample(logits, Sampling(), torch.zeros(3))
    assert greedy.tolist() == [1, 1, 1] and math.isclose(entropy[0], 1.75 * math.log(2), rel_tol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, min_p=0.3),
        Sampling(temperature=0.7, top_k=12, top_p=0.8, min_p=0.1),
    ],
)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(sampling):
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    scores = logits / sampling.temperature
    for warper in (
        TopKLogitsWarper(sampling.top_k or 40),
        TopPLogitsWarper(sampling.top_p),
        MinPLogitsWarper(sampling.min_p),
    ):
        scores = warper(None, scores)
    uniform = (torch.arange(2000) + 0.5) / 2000
    drawn, _, _ = sample(logits.repeat(2000, 1), sampling, uniform)
    shares = torch.bincount(drawn, minlength=40) / 2000
    torch.testing.assert_close(shares, scores.softmax(-1)[0], atol=1e-3, rtol=0)


def test_penalties_are_those_of_transformers_and_of_no_other_row(model_of):
    model = without_stop(model_of("qwen3"))
    penal = replace(GREEDY, repetition_penalty=1.3)
    alone = [run(model, [prompt], penal)[0].token_ids for prompt in PROMPTS]
    for one, together in zip(alone, run(model, sampling=penal), strict=True):
        np.testing.assert_array_equal(one, together.token_ids)
    by_theirs = run(model, sampling=GREEDY, prompts=PROMPTS[:1], processors=[RepetitionPenaltyLogitsProcessor(1.3)])
    np.testing.assert_array_equal(alone[0], by_theirs[0].token_ids)
    never_again = run(model, sampling=replace(GREEDY, presence_penalty=1e4))
    for done in never_again:
        written = done.token_ids[done.n_prompt_tokens :].tolist()
        assert len(set(written)) == len(written)


def test_a_stop_text_ends_a_row_with_the_token_that_completes_it(model_of):
    model = without_stop(model_of("qwen3"))
    plain = run(model, sampling=GREEDY)
    written = plain[0].token_ids[plain[0].n_prompt_tokens :].tolist()
    text = model.tokenizer.decode(written[:4])
    stopped = run(model, sampling=replace(GREEDY, stop=(text[-3:],)))
    done = stopped[0]
    own = done.token_ids[done.n_prompt_tokens :].tolist()
    assert done.finish_reason == "stop" and own == written[: len(own)] and len(own) <= 4
    assert text[-3:] in model.tokenizer.decode(own) and text[-3:] not in model.tokenizer.decode(own[:-1])


@pytest.mark.parametrize(
    "bad",
    [{"top_k": -1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"stop": ("",)}],
    ids=lambda bad: next(iter(bad)),
)
def test_sampling_out_of_range_is_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True),
    top_p=st.floats(0.05, 1.0),
)
def test_a_draw_is_always_in_the_nucleus(weights, uniform, top_p):
    p = torch.tensor(weights) / sum(weights)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    token, _, _ = sample(p.log()[None], sampling, torch.tensor([uniform], dtype=torch.float64))
    more_likely = p[p > p[token] + 1e-6].sum()
    assert more_likely < top_p + 1e-5


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).repeat(4000, 1)
    token, _, _ = sample(logits, HOT, torch.from_numpy(np.random.default_rng(0).random(4000)))
    share = torch.bincount(token, minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.03, rtol=0)


def test_greedy_is_hugging_face_greedy(family, model_of):
    model = model_of(family)
    stops = sorted(model.stop_ids)
    for prompt, ours in zip(PROMPTS, run(model, sampling=GREEDY), strict=True):
        theirs = model.hf.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=16, pad_token_id=0, eos_token_id=stops,
        )  # fmt: skip
        assert ours.token_ids.tolist() == theirs[0].tolist()
        assert ours.finish_reason == ("stop" if theirs[0, -1] in stops else "length")


def test_a_sequence_does_not_depend_on_its_batch(family, model_of):
    model = model_of(family)
    together = run(model)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = run(model, [prompt], seeds=[i])
        assert alone.token_ids.tolist() == together[i].token_ids.tolist()
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=2e-5)
        np.testing.assert_allclose(alone.entropies, together[i].entropies, atol=2e-5)


def test_capture_while_decoding_is_replay(family, model_of):
    model = model_of(family)
    sites = [Site(point, layer) for layer in range(model.n_layers) for point in ("resid_post", "z", "mlp_out")]
    written = run(model, read=sites)
    assert len({len(c.token_ids) for c in written}) > 1  # some ended before others
    replayed = replay(model, [c.token_ids.tolist() for c in written], sites)
    for completion, seen in zip(written, replayed, strict=True):
        for site in sites:
            assert len(completion.activations[site]) == len(completion.token_ids) - 1
            torch.testing.assert_close(completion.activations[site], seen[site], rtol=1e-5, atol=5e-5)


def test_logprobs_are_those_of_the_full_pass(model_of):
    model = model_of("qwen3")
    (completion,) = run(model, PROMPTS[:1], Sampling(temperature=0.7, max_new_tokens=12))
    ids = torch.tensor(completion.token_ids)[None]
    logits = model.backend.forward(ids, mask=torch.ones_like(ids)).logits[0, 2:-1] / 0.7
    logprobs = logits.log_softmax(-1)
    expected = logprobs.gather(1, ids[0, 3:, None])[:, 0]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)
    np.testing.assert_allclose(completion.entropies, -(logprobs.exp() * logprobs).sum(-1), atol=1e-5)


def test_seeds_decide_and_a_longer_run_begins_alike(model_of):
    model = without_stop(model_of("llama"))
    short, long = (run(model, PROMPTS[:1], replace(HOT, max_new_tokens=n))[0].token_ids for n in (6, 24))
    assert long[: len(short)].tolist() == short.tolist()
    assert run(model, PROMPTS[:1], seeds=[5])[0].token_ids.tolist() != long.tolist()


def test_a_stop_token_ends_a_sequence_and_the_others_go_on(model_of):
    model = without_stop(model_of("gpt2"))
    free = run(model)
    stop = int(free[1].token_ids[len(PROMPTS[1]) + 3])
    model.__dict__["stop_ids"] = frozenset({stop})
    for before, after in zip(free, run(model), strict=True):
        generated = before.token_ids[before.n_prompt_tokens :].tolist()
        length = generated.index(stop) + 1 if stop in generated else len(generated)
        assert after.token_ids[after.n_prompt_tokens :].tolist() == generated[:length]
        assert after.finish_reason == ("stop" if stop in generated else "length")
        assert len(after.logprobs) == len(after.entropies) == length


@pytest.mark.parametrize(
    "family",
    ["qwen3_next", "qwen3_5", "falcon_h1", "jamba", "nemotron_h", "granitemoehybrid", "lfm2", "mamba", "falcon_mamba"],
)
def test_a_row_that_ends_leaves_the_recurrent_states_of_the_others(family, tokenizer):
    model = without_stop(load_model(tiny_of(family), tokenizer=tokenizer))
    model.__dict__["stop_ids"] = frozenset({int(run(model)[0].token_ids[len(PROMPTS[0]) + 2])})
    together = run(model)
    alone = [run(model, [prompt], seeds=[i])[0] for i, prompt in enumerate(PROMPTS)]
    assert len({len(done.token_ids) - done.n_prompt_tokens for done in together}) > 1
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_a_full_context_ends_a_sequence(model_of):
    model = without_stop(model_of("mistral"))
    long = [3 + i % 90 for i in range(model.context_length - 2)]
    full, free = run(model, [long, PROMPTS[0]])
    assert len(full.token_ids) == model.context_length and full.finish_reason == "length"
    assert len(free.logprobs) == 24
    with pytest.raises(ContextError, match="prompt 1 has 128 tokens and the context holds 128"):
        run(model, [PROMPTS[0], [*long, 5, 6]])


def test_steps_tell_which_sequences_the_rows_are(model_of):
    model = model_of("llama")
    steps, met = [], []

    def edit(activation, where):
        met.append(where)
        return activation

    written = run(model, write={Site("resid_post", 1): edit}, on_step=steps.append)
    fed = {row: [] for row in range(len(PROMPTS))}
    for step, where in zip(steps, met, strict=True):
        assert torch.equal(step.ids, where.ids)
        for row, ids, index in zip(step.rows.tolist(), where.ids.tolist(), where.index.tolist(), strict=True):
            fed[row] += [(at, token) for at, token in zip(index, ids, strict=True) if at >= 0]
    for row, completion in enumerate(written):
        assert fed[row] == list(enumerate(completion.token_ids[:-1].tolist()))


def test_an_edit_steers_what_is_written(model_of):
    model = model_of("qwen3")
    slope = torch.linspace(-8, 8, model.d_model)
    plain = run(model, sampling=GREEDY)
    steered = run(model, sampling=GREEDY, write={Site("resid_post", 1): lambda a, _: a + slope})
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(plain, steered, strict=True))


def test_what_cannot_be_decoded(model_of):
    model = model_of("llama")
    assert run(model, []) == []
    with pytest.raises(InputError, match="4 prompts but 1 seeds"):
        run(model, seeds=[0])
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        run(model, [[5], []])
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        run(model, sampling=Sampling(max_new_tokens=0))
    with pytest.raises(SiteError, match=r"attn_probs\.0 cannot be read while decoding"):
        run(model, read=[Site("attn_probs", 0)])
    with pytest.raises(InputError, match="token 96 of prompt 0 is not in the vocabulary of 96"):
        run(model, [[5, 96]])
    with pytest.raises(InputError, match="logits of prompt 0 are not finite"):
        run(model, write={Site("resid_post", 1): lambda a, _: a * torch.nan})
