"""Layouts are derived from live models of every kind, proved on them, and a layout that is wrong is found out."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel

from reasonscope.data.errors import ArchitectureError, SiteError
from reasonscope.probes.architecture.families import tiny_of
from reasonscope.probes.architecture.layout import Layout, Term, check_layout
from reasonscope.probes.architecture.shrinking import class_for
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.hooks import HooksBackend
from reasonscope.probes.models.layout_check import prove_layout, proved
from reasonscope.probes.models.layout_derivation import derive_layout, layout_of_structure


@pytest.fixture
def layout_of(hf_of):
    """The derived and proved layout of a family."""
    return lambda family: proved(hf_of(family), derive_layout(hf_of(family)))


def test_every_family_of_the_table_is_proved(family, layout_of):
    layout = layout_of(family)
    assert all(
        {"resid_pre", "z", "attn_probs", "attn_out", "mlp_out", "resid_post"} <= set(b.points) for b in layout.of_block
    )
    assert not any(block.lacks for block in layout.of_block)


def summary(layout: Layout, layer: int) -> str:
    """What a block adds to the stream, with its scales, as one line."""
    block = layout.of_block[layer]
    parts = {"attn": block.attn_out, "mixer": block.mixer_out, "mlp": block.mlp_out}
    found = [f"{name}={'+'.join(_term(term) for term in terms)}" for name, terms in parts.items() if terms]
    return " ".join([*found, *([] if block.stream_scale == 1 else [f"stream*{block.stream_scale:.3g}"])])


def _term(term: Term) -> str:
    return term.path + ("" if term.scale == 1 else f"*{term.scale:.3g}")


@pytest.mark.parametrize(
    ("kind", "config", "blocks"),
    [
        ("dense", {"model_type": "qwen2"}, {"attn=self_attn mlp=mlp"}),
        ("parallel", {"model_type": "cohere2"}, {"attn=self_attn mlp=mlp"}),
        ("experts beside a shared one", {"model_type": "qwen2_moe"}, {"attn=self_attn mlp=mlp"}),
        ("norms after both", {"model_type": "olmo3"}, {"attn=post_attention_layernorm mlp=post_feedforward_layernorm"}),
        (
            "linear and full attention in turn",
            {"model_type": "qwen3_next"},
            {"mixer=linear_attn mlp=mlp", "attn=self_attn mlp=mlp"},
        ),
        ("one part a block", {"model_type": "nemotron_h"}, {"mixer=mixer", "attn=mixer", "mlp=mixer"}),
        (
            "mixer and attention side by side",
            {"model_type": "falcon_h1", "ssm_out_multiplier": 0.7, "attention_out_multiplier": 0.3},
            {"attn=self_attn*0.3 mixer=mamba*0.7 mlp=feed_forward"},
        ),
        (
            "a multiplier on what is added",
            {"model_type": "granitemoehybrid", "residual_multiplier": 0.22},
            {
                "mixer=mamba*0.22 mlp=block_sparse_moe*0.22+shared_mlp*0.22",
                "attn=self_attn*0.22 mlp=block_sparse_moe*0.22+shared_mlp*0.22",
            },
        ),
        (
            "the residual inside the modules",
            {"model_type": "bloom"},
            {"attn=self_attention.dense mlp=mlp.dense_4h_to_h"},
        ),
        ("a text tower", {"model_type": "qwen3_vl"}, {"attn=self_attn mlp=mlp"}),
    ],
)
def test_each_kind_of_block_is_derived(kind, config, blocks):
    hf = tiny_of(**config)
    layout = proved(hf, derive_layout(hf))
    assert {summary(layout, layer) for layer in range(len(layout.of_block))} == blocks, kind


def test_a_block_that_scales_the_whole_stream():
    hf = tiny_of("gemma4_text")
    for layer, block in enumerate(hf.model.layers):
        block.layer_scalar.fill_(0.5 + layer)
    layout = proved(hf, derive_layout(hf))
    assert [block.stream_scale for block in layout.of_block] == [0.5 + i for i in range(len(layout.of_block))]
    assert layout.scales_stream
    assert [term.path for term in layout.of_block[0].mlp_out] == [
        "post_feedforward_layernorm",
        "post_per_layer_input_norm",
    ]


def test_blocks_without_attention_have_no_heads_and_say_so():
    layout = derive_layout(tiny_of("qwen3_next"))
    assert layout.layers_with("attn_probs") == layout.layers_with("z") == (3,) and layout.layers_with("mixer_out") == (
        0,
        1,
        2,
    )
    with pytest.raises(SiteError, match=r"z\.0: block 0 of this qwen3_next has no z; blocks 3 have it"):
        layout.place(Site("z", 0))


def test_a_stream_that_is_normalised_between_its_parts_is_refused():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    hf = BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval()
    with pytest.raises(
        ArchitectureError, match="what block 0 of BertLMHeadModel does to the residual stream is not a sum"
    ):
        derive_layout(hf)


def test_a_model_without_blocks_is_refused(hf_of):
    hf = tiny_of("llama")
    hf.model.layers = nn.ModuleList()
    with pytest.raises(ArchitectureError, match="no list of blocks that run one after the other"):
        derive_layout(hf)


def test_the_layout_of_a_structure_is_that_of_the_model_with_weights():
    for family in ("qwen3_next", "gemma2", "qwen3_moe"):
        hf = tiny_of(family)
        with torch.device("meta"):
            empty = class_for(hf.config).from_config(hf.config)
        assert layout_of_structure(empty) == derive_layout(hf)


def test_output_weights_split_by_head(family, hf_of, layout_of):
    hf, layout = hf_of(family), layout_of(family)
    weight, bias = layout.output_weights(hf, 1)
    assert weight.shape[0] == layout.n_heads == 4 and weight.shape[2] == hf.config.hidden_size
    assert (bias is not None) == (family in ("gpt2", "gpt_neox")) or family == "gpt_oss"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"o_proj": "self_attn.out"}, r"z: no 'self_attn.out' in block 0"),
        ("llama", {"router": "mlp.gate"}, r"router: no 'mlp.gate' in block 0"),
        ("llama", {"o_proj": "self_attn.q_proj"}, "what the heads of block 0 write does not sum to attn_out"),
        ("llama", {"down_proj": "mlp.up_proj"}, "what the neurons of block 0 write does not sum to mlp_out"),
        (
            "llama",
            {"q": "self_attn.k_proj", "n_kv_heads": 4},
            r"writing q\.0 at one token does not change the attention that it should",
        ),
        ("llama", {"v": "self_attn.k_proj"}, r"writing v\.0 at one token does not change the attention that it should"),
        ("gemma2", {"attn_out": (Term(path="self_attn"),)}, r"differs from resid_post"),
        ("olmo2", {"mlp_out": (Term(path="mlp"),)}, r"differs from resid_post"),
        ("llama", {"mlp_out": (Term(path="mlp", scale=0.9),)}, r"differs from resid_post"),
        ("gpt_oss", {"sinks": False}, r"attention rows of block 0 sum to"),
    ],
)
def test_a_wrong_layout_is_found_out(family, change, message, hf_of, layout_of):
    hf: PreTrainedModel = hf_of(family)
    right = layout_of(family)
    wrong: Layout = replace(right, of_block=tuple(replace(block, **change) for block in right.of_block))
    with pytest.raises(ArchitectureError, match=message):
        prove_layout(hf, wrong)


@pytest.mark.parametrize(
    ("name", "path"), [("blocks", "model.h"), ("final_norm", "model.ln"), ("embedding", "model.wte")]
)
def test_a_module_that_is_not_there(name, path, hf_of, layout_of):
    with pytest.raises(ArchitectureError, match=f"{name}: the model has no module '{path}'"):
        check_layout(hf_of("llama"), replace(layout_of("llama"), **{name: path}))


def test_a_number_of_blocks_that_differs_from_the_layout(hf_of, layout_of):
    layout = layout_of("llama")
    with pytest.raises(ArchitectureError, match="the model has 3, but its layout says 2"):
        check_layout(hf_of("llama"), replace(layout, of_block=layout.of_block[:2]))


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("llama", "router.0", "not a mixture of experts"),
        ("qwen3_moe", "router.1", "block 1 of this qwen3_moe has no router"),  # a dense block between sparse ones
        ("llama", "z.3", r"3 layers, so the last is z\.2"),
        ("llama", "mixer_out.1", "no mixer beside attention"),
        ("llama", "embed.1", r"write embed\.0"),
        ("gpt_neox", "resid_mid.0", "adds attention and MLP at once"),
        ("qwen3_moe", "mlp_post.0", "block 0 of this qwen3_moe has no mlp_post; blocks 1 have it"),
    ],
)
def test_a_site_that_the_model_does_not_have(family, site, message, layout_of):
    with pytest.raises(SiteError, match=message):
        layout_of(family).place(Site.parse(site))


def test_what_the_points_inside_a_block_hold(hf_of, layout_of, model_of):
    """Against the modules' own arithmetic: values weighed by attention, the stream after attention, neurons through their projection."""
    model = model_of("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    names = ("embed", "resid_pre", "q", "k", "v", "attn_probs", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out")
    sites = {name: Site(name, 0) for name in names}
    out = model.backend.forward(ids, mask=torch.ones_like(ids), read=tuple(sites.values())).activations
    seen = {name: out[site] for name, site in sites.items()}
    assert seen["q"].shape[2:] == (4, 8) and seen["k"].shape[2:] == seen["v"].shape[2:] == (2, 8)
    values = seen["v"].repeat_interleave(2, dim=2)
    torch.testing.assert_close(
        torch.einsum("bhqk,bkhd->bqhd", seen["attn_probs"], values), seen["z"], atol=1e-5, rtol=0
    )
    assert torch.equal(seen["resid_pre"] + seen["attn_out"], seen["resid_mid"]) and torch.equal(
        seen["embed"], seen["resid_pre"]
    )
    block = model.hf.model.layers[0]
    with torch.no_grad():
        assert torch.equal(block.mlp.down_proj(seen["mlp_post"]), seen["mlp_out"])
        assert torch.equal(block.mlp(block.post_attention_layernorm(seen["resid_mid"])), seen["mlp_out"])


