"""Packed weights: what packs them while a model is loaded, and what a model's configuration says about how they are packed."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from reasonscope.data.variants import Quantise

# Kinds whose layers round what they are given, and not the weights alone.
_ROUND_ACTIVATIONS = frozenset(
    {"fp8", "fbgemm_fp8", "mxfp8", "nvfp4", "fp_quant", "fouroversix", "bitnet", "quark", "eetq"}
)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the weights of a model are packed.

    Attributes:
        name: "4bit" or "8bit" for bitsandbytes, otherwise the name that transformers has for the kind, such as "gptq".
        rounds_activations: Whether the layers round their inputs too, by a scale that depends on what is in the pass.
    """

    name: str
    rounds_activations: bool


def packing(config: PretrainedConfig) -> Packing | None:
    """How a model is packed, by its configuration; None if its weights are plain numbers."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    fields: Mapping[str, Any] = told if isinstance(told, Mapping) else told.to_dict()
    kind = fields.get("quant_method")
    name = str(kind.value if isinstance(kind, Enum) else kind)
    if name == "gguf" or fields.get("dequantize"):
        return None
    if name == "bitsandbytes":
        eight = bool(fields.get("load_in_8bit"))
        return Packing(name="8bit" if eight else "4bit", rounds_activations=eight)
    groups = fields.get("config_groups") or {}
    rounded = any(group.get("input_activations") for group in groups.values())
    return Packing(
        name=name,
        rounds_activations=rounded or name in _ROUND_ACTIVATIONS or "activation" in str(fields.get("quant_type")),
    )


def bitsandbytes_config(quantise: Quantise, dtype: torch.dtype) -> BitsAndBytesConfig:
    """4 bit in the NormalFloat of QLoRA, multiplied in `dtype`; or LLM.int8()."""
    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
