"""Models from other files than a folder of safetensors: GGUF, adapters, packed weights; each needs its package and says so."""

import json
import shutil
import sys
import warnings
from copy import deepcopy
from functools import partial
from types import MappingProxyType
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, PreTrainedModel, Qwen2Config
from transformers.utils import hub

from reasonscope.data.errors import InputError, MissingExtraError, ModelLoadError
from reasonscope.probes.architecture.families import tiny_model, tiny_of
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models import loading
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.packing import Packing, packing
from reasonscope.probes.models.prompting import load_prompting

gguf = pytest.importorskip("gguf")

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    path, _, kind = name.rpartition(".")
    if path.startswith("model.layers."):
        layer, _, inside = path.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_NAMES[inside]}.{kind}"
    return f"{_NAMES[path]}.{kind}"


def write_gguf(hf, tokenizer, file):
    """A GGUF file of a Qwen2 model, in float32, with the words of a tokenizer."""
    config, writer = hf.config, gguf.GGUFWriter(str(file), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    words = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])]
    words += [words[3] + words[4], *(f"<unused{i}>" for i in range(config.vocab_size - len(words) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([f"{words[3]} {words[4]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in hf.state_dict().items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_numbers_of_its_model(tmp_path, tokenizer):
    hf = tiny_model("qwen2")
    write_gguf(hf, tokenizer, tmp_path / "tiny.gguf")
    loaded, ids = load_model(str(tmp_path / "tiny.gguf"), tokenizer=tokenizer), torch.tensor([[5, 6, 7, 8]])
    site = Site("mlp_post", 2)
    found = loaded.backend.forward(ids, mask=None, read=[site])
    plain = load_model(hf, tokenizer=tokenizer).backend.forward(ids, mask=None, read=[site])
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.activations[site], plain.activations[site], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantise": "4bit"}, r"m\.gguf is unpacked while it is read.*leave out quantise='4bit' \(--quantise\)"),
        *(
            ({"device": device}, r"m\.gguf is loaded onto one device; give cpu")
            for device in ("auto", "balanced", "sequential", {"": "cpu"}, {"model": 0})
        ),
    ],
)
def test_a_gguf_file_is_neither_packed_nor_spread(tmp_path, change, message):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "m.gguf"), **change)


@pytest.mark.parametrize("source", ["organism", "m.gguf", "./nothing"])
@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("cuda", "Torch not compiled with CUDA enabled|[Nn]o NVIDIA|CUDA"),
        ("cuda:99", "Torch not compiled with CUDA enabled|CUDA"),
        ("gpu", "gpu"),
        ("cuda:x", "Invalid device|cuda"),
        ("", "empty"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_a_line_before_anything_is_loaded(monkeypatch, source, device, why):
    if device == "cuda" and torch.cuda.is_available():
        monkeypatch.setattr(
            loading.torch, "empty", Mock(side_effect=AssertionError("Torch not compiled with CUDA enabled"))
        )
    monkeypatch.setattr(loading, "_find_adapter", Mock(side_effect=AssertionError("begun")))
    monkeypatch.setattr(loading, "_load_gguf", Mock(side_effect=AssertionError("begun")))
    with pytest.raises(InputError, match=why) as refused:
        load_model(source, device=device)
    told = str(refused.value)
    assert f"cannot use the device {device!r}" in told and "give cpu" in told and "\n" not in told


def test_a_model_that_does_not_fit_on_its_device_is_named(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "to", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried")))
    with pytest.raises(ModelLoadError, match="cannot load 'organism': OutOfMemoryError: CUDA out of memory"):
        load_model("organism")


def test_gguf_without_its_package_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'm\.gguf needs the gguf package: pip install "reasonscope\[gguf\]"'):
        load_model(str(tmp_path / "m.gguf"))


def test_a_file_that_is_not_there_or_not_gguf(tmp_path):
    with pytest.raises(ModelLoadError, match="is not a file"):
        load_model(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"something else")
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_model(str(tmp_path / "m.gguf"))


def write_adapter(folder, base, *, weights=True):
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))
    if weights:
        save_file({}, folder / "adapter_model.safetensors")
    return str(folder)


