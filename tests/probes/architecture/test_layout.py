"""The layout table against live models: every row holds, and a row that does not is found out."""

from dataclasses import replace

import pytest
from transformers import BertConfig, PreTrainedModel

from reasonscope.data.errors import ArchitectureError, SiteError
from reasonscope.probes.architecture.layout import LAYOUTS, Layout, check_layout, head_count, resolve_layout
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.layout_check import prove_layout


def test_every_row_has_a_tiny_model_that_proves_it(family, hf_of):
    prove_layout(hf_of(family), resolve_layout(hf_of(family).config))


def test_table_has_the_thirteen_families():
    wanted = (
        "qwen2 qwen3 qwen3_moe deepseek_v3 llama mistral gemma2 gemma3_text phi3 gpt2 gpt_neox olmo2 gpt_oss".split()
    )
    assert sorted(LAYOUTS) == sorted(wanted)


def test_output_weights_split_by_head(family, hf_of):
    hf = hf_of(family)
    weight, bias = resolve_layout(hf.config).output_weights(hf, 1)
    assert weight.shape[0] == head_count(hf.config) and weight.shape[2] == hf.config.hidden_size
    assert (bias is not None) == (family in ("gpt2", "gpt_neox")) or family == "gpt_oss"


def test_unknown_architecture_shows_how_to_add_a_row():
    with pytest.raises(ArchitectureError, match=r"'bert'.*load_model\(…, layout=.*LAYOUTS.*Layout\(model_type='llama'"):
        resolve_layout(BertConfig())


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"o_proj": "self_attn.out"}, r"o_proj: no 'self_attn.out' in block 0"),
        ("llama", {"blocks": "model.h"}, r"blocks: the model has no module 'model.h'"),
        ("llama", {"final_norm": "model.ln"}, r"final_norm: the model has no module"),
        ("llama", {"router": "mlp.gate"}, r"router: no 'mlp.gate' in any block"),
        ("llama", {"o_proj": "self_attn.q_proj"}, "what the heads of block 0 write does not sum to attn_out"),
        ("gemma2", {"attn_out": "self_attn"}, r"differs from resid_post"),
        ("olmo2", {"mlp_out": "mlp"}, r"differs from resid_post"),
        ("gpt_oss", {"sinks": False}, r"attention rows of block 0 sum to"),
    ],
)
def test_a_wrong_row_is_found_out(family, change, message, hf_of):
    hf: PreTrainedModel = hf_of(family)
    row: Layout = replace(resolve_layout(hf.config), **change)
    with pytest.raises(ArchitectureError, match=message):
        prove_layout(hf, row)


def test_a_number_of_blocks_that_differs_from_the_config(hf_of):
    hf = hf_of("llama")
    row = replace(resolve_layout(hf.config), blocks="model.layers.0")
    with pytest.raises(ArchitectureError, match="its config says 3"):
        check_layout(hf, row)


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("llama", "router.0", "not a mixture of experts"),
        ("qwen3_moe", "router.1", "block 1 of this qwen3_moe has no router"),  # a dense block between sparse ones
        ("llama", "z.3", r"3 layers, so the last is z\.2"),
    ],
)
def test_a_site_that_the_model_does_not_have(family, site, message, hf_of):
    hf = hf_of(family)
    with pytest.raises(SiteError, match=message):
        resolve_layout(hf.config).module(hf, Site.parse(site))
