"""Tiny configurations of any architecture that transformers has: the family's own settings, with every size made small."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

VOCAB = 96
_WIDTH, _HEADS, _HEAD_DIM = 64, 4, 16

# By name of the setting, in the words that configurations use. `_own` has what no rule covers.
_SIZES: Mapping[int, str] = {
    _WIDTH: "hidden_size d_model n_embd dim model_dim embed_dim word_embed_proj_dim embedding_size attention_hidden_size "
    "hidden_dim lru_width out_hidden_size text_hidden_size projection_dim adapter_out_dim",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
    "shared_intermediate_size expert_ffn_hidden_size decoder_ffn_dim encoder_ffn_dim mlp_hidden_size intermediate_size_mlp "
    "moe_shared_expert_intermediate_size dense_intermediate_size expert_intermediate_size block_ff_dim conv_dim_ff",
    _HEADS: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads moe_num_experts "
    "num_experts n_routed_experts num_local_experts linear_num_value_heads swa_num_attention_heads num_global_heads "
    "linear_num_heads num_local_experts n_head_kv",
    2: "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok num_experts_per_token moe_topk moe_top_k top_k_experts "
    "num_shared_experts_per_tok linear_num_key_heads swa_num_key_value_heads num_global_key_value_heads moe_k experts_per_token",
    _HEAD_DIM: "head_dim attention_head_dim global_head_dim swa_head_dim kv_channels linear_key_head_dim linear_value_head_dim "
    "linear_head_dim mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size index_head_dim qk_head_dim",
    8: "mamba_n_heads mamba_num_heads qk_rope_head_dim v_head_dim qk_nope_head_dim time_step_rank mamba_dt_rank sliding_window "
    "attention_window_size "
    "hidden_size_per_layer_input n_lora_rank rotary_dim",
    20: "q_lora_rank",
    24: "kv_lora_rank o_lora_rank",
    1: "n_group topk_group num_expert_group "
    "num_shared_experts n_shared_experts moe_num_shared_experts mamba_n_groups n_groups num_mtp_layers",
    128: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx mamba_d_ssm mamba_intermediate_size",
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_N_LAYERS = 4
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def class_for(config: PretrainedConfig) -> Any:
    """The class of transformers that makes a language model of `config`: of a text model, or of one that also reads images."""
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText


# Families whose positions have three parts: time, height and width.
_OF_THREE = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm4v", "glm46v", "glm_ocr", "glmga")


def _in_three(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}


# What the rules miss: settings whose default is None, and sizes that must fit one another.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "dots1": {"n_routed_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    **{name: {"text_config": {"rope_parameters": _in_three([4, 2, 2])}} for name in _OF_THREE},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_in_three([2, 1, 1]), "partial_rotary_factor": 0.5}}},
}


def shrunk(model_type: str, **own: Any) -> PretrainedConfig:
    """The default configuration of `model_type`, with every size made small; `own` settings of the family win."""
    small = _small_settings(AutoConfig.for_model(model_type))
    for name, value in {**_OWN.get(model_type, {}), **own}.items():
        small[name] = {**small.get(name, {}), **value} if isinstance(value, dict) else value
    return AutoConfig.for_model(model_type, **small)


def with_same_heads(config: PretrainedConfig) -> PretrainedConfig:
    """A small configuration like `config`, with as many attention heads, each of which is narrow."""
    text, small = config.get_text_config(), _small_settings(config)
    heads: dict[str, Any] = {
        "num_attention_heads": text.num_attention_heads,
        "hidden_size": _HEAD_DIM * text.num_attention_heads,
    }
    if getattr(text, "num_key_value_heads", None):
        heads["num_key_value_heads"] = text.num_key_value_heads
    inner = next((name for name, part in vars(config).items() if part is text and part is not config), None)
    own = {**small, **heads} if inner is None else {**small, inner: {**small.get(inner, {}), **heads}}
    return type(config)(**{**config.to_dict(), **own})


def _small_settings(config: PretrainedConfig) -> dict[str, Any]:
    """What to hand to the class of `config` for a tiny one of its kind. Layers are chosen so that every kind of block is left."""
    settings = config.to_dict()
    parts = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    depth = next((settings[name] for name in _LAYERS if isinstance(settings.get(name), int)), 0)
    kept = _kept_layers(settings, depth)
    small = {name: _small(name, value, depth, kept) for name, value in settings.items()}
    small = {name: value for name, value in small.items() if value != settings[name]}
    if isinstance(settings.get("kv_lora_rank"), int) and "num_key_value_heads" in settings:
        # Latent attention has keys for every head, and computes their width itself.
        small["num_key_value_heads"] = _HEADS
        small = {name: value for name, value in small.items() if name not in ("head_dim", "qk_head_dim")}
    if parts.get("vision_config") is None and "mrope_section" in str(settings):
        small["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return {**small, **{name: _small_settings(part) for name, part in parts.items()}}


def _small(name: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    if name in _LAYERS:
        return len(kept)
    if name == "vocab_size":
        return VOCAB
    if name in _TOKENS:
        return _TOKENS[name] if value is not None else None
    if isinstance(value, list | tuple) and depth and len(value) == depth:
        return [value[i] for i in kept]
    if name in _BY_NAME and isinstance(value, int) and not isinstance(value, bool):
        return min(value, _BY_NAME[name])
    if name == "mrope_section":
        return [4, 2, 2]
    if isinstance(value, dict) and name.startswith("rope"):
        return {key: _small(key, inner, 0, ()) for key, inner in value.items()}
    return value


def _kept_layers(settings: Mapping[str, Any], depth: int) -> list[int]:
    """Which layers to keep: the first few, and the first of every other kind."""
    kinds = [value for value in settings.values() if isinstance(value, list | tuple) and len(value) == depth]
    kept = list(range(min(depth, _N_LAYERS)))
    seen = {tuple(map(str, (kind[i] for kind in kinds))) for i in kept}
    for i in range(_N_LAYERS, depth):
        label = tuple(map(str, (kind[i] for kind in kinds)))
        if label not in seen and len(kept) < 2 * _N_LAYERS:
            seen.add(label)
            kept.append(i)
    return kept
