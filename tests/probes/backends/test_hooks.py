"""The hooks backend: exact numbers on a model small enough to compute by hand, then every family against Hugging Face."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import gradients, positions
from reasonscope.probes.backends.hooks import HooksBackend
from reasonscope.probes.generation.activations import capture
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.layout_derivation import derive_layout

SEQUENCES = [[5, 9, 23, 41, 8, 77, 60, 3, 12], [33, 4, 50, 18], [7, 88, 21, 64, 90, 15]]
CPU = torch.device("cpu")


def sites(model, *points):
    return [Site(point, layer) for layer in range(model.n_layers) for point in points]


def test_by_hand():
    """Uniform attention over one-hot vectors: each token's attention adds the mean of all tokens up to it."""
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    hf = LlamaForCausalLM(config).eval()
    block, layout = hf.model.layers[0], derive_layout(hf)
    with torch.no_grad():
        for parameter in (*block.self_attn.parameters(), *block.mlp.parameters()):
            parameter.zero_()  # no query, no key: all scores alike; no MLP
        block.self_attn.v_proj.weight.copy_(torch.eye(4))
        block.self_attn.o_proj.weight.copy_(3 * torch.eye(4))
        hf.model.embed_tokens.weight.copy_(2 * torch.eye(4))  # root mean square 1: the norm leaves them as they are
    read = [Site.parse(f"{p}.0") for p in ("resid_pre", "z", "attn_probs", "attn_out", "mlp_out", "resid_post")]
    ids, mask = torch.tensor([[0, 1, 3]]), torch.tensor([[0, 1, 1]])  # the first column is padding
    seen = HooksBackend(hf, layout).forward(ids, mask=mask, read=read).activations
    pre, z, probabilities, attention, mlp, post = (seen[site][0] for site in read)
    assert torch.equal(pre[1:], torch.tensor([[0.0, 2, 0, 0], [0, 0, 0, 2]]))
    assert torch.equal(probabilities[0, 1:], torch.tensor([[0.0, 1, 0], [0, 0.5, 0.5]]))
    assert torch.equal(z[1:, 0], torch.tensor([[0.0, 2, 0, 0], [0, 1, 0, 1]]))
    assert torch.equal(attention[1:], torch.tensor([[0.0, 6, 0, 0], [0, 3, 0, 3]]))
    assert torch.equal(mlp, torch.zeros(3, 4))
    assert torch.equal(post[1:], torch.tensor([[0.0, 8, 0, 0], [0, 3, 0, 5]]))


def test_positions_count_real_tokens_after_the_cache():
    ids, mask = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(ids, mask).index.tolist() == [[1, 2], [3, 4]]
    assert positions(mask, mask).index.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_reads_are_the_hidden_states(family, model_of):
    model = model_of(family)
    ids = torch.tensor([SEQUENCES[0]])
    read = sites(model, "resid_pre", "resid_post")
    seen = model.backend.forward(ids, mask=torch.ones_like(ids), read=read).activations
    with torch.no_grad():
        states = model.hf(ids, output_hidden_states=True).hidden_states
    for layer in range(model.n_layers):
        assert torch.equal(seen[Site("resid_pre", layer)], states[layer])
        if layer < model.n_layers - 1:
            assert torch.equal(seen[Site("resid_post", layer)], states[layer + 1])
    last = seen[Site("resid_post", model.n_layers - 1)]
    assert not torch.allclose(last, states[-1], atol=1e-2)  # the trap: there it is behind the final norm
    assert torch.equal(model.final_norm(last), states[-1])


