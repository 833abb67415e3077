"""A model that is ready to be read: the Hugging Face model with its tokenizer, layout, think tags and engine."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reasonscope.data.errors import InputError
from reasonscope.data.progress import say
from reasonscope.data.text.think_tags import ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.variants import Quantise
from reasonscope.probes.architecture.layout import Layout, embedding_rows, input_device
from reasonscope.probes.backends.base import Backend
from reasonscope.probes.backends.compiled import eagerly_if_compiled, is_compiled, is_wrapped, uncompiled
from reasonscope.probes.backends.threads import set_threads
from reasonscope.probes.models.determinism import compute_in_float32, make_deterministic
from reasonscope.probes.models.fingerprint import fingerprint
from reasonscope.probes.models.layout_check import check_engine, prove_layout, proved
from reasonscope.probes.models.layout_derivation import derive_layout, layout_of_structure
from reasonscope.probes.models.loading import fast, load_pretrained, load_structure
from reasonscope.probes.models.packing import packing
from reasonscope.probes.models.prompting import Prompting, PromptOptions, as_recorded
from reasonscope.probes.models.tags import chat_template, find_thinking

# Each engine has its own module, which is imported when the engine is asked for: two of them are optional extras.
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
    """A loaded model, which `load_model` returns.

    Attributes:
        hf: The Hugging Face model, in evaluation mode.
        layout: Where the architecture keeps its modules.
        backend: The engine that runs the model and reads and writes its activations.
        float32_compute: Whether it computes in float32 over 16-bit weights.
    """

    hf: PreTrainedModel
    layout: Layout
    backend: Backend
    float32_compute: bool = False

    @property
    def n_heads(self) -> int:
        """Query heads in a block; the largest number if blocks differ, and 0 without attention."""
        return self.layout.n_heads

    @property
    def layers_with_heads(self) -> tuple[int, ...]:
        """The blocks with attention heads; in hybrid models only some."""
        return self.layout.layers_with("z")

    @property
    def d_model(self) -> int:
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that can be fed: the rows of the embedding, often more than the tokenizer has."""
        return embedding_rows(self.hf, self.layout).shape[0]

    @property
    def device(self) -> torch.device:
        """The device that token ids are fed on; accelerate may keep some layers on other devices."""
        return input_device(self.hf, self.layout)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the output layer, or an identity for a model without one."""
        path = self.layout.final_norm
        return nn.Identity() if path is None else self.hf.get_submodule(path)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a completion, from the generation config, the config and the tokenizer."""
        named = [self.tokenizer.eos_token_id]
        for config in (self.hf.generation_config, self.hf.config.get_text_config()):
            ids = getattr(config, "eos_token_id", None)
            named += ids if isinstance(ids, list) else [ids]
        return frozenset(int(i) for i in named if i is not None)

    @cached_property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a trace says about the model that wrote it (JSON). The first use hashes the weights."""
        found = fingerprint(self.hf, self.tokenizer, name=self.name, revision=self.revision)
        return {**found, "compute": "float32"} if self.float32_compute else found

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the activations: that of the weights, or float32 if `float32_compute` is on."""
        return torch.float32 if self.float32_compute else self.hf.dtype


