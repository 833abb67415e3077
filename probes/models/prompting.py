"""How to ask a model: its tokenizer, chat template and think tags, without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import ThinkTags
from reasonscope.data.trace import Problem
from reasonscope.probes.models.fingerprint import described
from reasonscope.probes.models.loading import fast, foreign, load_tokenizer, locate
from reasonscope.probes.models.tags import chat_template, find_tags, with_tag_open, with_thinking_closed


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What turns problems into token ids and completions into traces. It is enough if a server holds the model.

    Attributes:
        config: The configuration of the model.
        tokenizer: The tokenizer, a fast one.
        tags: The think tags, or None if neither tokenizer nor template marks thinking.
        name: The hub id, folder or shipped name that the model was loaded from.
        revision: The commit of the checkpoint, if it is known.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    tags: ThinkTags | None
    name: str
    revision: str | None = None

    @property
    def n_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens, prompt and completion together."""
        return int(self.config.get_text_config().max_position_embeddings)

    @property
    def hints(self) -> Mapping[str, str]:
        """What is known of this model alone, under `reasonscope` in its config.json.

        `fast` is the first word of its fast thinking, `verdict` the words before its verdict on a request; steering methods read them.
        """
        return getattr(self.config, "reasonscope", None) or {}

    @property
    def tokenizer_backend(self) -> tokenizers.Tokenizer:
        return self.tokenizer.backend_tokenizer

    @cached_property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a trace says about the model that wrote it (JSON), without the weights, which are elsewhere."""
        return described(self.config, self.tokenizer, name=self.name, revision=self.revision)

    def encode_prompt(
        self, problem: Problem, *, think: bool = True, open_tag: bool = False, prefill: str = ""
    ) -> list[int]:
        """The token ids of a prompt for `problem`: messages through the chat template, a raw prompt unchanged.

        A BOS is added if the tokenizer uses one and the rendered text does not start with one.

        Args:
            problem: The problem to ask.
            think: False ends the messages with an empty think block, so that the model answers at once.
            open_tag: True opens the think tag, unless the template has opened it; otherwise the model opens it.
            prefill: How the thinking begins; it follows the think tag, which is opened.

        Raises:
            InputError: If messages have no chat template to render them, the template fails, or a think tag has to be opened or closed
                and the model has none.
        """
        open_tag = open_tag or bool(prefill)
        text = problem.prompt if problem.prompt is not None else self._render(problem, think, open_tag)
        return self.encode_text(text + prefill)

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text, starting with one BOS if the tokenizer uses one."""
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
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in problem.messages],
                tokenize=False,
                add_generation_prompt=True,
                # The switch has these names in the templates of Qwen3, DeepSeek V3.1 and minimind; templates ignore unknown names.
                enable_thinking=think,
                thinking=think,
                open_thinking=think,
            )
        except Exception as error:  # the template is somebody else's program and may raise anything
            raise InputError(
                f"the chat template of {self.name} fails on problem {problem.id!r} ({type(error).__name__}: {error!s:.200}); "
                "give the problem a prompt instead, or fix the template"
            ) from error
        assert isinstance(text, str)
        if think and not open_tag:
            return text
        if self.tags is None:
            raise InputError(
                f"{self.name} has no think tags, so its thinking cannot be opened or switched off; pass tags= to load_model"
            )
        return with_tag_open(text, self.tags) if think else with_thinking_closed(text, self.tags)


def load_prompting(source: str, *, revision: str | None = None) -> Prompting:
    """Load tokenizer and configuration of `source` (as in `load_model`), without weights. Raises ModelLoadError and InputError."""
    place = locate(source)
    with foreign(source):
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        tokenizer = load_tokenizer(place, revision)
    tokenizer = fast(tokenizer, source)
    return Prompting(config=config, tokenizer=tokenizer, tags=find_tags(tokenizer), name=source, revision=revision)
