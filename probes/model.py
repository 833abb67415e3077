"""A model ready to be read: the Hugging Face model with its tokenizer, layout, think tags and the engine that runs it."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import tokenizers
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reasonscope.data.errors import InputError
from reasonscope.data.parse import ThinkTags
from reasonscope.data.trace import Problem
from reasonscope.probes.backends.base import Backend
from reasonscope.probes.determinism import compute_in_float32
from reasonscope.probes.fingerprint import fingerprint
from reasonscope.probes.layout import Layout, embedding_rows, head_count, input_device, resolve_layout
from reasonscope.probes.layout_proof import prove_layout
from reasonscope.probes.loading import load_pretrained
from reasonscope.probes.tags import chat_template, find_tags, with_tag_open, with_thinking_closed

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
class Model:
    """`hf` is in evaluation mode. `tags` is None where neither tokenizer nor template marks thinking. `float32_compute`: see
    `load_model`."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    layout: Layout
    backend: Backend
    tags: ThinkTags | None
    name: str
    revision: str | None = None
    float32_compute: bool = False

    @property
    def n_layers(self) -> int:
        return int(self.hf.config.get_text_config().num_hidden_layers)

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
    def context_length(self) -> int:
        """The longest sequence in tokens, prompt and completion together."""
        return int(self.hf.config.get_text_config().max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where token ids go; the layers of a dispatched model may lie elsewhere."""
        return input_device(self.hf, self.layout)

    @property
    def tokenizer_backend(self) -> tokenizers.Tokenizer:
        return self.tokenizer.backend_tokenizer

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

    def encode_prompt(
        self, problem: Problem, *, think: bool = True, open_tag: bool = False, prefill: str = ""
    ) -> list[int]:
        """The token ids of a problem as the model is asked it: messages through the chat template, a raw prompt as it is.

        `think=False` ends messages with an empty think block. `open_tag=True` opens the think tag where the template does
        not; otherwise the model is left to open it. A `prefill` opens it too, and stands behind it. There is one BOS at
        most: where the rendered text brings its own, or the tokenizer uses none, none is added. Raises InputError where
        there is no chat template, or no think tag to close.
        """
        open_tag = open_tag or bool(prefill)
        text = problem.prompt if problem.prompt is not None else self._render(problem, think, open_tag)
        return self.encode_text(text + prefill)

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text, behind one BOS where the tokenizer uses one (its own in the text is that one)."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and self.tokenizer.encode("", add_special_tokens=True)[:1] == [bos]:
            ids = [bos, *ids]
        return ids

    def _render(self, problem: Problem, think: bool, open_tag: bool) -> str:
        if chat_template(self.tokenizer) is None:
            raise InputError(
                f"problem {problem.id!r} has messages, but the tokenizer of {self.name} has no chat template; "
                "give the problem a prompt instead, or use an instruction-tuned model"
            )
        text = self.tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in problem.messages],
            tokenize=False,
            add_generation_prompt=True,
            # The names of the switch in the templates of Qwen3, of DeepSeek V3.1 and of minimind; unknown ones do nothing.
            enable_thinking=think,
            thinking=think,
            open_thinking=think,
        )
        assert isinstance(text, str)
        if think and not open_tag:
            return text
        if self.tags is None:
            raise InputError(f"{self.name} has no think tags, so thinking can be neither opened nor switched off")
        return with_tag_open(text, self.tags) if think else with_thinking_closed(text, self.tags)


def load_model(
    source: str | PreTrainedModel,
    *,
    backend: str = "hooks",
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    layout: Layout | None = None,
    tags: ThinkTags | None = None,
    float32_compute: bool = False,
) -> Model:
    """Load a model and prove that it is as its layout says.

    `source`: a hub id, a folder, `organism`, `organism-base`, or a loaded PreTrainedModel with its `tokenizer` (it stays
    where it is and is set to evaluation mode). `device`: "cpu", "cuda:0", or "auto" to spread it by accelerate. `dtype`:
    None takes the checkpoint's. `layout`: the row of an architecture that the table does not have. `tags`: the think tags
    where they are not to be found. `float32_compute`: compute in float32 over 16-bit weights (`determinism.compute_in_float32`; the
    backend hooks alone). Code that comes with a checkpoint is never run. Raises ModelLoadError,
    ArchitectureError, InputError, MissingExtraError.
    """
    if backend not in _BACKENDS:
        raise InputError(f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}")
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise InputError("a loaded model needs its tokenizer: load_model(model, tokenizer=…)")
        hf, name = source, source.config.name_or_path or type(source).__name__
    else:
        hf, own = load_pretrained(source, device=device, dtype=dtype, revision=revision)
        name, tokenizer = source, tokenizer or own
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"the tokenizer of {name} is a {type(tokenizer).__name__}; one with offsets (a fast one) is needed"
        )
    row = layout or resolve_layout(hf.config)
    hf.train(False)
    if float32_compute:
        if backend != "hooks":
            raise InputError(f"float32 arithmetic over 16-bit weights runs on the backend hooks, not on {backend}")
        compute_in_float32(hf)
    prove_layout(hf, row)
    module, _, factory = _BACKENDS[backend].partition(":")
    engine: Backend = getattr(importlib.import_module(module), factory)(hf, row)
    return Model(
        hf=hf,
        tokenizer=tokenizer,
        layout=row,
        backend=engine,
        tags=tags or find_tags(tokenizer),
        name=name,
        revision=getattr(hf.config, "_commit_hash", None) or revision,
        float32_compute=float32_compute,
    )