def load_model(
    source: str | PreTrainedModel,
    *,
    backend: str = "hooks",
    device: str | Mapping[str, Any] = "cpu",
    quantise: Quantise | None = None,
    threads: int | None = None,
    remote: bool | str = False,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    layout: Layout | None = None,
    tags: ThinkTags | None = None,
    thinking: Thinking | None = None,
    prompt: PromptOptions | None = None,
    deterministic: bool = False,
    float32_compute: bool = False,
) -> Model:
    """Load a model, find out by a short pass where its modules are, and prove it by another.

    Code that comes with a checkpoint is never run, and only safetensors are read.

    Args:
        source: A hub id, a model folder, a GGUF file, the folder of a PEFT adapter (merged into its base), "organism" or
            "organism-base"; or a loaded PreTrainedModel, which stays on its device and is set to evaluation mode.
        backend: The engine: "hooks", "transformer_lens" or "nnsight".
        device: "cpu", "cuda:0", or "auto", "balanced" or "sequential" to let accelerate spread the model, or a device for each module.
        quantise: "4bit" or "8bit" to pack the weights with bitsandbytes while loading. Checkpoints that are packed (GPTQ, AWQ,
            compressed-tensors) are loaded as they are.
        threads: CPU threads for the whole process from now on. By default a pass takes one thread if its matrices are small and all
            threads if they are large, unless you set a count with `torch.set_num_threads` or in OMP_NUM_THREADS.
        remote: For nnsight only. True runs the model on NDIF, and an address on that server; only structure and tokenizer are loaded
            here. "local" serialises every pass as for a server, and runs it here.
        dtype: Type of the weights; by default that of the checkpoint.
        revision: Branch, tag or commit on the hub.
        tokenizer: The tokenizer of a loaded model, or one to use instead of the checkpoint's.
        layout: The layout, if you want another than the one that is derived from the model; it is proved all the same.
        tags: The think tags, if neither tokenizer nor template has them.
        thinking: How thinking is found in what the model writes. By default between the tags, if there are any, otherwise in the open
            (see `Thinking`).
        prompt: A system message and arguments for the chat template, if any.
        deterministic: Use kernels that give the same bits again, in the whole process from now on.
        float32_compute: Compute in float32 over 16-bit weights, so that batches change no token; for the backend "hooks" only.

    Returns:
        The model, ready for `record`, `generate` and `capture`.

    Raises:
        ModelLoadError: If the checkpoint cannot be loaded.
        ArchitectureError: If the model is not a decoder whose blocks add to one residual stream, or does not match `layout`.
        InputError: If options do not fit together.
        MissingExtraError: If the backend, or a package that the checkpoint needs, is not installed.

    Example:
        >>> model = load_model("organism")
        >>> model.n_layers, model.d_model
        (6, 128)
    """
    if backend == "vllm":
        raise InputError(
            "vLLM holds the model on a server: `record`, `steer sweep`, `analyse receivers` and `analyse heads` take --backend vllm "
            "with --server; what needs the weights here (effects, gradients) takes hooks"
        )
    if backend not in _BACKENDS:
        raise InputError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if remote and backend != "nnsight":
        raise InputError(f"backend {backend!r} runs on this machine only; remote needs backend='nnsight'")
    if float32_compute and backend != "hooks":
        raise InputError(f"float32_compute needs backend='hooks', not {backend!r}")
    if deterministic:
        make_deterministic()
    if tags is not None and thinking is not None:
        raise InputError("give either tags or thinking; thinking has tags of its own: Thinking(tags=…)")
    if threads is not None:
        set_threads(threads)
    elsewhere = bool(remote) and remote != "local"
    source = _uncompiled(source, backend)
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise InputError("a loaded model needs its tokenizer: load_model(model, tokenizer=…)")
        hf, name = source, source.config.name_or_path or type(source).__name__
    else:
        if elsewhere:
            hf, own = load_structure(source, dtype=dtype, revision=revision)
        else:
            hf, own = load_pretrained(source, device=device, dtype=dtype, revision=revision, quantise=quantise)
        name, tokenizer = source, tokenizer or own
    tokenizer = fast(tokenizer, name)
    prompt = prompt or PromptOptions()
    prompt.check(chat_template(tokenizer), name)
    hf.train(False)
    if float32_compute:
        compute_in_float32(hf)
    with eagerly_if_compiled(hf):
        found = layout or (layout_of_structure(hf) if elsewhere else proved(hf, derive_layout(hf)))
    module, _, factory = _BACKENDS[backend].partition(":")
    make = getattr(importlib.import_module(module), factory)
    engine: Backend = make(hf, found, remote=remote) if remote else make(hf, found)
    if layout or elsewhere:
        prove_layout(hf, found, engine if elsewhere else None)
    if backend != "hooks" and not elsewhere:
        check_engine(engine, hf, found)
    return Model(
        hf=hf,
        config=hf.config,
        tokenizer=tokenizer,
        layout=found,
        backend=engine,
        thinking=find_thinking(tokenizer, thinking if tags is None else Thinking(tags=tags), name=name),
        name=name,
        revision=getattr(hf.config, "_commit_hash", None) or revision,
        prompt=prompt,
        float32_compute=float32_compute,
    )


def load_as_recorded(meta: Mapping[str, Any], name: str, how: Mapping[str, Any]) -> Model:
    """The model `name`, loaded and asked as a run was by its `meta`, if `how` does not say; it says if the weights differ."""
    model = load_model(name, **as_recorded(meta, how, name))
    tell_other_weights(meta, model)
    return model


def tell_other_weights(meta: Mapping[str, Any], model: Model) -> None:
    """Say it if the weights of `model` are not those of a run. Weights of another type or packing have other bytes and are not compared."""
    written, packed = meta.get("model") or {}, packing(model.hf.config)
    stored_alike = (written.get("dtype"), written.get("quantised")) == (
        str(model.hf.dtype).removeprefix("torch."),
        packed and packed.name,
    )
    if not written.get("weights") or not stored_alike:
        return
    here = model.fingerprint
    if here["weights"] not in (None, written["weights"]):
        say(
            f"{_at_revision(here)} has other weights here than {_at_revision(written)} that wrote the traces; what the model computes now "
            "belongs to the weights here."
        )


def _at_revision(known: Mapping[str, Any]) -> str:
    return " at revision ".join(str(known[part]) for part in ("name", "revision") if known.get(part))


def _uncompiled(source: str | PreTrainedModel, backend: str) -> str | PreTrainedModel:
    """`source` without what `torch.compile` put around it. Raises InputError for compiled models that cannot be read."""
    found: Any = uncompiled(source)
    if not isinstance(found, PreTrainedModel) or not (found is not source or is_compiled(found)):
        return source
    if is_wrapped(found):
        raise InputError(
            "torch.compile has replaced some modules of the model, so they have other names; compile them in place, by block.compile()"
        )
    if backend != "hooks":
        raise InputError(
            f"backend={backend!r} cannot read a compiled model; use backend='hooks', or load it uncompiled"
        )
    say("the model is compiled; it runs uncompiled while it is read or edited")
    return found