def test_an_adapter_without_peft_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r'is an adapter, which needs peft: pip install "reasonscope\[adapters\]"'
    ):
        load_model(write_adapter(tmp_path / "lora", "base"))


@pytest.fixture
def merging(monkeypatch):
    """A stand-in for peft that writes 1 into one weight of the base, so that a merge can be seen."""

    class PeftModel:
        def __init__(self, model):
            self.model = model

        @classmethod
        def from_pretrained(cls, model, folder):
            return cls(model)

        def merge_and_unload(self):
            with torch.no_grad():
                self.model.lm_head.weight[0] = 1.0
            return self.model

    module = type(sys)("peft")
    module.PeftModel = PeftModel
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "peft", module)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())


def test_an_adapter_is_merged_into_its_base(tmp_path, tokenizer, merging):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = load_model(write_adapter(tmp_path / "lora", str(tmp_path / "base")))
    assert bool((model.hf.lm_head.weight[0] == 1).all()) and model.name == str(tmp_path / "lora")
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def trained(tmp_path, tokenizer):
    """A LoRA adapter that peft made for a tiny model, the tokenizer that it was trained with, and the logits that it gives."""
    peft = pytest.importorskip("peft")
    hf = tiny_model("qwen2")
    hf.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    hf = type(hf).from_pretrained(tmp_path / "base")

    def train(*, rows=None, **options):
        torch.manual_seed(0)
        if rows:
            hf.resize_token_embeddings(rows, mean_resizing=False)
        with warnings.catch_warnings(action="ignore"):  # of what transformers deprecates
            model = peft.get_peft_model(hf, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape) * parameter.requires_grad
        with warnings.catch_warnings(action="ignore"):
            model.save_pretrained(tmp_path / "lora")
        with torch.no_grad():
            return str(tmp_path / "lora"), model(torch.tensor([[5, 6, 7, 8]])).logits

    return train


def logits_of(model):
    return model.backend.forward(torch.tensor([[5, 6, 7, 8]]), mask=None).logits


def test_an_adapter_of_peft_reads_as_it_was_trained(trained, tokenizer, tmp_path):
    folder, expected = trained()
    model, base = load_model(folder), load_model(str(tmp_path / "base"))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert float((logits_of(base) - expected).abs().max()) > 0.01
    assert model.fingerprint["weights"] != base.fingerprint["weights"]
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_an_adapter_brings_its_tokenizer_and_its_new_tokens(trained, tokenizer, tmp_path):
    own = deepcopy(tokenizer)
    own.add_tokens(["<think>", "</think>"], special_tokens=True)
    folder, expected = trained(rows=270, modules_to_save=["embed_tokens", "lm_head"])
    own.save_pretrained(folder)
    model = load_model(folder)
    assert model.tags is not None and model.vocabulary == 270
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    words = load_prompting(folder)
    assert words.tags == model.tags and words.fingerprint["tokenizer"] == model.fingerprint["tokenizer"]


def test_an_adapter_on_the_hub(trained, tmp_path, monkeypatch):
    folder, expected = trained()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(hub, "cached_file", partial(hub.cached_file, cache_dir=tmp_path / "cache"))
    monkeypatch.setattr(loading, "cached_file", hub.cached_file)
    repository = tmp_path / "cache" / "models--someone--lora"
    shutil.copytree(folder, repository / "snapshots" / "1234")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1234")
    model = load_model("someone/lora")
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert model.name == "someone/lora"


def test_an_adapter_that_is_not_whole(tmp_path, merging):
    with pytest.raises(ModelLoadError, match="names no base model"):
        load_model(write_adapter(tmp_path / "a", ""))
    with pytest.raises(ModelLoadError, match="pickled weights are never loaded"):
        load_model(write_adapter(tmp_path / "b", "base", weights=False))


def test_a_vision_language_model_is_read_in_its_text_tower(tmp_path, tokenizer):
    hf = tiny_of("qwen3_vl")
    hf.save_pretrained(tmp_path / "vl")
    tokenizer.save_pretrained(tmp_path / "vl")
    model = load_model(str(tmp_path / "vl"))
    assert model.layout.blocks == "model.language_model.layers" and model.n_layers == len(model.layout.of_block)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = hf(input_ids=ids).logits
    torch.testing.assert_close(model.backend.forward(ids, mask=None).logits, expected, atol=1e-5, rtol=0)


