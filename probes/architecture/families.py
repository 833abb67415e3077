"""Tiny random models: of thirteen families with the windows, sinks and experts that tests need, and of any other by shrinking."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from reasonscope.probes.architecture.shrinking import class_for, shrunk

VOCAB = 96
N_LAYERS = 3
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WINDOW = 6
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {
    **_GROUPED,
    "head_dim": 12,
    "sliding_window": _WINDOW,
    "layer_types": _ALTERNATING,
    "query_pre_attn_scalar": 12,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 12},  # heads × head_dim ≠ d_model, as in the real small ones
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "deepseek_v3": {  # queries and keys of 8 + 4, values of 6
        **_COMMON,
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "mistral": {**_GROUPED, "sliding_window": _WINDOW},
    "phi3": {**_GROUPED, "sliding_window": _WINDOW},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _GROUPED,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": N_LAYERS,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt_neox": {**_COMMON, "use_parallel_residual": True},
    "gpt_oss": {
        **_GROUPED,
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": _WINDOW,
        "layer_types": _ALTERNATING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},  # its own, YaRN, is for 131,072 tokens
    },
}
FAMILIES = tuple(_CONFIGS)


def tiny_config(family: str) -> PretrainedConfig:
    """A configuration of `family` with 3 layers and a context of 128 tokens."""
    return AutoConfig.for_model(family, **_CONFIGS[family])


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of one of `FAMILIES` with random float32 weights."""
    return random_model(tiny_config(family), seed)


def tiny_of(model_type: str, seed: int = 0, **own: Any) -> PreTrainedModel:
    """A model of any architecture of transformers, with small sizes and random float32 weights; `own` settings win."""
    return random_model(shrunk(model_type, **own), seed)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, large enough that an edit changes outputs by far more than rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = class_for(config).from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            # Weights of norms and sinks are random too: at their initial 1 or 0 nobody would notice a missing norm or sink.
            torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # DeepSeek chooses experts by it, but it is not a parameter
                torch.nn.init.normal_(buffer, std=0.2)
    assert isinstance(model, PreTrainedModel)
    return model
