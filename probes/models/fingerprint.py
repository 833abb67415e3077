"""What identifies a model in a trace: its name and revision, hashes of its weights and tokenizer, and library versions."""

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from reasonscope.probes.models.packing import packing

_LIBRARIES = ("torch", "transformers", "tokenizers", "reasonscope")


def fingerprint(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, name: str, revision: str | None
) -> dict[str, Any]:
    """`described`, with the `dtype`, the SHA-256 of the `weights`, and how these are `quantised` if they are."""
    known = described(hf.config, tokenizer, name=name, revision=revision)
    packed = {} if (how := packing(hf.config)) is None else {"quantised": how.name}
    return {**known, "dtype": str(hf.dtype).removeprefix("torch."), "weights": _weights_hash(hf), **packed}


def described(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, *, name: str, revision: str | None
) -> dict[str, Any]:
    """JSON with `name`, `revision`, `architecture`, SHA-256 of the `tokenizer`, and `versions`; `dtype` and `weights` are None."""
    return {
        "name": name,
        "revision": revision,
        "architecture": config.model_type,
        "dtype": None,
        "weights": None,
        "tokenizer": _tokenizer_hash(tokenizer),
        "versions": {library: version(library) for library in _LIBRARIES},
    }


def _weights_hash(hf: PreTrainedModel) -> str | None:
    """SHA-256 over the names, dtypes and bytes of all parameters and buffers in a checkpoint, in order of name.

    It does not depend on how the checkpoint is split into files, or on where accelerate keeps the weights. None if the weights are on
    another machine.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(hf.state_dict().items()):
        value = _offloaded(hf, name) if tensor.is_meta else tensor
        if value is None:
            return None
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _offloaded(hf: PreTrainedModel, name: str) -> torch.Tensor | None:
    """A weight that accelerate keeps in host memory or on disk, and moves to the device only while its module runs."""
    path, _, leaf = name.rpartition(".")
    hook = getattr(hf.get_submodule(path), "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            value: torch.Tensor = kept[leaf]
            return value
    return None


def _tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over the tokenizer itself (vocabulary, merges, added tokens) and its chat template."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