class Config:
    quantization_config = None


class Packed:
    quantization_config = MappingProxyType({"quant_method": "gptq"})


@pytest.mark.parametrize(
    ("device", "config", "quantise", "expected"),
    [
        ("cpu", Config, None, None),
        ("auto", Config, None, "auto"),
        ("sequential", Config, "4bit", "sequential"),
        ("cuda:1", Config, "8bit", {"": "cuda:1"}),
        ("cuda:1", Packed, None, {"": "cuda:1"}),
        ({"model": 0, "lm_head": "cpu"}, Config, None, {"model": 0, "lm_head": "cpu"}),
    ],
)
def test_how_weights_are_placed(device, config, quantise, expected):
    assert loading._device_map(device, config, quantise) == expected


def test_how_weights_are_packed():
    config = Qwen2Config(dtype="bfloat16")
    four, eight = (loading._quantisation(bits, None, config)["quantization_config"] for bits in ("4bit", "8bit"))
    assert isinstance(four, BitsAndBytesConfig) and four.load_in_4bit and not four.load_in_8bit
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    given = loading._quantisation("4bit", "float32", config)["quantization_config"]
    assert given.bnb_4bit_compute_dtype == torch.float32
    assert eight.load_in_8bit and not eight.load_in_4bit and loading._quantisation(None, None, config) == {}


@pytest.mark.parametrize(
    ("told", "name", "rounds_activations"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), "4bit", False),
        (BitsAndBytesConfig(load_in_8bit=True), "8bit", True),
        ({"quant_method": "gptq", "bits": 4}, "gptq", False),
        ({"quant_method": "awq", "bits": 4}, "awq", False),
        ({"quant_method": "mxfp4"}, "mxfp4", False),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8", True),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"input_activations": None}}},
            "compressed-tensors",
            False,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"input_activations": {"num_bits": 8}}}},
            "compressed-tensors",
            True,
        ),
    ],
)
def test_what_a_configuration_says_about_packed_weights(told, name, rounds_activations):
    config = Qwen2Config()
    config.quantization_config = told
    assert packing(config) == Packing(name=name, rounds_activations=rounds_activations)


@pytest.mark.parametrize("told", [None, {"quant_method": "gguf"}, {"quant_method": "mxfp4", "dequantize": True}])
def test_weights_that_were_unpacked_are_plain(told):
    config = Qwen2Config()
    config.quantization_config = told
    assert packing(config) is None


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def in_mxfp4(weight):
    """Blocks of 32 numbers of 4 bits with one power of two for each, as gpt-oss is published; and what they stand for."""
    rows = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    power = torch.ceil(torch.log2(rows.abs().amax(-1, keepdim=True) / 6))
    code = (rows / 2**power).unsqueeze(-1).sub(_FP4).abs().argmin(-1)
    blocks = (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)
    unpacked = (_FP4[code] * 2**power).flatten(-2).transpose(1, 2)
    return blocks, (power.squeeze(-1) + 127).to(torch.uint8), unpacked


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_packed_experts_of_gpt_oss_are_unpacked_bit_by_bit_on_a_cpu(tmp_path, tokenizer, dtype):
    hf = tiny_of("gpt_oss", hidden_size=64, intermediate_size=64)
    hf.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    told["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (tmp_path / "config.json").write_text(json.dumps(told))
    kept, unpacked = {}, {}
    for name, weight in hf.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            kept[f"{name}_blocks"], kept[f"{name}_scales"], unpacked[name] = in_mxfp4(weight)
        else:
            kept[name] = weight.clone()
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(tmp_path), dtype=dtype, tokenizer=tokenizer)
    assert model.hf.dtype == (torch.float32 if dtype else torch.bfloat16) and len(unpacked) == 2 * model.n_layers
    for name, weight in unpacked.items():
        assert torch.equal(model.hf.state_dict()[name].float(), weight)


def test_packed_weights_without_their_package_say_which(tmp_path, tokenizer, monkeypatch):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(MissingExtraError, match=r"needs a package that is not installed: .*bitsandbytes"):
        load_model(str(tmp_path / "base"), quantise="8bit")
