"""A model ready to be read: the Hugging Face model with its tokenizer, layout, think tags and the engine that runs it."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import ThinkTags
from reasonscope.probes.architecture.layout import Layout, embedding_rows, head_count, input_device, resolve_layout
from reasonscope.probes.backends.base import Backend
from reasonscope.probes.backends.threads import set_threads
from reasonscope.probes.models.determinism import compute_in_float32, make_deterministic
from reasonscope.probes.models.fingerprint import fingerprint
from reasonscope.probes.models.layout_check import prove_layout
from reasonscope.probes.models.loading import fast, load_pretrained, load_structure
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.models.tags import find_tags

# Each engine in a module of its own, imported when it is asked for: two of them are optional extras.
_BACKENDS = MappingProxyType(
    {
        "hooks": "reasonscope.probes.backends.hooks:HooksBackend",
        "transformer_lens": "reasonscope.probes.backends.transformer_lens:TransformerLensBackend",
        "nnsight": "reasonscope.probes.backends.nnsight:NNsightBackend",
    }
)
BACKENDS = tuple(_BACKENDS)


@dataclass(frozen=True, kw_only=True)
class Model(Prompting):
    """A model that is here; `hf` is in evaluation mode. `float32_compute`: see `load_model`."""

    hf: PreTrainedModel
    layout: Layout
    backend: Backend
    float32_compute: bool = False

    @property
    def n_heads(self) -> int:
        return head_count(self.hf.config)

    @property
    def d_model(self) -> int:
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that can be fed: rows of the embedding, often more than the tokenizer has."""
        return embedding_rows(self.hf, self.layout).shape[0]

    @property
    def device(self) -> torch.device:
        """Where token ids go; the layers of a dispatched model may lie elsewhere."""
        return input_device(self.hf, self.layout)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends a completion, of the generation config, the config and the tokenizer."""
        named = [self.tokenizer.eos_token_id]
        for config in (self.hf.generation_config, self.hf.config.get_text_config()):
            ids = getattr(config, "eos_token_id", None)
            named += ids if isinstance(ids, list) else [ids]
        return frozenset(int(i) for i in named if i is not None)

    @cached_property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a trace says about the model that wrote it (JSON); hashes the weights on first use."""
        found = fingerprint(self.hf, self.tokenizer, name=self.name, revision=self.revision)
        return {**found, "compute": "float32"} if self.float32_compute else found

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model computes in, and its activations come in: that of its weights, unless it was asked for float32."""
        return torch.float32 if self.float32_compute else self.hf.dtype


def load_model(
    source: str | PreTrainedModel,
    *,
    backend: str = "hooks",
    device: str = "cpu",
    threads: int | None = None,
    remote: bool | str = False,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    layout: Layout | None = None,
    tags: ThinkTags | None = None,
    deterministic: bool = False,
    float32_compute: bool = False,
) -> Model:
    """Load a model and prove that it is as its layout says.

    `source`: a hub id, a folder, `organism`, `organism-base`, or a loaded PreTrainedModel with its `tokenizer` (it stays
    where it is and is set to evaluation mode). `device`: "cpu", "cuda:0", or "auto" to spread it by accelerate. `dtype`:
    None takes the checkpoint's. `layout`: the row of an architecture that the table does not have. `tags`: the think tags
    where they are not to be found. `remote`, of `backend="nnsight"`: True (NDIF) or the address of a server that holds the model of
    this name, of which only structure and tokenizer are loaded here; "local" sends every pass through the same door and runs it
    here. `deterministic`: from here on the whole process has kernels that give the same bits again
    (`determinism.make_deterministic`). `float32_compute`: compute in float32 over 16-bit weights (`determinism.compute_in_float32`),
    on the backend hooks.
    Code that comes with a checkpoint is never run. Raises ModelLoadError,
    ArchitectureError, InputError, MissingExtraError.
    """
    if backend not in _BACKENDS:
        raise InputError(f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}")
    if remote and backend != "nnsight":
        raise InputError(f"backend {backend!r} runs here; remote is of backend='nnsight'")
    if float32_compute and backend != "hooks":
        raise InputError(f"float32 arithmetic over 16-bit weights runs on the backend hooks, not on {backend}")
    if deterministic:
        make_deterministic()
    if threads is not None:
        set_threads(threads)
    elsewhere = bool(remote) and remote != "local"
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise InputError("a loaded model needs its tokenizer: load_model(model, tokenizer=…)")
        hf, name = source, source.config.name_or_path or type(source).__name__
    else:
        if elsewhere:
            hf, own = load_structure(source, dtype=dtype, revision=revision)
        else:
            hf, own = load_pretrained(source, device=device, dtype=dtype, revision=revision)
        name, tokenizer = source, tokenizer or own
    tokenizer = fast(tokenizer, name)
    row = layout or resolve_layout(hf.config)
    hf.train(False)
    if float32_compute:
        compute_in_float32(hf)
    module, _, factory = _BACKENDS[backend].partition(":")
    make = getattr(importlib.import_module(module), factory)
    engine: Backend = make(hf, row, remote=remote) if remote else make(hf, row)
    prove_layout(hf, row, engine if elsewhere else None)
    return Model(
        hf=hf,
        config=hf.config,
        tokenizer=tokenizer,
        layout=row,
        backend=engine,
        tags=tags or find_tags(tokenizer),
        name=name,
        revision=getattr(hf.config, "_commit_hash", None) or revision,
        float32_compute=float32_compute,
    )