def test_shapes_and_what_is_added(family, model_of):
    model = model_of(family)
    ids = torch.tensor(SEQUENCES[0])[None]
    read = sites(model, "resid_pre", "attn_out", "mlp_out", "resid_post", "z", "attn_probs")
    seen = model.backend.forward(ids, mask=torch.ones_like(ids), read=read).activations
    for layer in range(model.n_layers):
        pre, attention, mlp, post, z, probabilities = (seen[site] for site in read[6 * layer : 6 * layer + 6])
        torch.testing.assert_close(pre + attention + mlp, post, rtol=0, atol=1e-5)
        assert attention.norm() > 1e-2 and mlp.norm() > 1e-2
        assert z.shape[:3] == (1, 9, model.n_heads) and probabilities.shape == (1, model.n_heads, 9, 9)
        assert probabilities.triu(1).abs().max() == 0  # causal
        sums = probabilities.sum(-1)
        assert (sums < 1).all() if model.layout.sinks else torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_left_padded_batch_is_each_alone_and_so_is_the_cache(family, model_of):
    """One ragged batch three ways: at once, in three passes on the cache, and sequence by sequence."""
    model = model_of(family)
    read = sites(model, "resid_post", "z", "attn_probs")
    ids, mask = left_padded(SEQUENCES, CPU)
    whole = model.backend.forward(ids, mask=mask, read=read)
    cache = None
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        part = model.backend.forward(ids[:, start:stop], mask=mask[:, :stop], cache=cache, use_cache=True, read=read)
        cache = part.cache
    torch.testing.assert_close(part.logits, whole.logits[:, 7:], rtol=1e-5, atol=2e-5)
    for row, sequence in enumerate(SEQUENCES):
        one = torch.tensor([sequence])
        alone = model.backend.forward(one, mask=torch.ones_like(one), read=read)
        torch.testing.assert_close(whole.logits[row, -len(sequence) :], alone.logits[0], rtol=1e-5, atol=2e-5)
        for site in read:
            n, a, b, c = (
                len(sequence),
                whole.activations[site][row],
                alone.activations[site][0],
                part.activations[site][row],
            )
            if site.point == "attn_probs":
                torch.testing.assert_close(a[:, -n:, -n:], b, rtol=1e-5, atol=2e-5)
                torch.testing.assert_close(c, a[:, -2:], rtol=1e-5, atol=2e-5)
            else:
                torch.testing.assert_close(a[-n:], b, rtol=1e-5, atol=2e-5)
                torch.testing.assert_close(c, a[-2:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("point", ["resid_pre", "z", "attn_out", "mlp_out", "resid_post"])
def test_an_edit_changes_later_tokens_only(family, point, model_of):
    model = model_of(family)
    ids = torch.tensor([SEQUENCES[0]])
    mask, site, below = torch.ones_like(ids), Site(point, 1), Site("resid_post", 0)

    def edit(activation, where):
        slope = torch.linspace(-1, 1, activation.shape[-1])
        at = (where.index == 4).view(1, -1, *[1] * (activation.dim() - 2))
        return torch.where(at, activation + slope, activation)

    plain = model.backend.forward(ids, mask=mask, read=[site, below])
    edited = model.backend.forward(ids, mask=mask, read=[site, below], write={site: edit})
    moved = (edited.activations[site] - plain.activations[site]).flatten(2).abs().amax(-1)[0]
    assert moved[4] > 0.5 and moved[:4].max() == 0 and moved[5:].max() == 0  # read after the edit, at its place only
    assert torch.equal(edited.activations[below], plain.activations[below])
    change = (edited.logits - plain.logits)[0].abs().amax(-1)
    # An expert multiplies the tokens that chose it together: where the later ones choose otherwise, the earlier round otherwise.
    assert change[:4].max() <= (1e-6 if model.layout.layers_with("router") else 0) and (change[4:] > 1e-5).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_router_is_read_and_written(family, model_of):
    model = model_of(family)
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    mask, site = torch.ones_like(ids), Site("router", 2)
    plain = model.backend.forward(ids, mask=mask, read=[site])
    same = model.backend.forward(ids, mask=mask, write={site: lambda a, _: a.clone()})
    reversed_ = model.backend.forward(ids, mask=mask, read=[site], write={site: lambda a, _: a.flip(-1)})
    assert plain.activations[site].shape == (2, 9, 8 if family == "deepseek_v3" else 4)
    assert torch.equal(plain.logits, same.logits)  # the routing that we compute is the model's own
    assert torch.equal(reversed_.activations[site], plain.activations[site].flip(-1))
    assert not torch.allclose(reversed_.logits, plain.logits, atol=1e-3)


def test_no_hook_and_no_setting_is_left_by_an_edit_that_fails(family, model_of):
    model = model_of(family)
    ids = torch.tensor([SEQUENCES[0]])
    before = model.hf.config._attn_implementation

    def edit(activation, _):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.backend.forward(
            ids, mask=torch.ones_like(ids), read=[Site("attn_probs", 0)], write={Site("z", 1): edit}
        )  # the fixture of tests/probes counts the hooks
    assert model.hf.config._attn_implementation == before


def test_edits_that_cannot_be(model_of):
    model = model_of("llama")
    ids = torch.tensor([SEQUENCES[0]])
    mask = torch.ones_like(ids)
    with pytest.raises(SiteError, match=r"attn_probs.1 can be read but not written; write z.1"):
        model.backend.forward(ids, mask=mask, write={Site("attn_probs", 1): lambda a, _: a})
    with pytest.raises(InputError, match=r"the edit at z.1 returned .*float64; it must return .*float32"):
        model.backend.forward(ids, mask=mask, write={Site("z", 1): lambda a, _: a.double()})
    with pytest.raises(SiteError, match="3 layers"):
        model.backend.forward(ids, mask=mask, read=[Site("z", 7)])


def test_gradients_flow_only_if_they_are_asked_for(model_of):
    model = model_of("qwen3")
    ids = torch.tensor([SEQUENCES[0]])
    mask, site = torch.ones_like(ids), Site("resid_post", 0)
    strength = torch.ones((), requires_grad=True)
    write = {site: lambda a, _: a * strength}
    assert not model.backend.forward(ids, mask=mask, write=write).logits.requires_grad
    with gradients():
        model.backend.forward(ids, mask=mask, write=write).logits.sum().backward()
    assert strength.grad is not None and strength.grad.abs() > 0
    model.hf.zero_grad()


def test_a_pass_in_inference_mode_leaves_ordinary_tensors(model_of):
    """Those that are returned, those that an edit or a hook of `capture` sees, and those that decoding records can all be trained on."""
    model = model_of("qwen3")
    ids, site = torch.tensor([SEQUENCES[0]]), Site("resid_post", 1)
    seen = []

    def edit(activation, where):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        activation += 1  # in place, as in a pass without gradients
        seen.append(activation)
        return activation

    out = model.backend.forward(ids, mask=None, read=[site, Site("z", 0)], write={site: edit})
    plain = model.backend.forward(ids, mask=None, read=[site])
    torch.testing.assert_close(out.activations[site], plain.activations[site] + 1)
    with capture(model, [site]) as found:
        (done,) = generate(model, SEQUENCES[:1], Sampling(max_new_tokens=3), seeds=[0], read=[site])
    leaving = [out.logits, *out.activations.values(), *seen, *found.passes(site), done.activations[site]]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in leaving)
    probe = torch.nn.Linear(model.d_model, 1)
    sum(probe(one).sum() for one in (seen[0], found[site], done.activations[site])).backward()
    assert probe.weight.grad is not None


def test_gradients_flow_through_a_pass_that_continues_another(model_of):
    model = model_of("qwen3")
    ids, site = torch.tensor([SEQUENCES[0]]), Site("resid_post", 0)
    before = model.backend.forward(ids[:, :5], mask=None, use_cache=True)
    strength = torch.ones((), requires_grad=True)
    with gradients():
        out = model.backend.forward(ids[:, 5:], mask=None, cache=before.cache, write={site: lambda a, _: a * strength})
    out.logits.sum().backward()
    assert strength.grad is not None and strength.grad.abs() > 0
    torch.testing.assert_close(out.logits.detach(), model.backend.forward(ids, mask=None).logits[:, 5:])
    model.hf.zero_grad()


def test_logits_of_the_last_token_alone(model_of):
    model = model_of("gemma2")
    ids, mask = left_padded(SEQUENCES, CPU)
    last = model.backend.forward(ids, mask=mask, last_logits_only=True)
    assert last.cache is None and last.logits.shape == (3, 1, 96)
    torch.testing.assert_close(last.logits, model.backend.forward(ids, mask=mask).logits[:, -1:])