def test_an_edit_of_resid_mid_goes_on_in_the_stream(model_of):
    """A state is added after attention: MLP and stream both get it, as they would from the attention itself."""
    model = model_of("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    push = torch.linspace(-1, 1, model.d_model)
    read = [Site("resid_post", 0), Site("resid_mid", 0)]
    by_mid, by_attention = (
        model.backend.forward(ids, mask=torch.ones_like(ids), read=read, write={Site(point, 0): lambda a, _: a + push})
        for point in ("resid_mid", "attn_out")
    )
    torch.testing.assert_close(by_mid.logits, by_attention.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_mid.activations[read[1]], by_attention.activations[read[1]], atol=1e-5, rtol=0)


def test_a_scaled_site_holds_what_is_added_and_an_edit_of_nothing_changes_no_bit():
    hf = tiny_of("granitemoehybrid", residual_multiplier=0.22)
    layout = proved(hf, derive_layout(hf))
    engine, ids = HooksBackend(hf, layout), torch.tensor([[5, 6, 7, 8, 9]])
    sites = [Site(point, 0) for point in ("resid_pre", "mixer_out", "mlp_out", "resid_post")]
    plain = engine.forward(ids, mask=None, read=sites)
    pre, mixer, mlp, post = (plain.activations[site] for site in sites)
    torch.testing.assert_close(pre + mixer + mlp, post, atol=1e-5, rtol=0)
    none = engine.forward(ids, mask=None, write={site: lambda a, _: a + 0.0 for site in sites})
    assert torch.equal(none.logits, plain.logits)
    moved = engine.forward(ids, mask=None, read=sites, write={sites[2]: lambda a, _: a + 1.0})
    torch.testing.assert_close(moved.activations[sites[3]], post + 1.0, atol=1e-5, rtol=0)


def test_the_points_of_a_family_are_those_of_its_modules(layout_of):
    assert Counter(layout_of("phi3").of_block[0].points)["q"] == 0  # one projection for queries, keys and values
    assert layout_of("qwen3").of_block[0].n_kv_heads == 2
