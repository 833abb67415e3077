"""Activations of the user's own passes, of one pass over a text, and of finished sequences."""

import pytest
import torch

from reasonscope.data.errors import ContextError, InputError, SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import capture, replay, run_with_cache

IDS = torch.tensor([[5, 9, 23, 41, 8, 77]])


def test_capture_around_generate_has_prompt_plus_generated_less_one_rows(family, model_of):
    model = model_of(family)
    with capture(model, ["resid_post.1", "z.0"]) as seen:
        out = model.hf.generate(
            IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=7, pad_token_id=0
        )
    (replayed,) = replay(model, out.tolist(), [Site("resid_post", 1), Site("z", 0)])
    for site in ("resid_post.1", "z.0"):
        assert seen[site].shape[1] == out.shape[1] - 1
        torch.testing.assert_close(seen[site][0], replayed[Site.parse(site)], rtol=1e-5, atol=5e-5)


def test_several_passes_are_joined_or_kept_apart(model_of):
    model = model_of("llama")
    with capture(model, ["attn_probs.0", "resid_post.0"]) as seen, torch.no_grad():
        model.hf(IDS)
        model.hf(IDS[:, :2])
    assert model.hf.config._attn_implementation == "sdpa"
    assert seen["blocks.0.hook_resid_post"].shape == (1, 8, 32) and len(seen.passes("resid_post.0")) == 2
    assert [p.shape[-1] for p in seen.passes("attn_probs.0")] == [6, 2] and set(seen) == set(
        map(Site.parse, ("attn_probs.0", "resid_post.0"))
    )
    with pytest.raises(InputError, match=r"the 2 passes of attn_probs.0 differ in shape .* passes\('attn_probs.0'\)"):
        seen["attn_probs.0"]


def test_capture_of_nothing_and_of_no_site(model_of):
    model = model_of("llama")
    with capture(model, ["mlp_out.2"]) as seen:
        pass
    with pytest.raises(InputError, match=r"no activations of mlp_out.2: run the model"):
        seen["mlp_out.2"]
    with pytest.raises(SiteError, match="3 layers"), capture(model, ["mlp_out.0", "mlp_out.3"]):
        raise AssertionError("not reached")


def test_capture_can_be_trained_through(model_of):
    model = model_of("gpt2")
    with capture(model, ["resid_post.1"]) as seen:
        model.hf(IDS)
    seen["resid_post.1"].sum().backward()
    assert model.hf.transformer.wte.weight.grad.abs().sum() > 0
    model.hf.zero_grad()


def test_run_with_cache_takes_a_text_ids_or_a_batch(model_of):
    model = model_of("qwen3")
    logits, seen = run_with_cache(model, "1 + 1", ["resid_post.1", "attn_probs.0"])
    ids = model.encode_text("1 + 1")
    again, _ = run_with_cache(model, ids, [])
    batch, _ = run_with_cache(model, torch.tensor([ids, ids]), [])
    assert ids[0] == model.tokenizer.bos_token_id and logits.shape == (1, len(ids), 96)
    assert seen[Site("attn_probs", 0)].shape == (1, 4, len(ids), len(ids))
    torch.testing.assert_close(logits, again)
    torch.testing.assert_close(batch[1:], again)


def test_replay_of_attention_leaves_padding_out(model_of):
    model, site = model_of("gemma2"), Site("attn_probs", 2)
    short, long = [5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]
    together = replay(model, [short, long], [site])
    assert [seen[site].shape for seen in together] == [(4, 3, 3), (4, 6, 6)]
    torch.testing.assert_close(together[0][site], replay(model, [short], [site])[0][site])


def test_what_cannot_be_fed(model_of):
    model = model_of("llama")
    with pytest.raises(ContextError, match=r"a sequence of 129 tokens; the context of .* holds 128"):
        run_with_cache(model, [5] * 129, [])
    with pytest.raises(InputError, match="has no token to feed"):
        replay(model, [[5]], [])
    with pytest.raises(InputError, match="token 300 of prompt 0"):
        run_with_cache(model, [5, 300], [])
