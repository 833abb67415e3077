"""How to ask a model: its tokenizer, chat template and think tags, without its weights."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any, get_args

import tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from reasonscope.data.errors import InputError
from reasonscope.data.text.think_tags import ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Message, Problem
from reasonscope.data.variants import Quantise
from reasonscope.probes.models.fingerprint import described
from reasonscope.probes.models.loading import fast, is_adapter, load_words
from reasonscope.probes.models.tags import chat_template, find_thinking, with_tag_open, with_thinking_closed

# The switch has these names in the templates of Qwen3 (enable_thinking), DeepSeek V3.1 and Granite (thinking), minimind and Cohere.
_SWITCHES = ("enable_thinking", "thinking", "open_thinking", "reasoning")
# What configurations call the longest sequence.
_LENGTHS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "seq_length")
_FUNCTIONS = frozenset({"raise_exception", "strftime_now", "tojson", "range", "namespace"})
_NO_THINK = "/no_think"  # in the system message of Nemotron


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How the chat template is asked to render problems. A store keeps it in its manifest, and every later command uses it again.

    Attributes:
        system: A system message for every problem, before the problem's own if it has one.
        template_args: Further variables of the chat template, such as `{"reasoning_effort": "high"}`.
        think: False closes the thinking block at once.
        open_tag: Append the opening tag to every prompt, for models that forget it.

    Example:
        options = rs.PromptOptions(system="Reason step by step.", template_args={"reasoning_effort": "low"})
        model = rs.load_model("openai/gpt-oss-20b", prompt=options)
        store = rs.record(model, problems, "runs/low")
    """

    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    think: bool = True
    open_tag: bool = False

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> "PromptOptions":
        """Those of a store, by its `meta`."""
        known = meta.get("prompt", {})
        return cls(**{told.name: known[told.name] for told in fields(cls) if told.name in known})

    def to_dict(self) -> dict[str, Any]:
        """For the `meta` of a store: what was asked for."""
        told = {**vars(self), "system": self.system or None, "template_args": dict(self.template_args)}
        return {name: value for name, value in told.items() if value != getattr(_AS_IT_IS, name)}

    def begun(self, think: bool | None, open_tag: bool | None) -> "PromptOptions":
        """These options with the thinking begun in another way, for what is not None."""
        return replace(
            self,
            think=self.think if think is None else think,
            open_tag=self.open_tag if open_tag is None else open_tag,
        )

    def check(self, template: str | None, name: str) -> None:
        """Raise InputError for a variable that the template does not read, and would ignore."""
        if template is None or not self.template_args:
            return
        known = _template_variables(template)
        if unknown := [key for key in self.template_args if key not in known]:
            raise InputError(
                f"the chat template of {name} does not read {', '.join(unknown)}; it reads {', '.join(sorted(known)) or 'nothing'}"
            )


_AS_IT_IS = PromptOptions()


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What turns problems into token ids and completions into traces. It is enough if a server holds the model.

    Attributes:
        config: The configuration of the model.
        tokenizer: The tokenizer, a fast one.
        thinking: How thinking is found in what the model writes.
        name: The hub id, folder or shipped name that the model was loaded from.
        revision: The commit of the checkpoint, if it is known.
        prompt: How the chat template is asked to render problems.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    thinking: Thinking
    name: str
    revision: str | None = None
    prompt: PromptOptions = field(default_factory=PromptOptions)

    @property
    def tags(self) -> ThinkTags | None:
        """The think tags, or None if the model reasons in the open or not at all."""
        return self.thinking.tags

    @property
    def n_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens, prompt and completion together; boundless for a model without positions, such as Mamba."""
        config = self.config.get_text_config()
        known = (getattr(config, name, None) for name in _LENGTHS)
        return next((int(length) for length in known if length), sys.maxsize)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that can be fed, as the configuration says."""
        return int(self.config.get_text_config().vocab_size)

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
        self, problem: Problem, *, think: bool | None = None, open_tag: bool | None = None, prefill: str = ""
    ) -> list[int]:
        """The token ids of a prompt for `problem`: messages by the chat template, a raw prompt unchanged, with a BOS if one is used.

        If `think` is False, thinking is switched off as the template does, or by an empty think block. `open_tag` opens the think tag
        unless the template has; both are as `self.prompt` says if None. `prefill` follows the tag, which is then opened if there is one.
        Raises InputError if the template is missing or fails, or a tag has to be opened or closed and the model has none.
        """
        begun = self.prompt.begun(think, open_tag)
        opened = begun.open_tag or bool(prefill and self.tags)
        if problem.prompt is not None and (self.prompt.system or self.prompt.template_args):
            raise InputError(
                f"problem {problem.id!r} has a raw prompt, which no template renders; leave out the system message and template arguments"
            )
        text = problem.prompt if problem.prompt is not None else self._prompt_text(problem, begun.think, opened)
        return self.encode_text(text + prefill)

    def unrendered(self, problems: Sequence[Problem]) -> str:
        """How many problems skip the chat template that this model has, as a line; "" if none does."""
        raw = sum(problem.prompt is not None for problem in problems)
        if not raw or chat_template(self.tokenizer) is None:
            return ""
        return (
            f"{raw} of {len(problems)} problems have a raw `prompt`, which is given to the model without its chat template; "
            "write `question` and `answer`, or `messages`, to ask it as a chat"
        )

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text, starting with one BOS if the tokenizer uses one."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and self.tokenizer.encode("", add_special_tokens=True)[:1] == [bos]:
            ids = [bos, *ids]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """The token ids of a text that follows other text: without special tokens before it."""
        return list(self.tokenizer_backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with its special tokens."""
        return str(self.tokenizer_backend.decode(ids, skip_special_tokens=False))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        think: bool,
        asks: bool = True,
        tools: Sequence[Any] = (),
        of: str,
        instead: str,
    ) -> str:
        """Messages as the text that the model reads, by the chat template; if it `asks`, the model's turn is opened.

        Raises InputError, which names `of` and says what to do `instead`, without a template and if it fails.
        """
        if chat_template(self.tokenizer) is None:
            raise InputError(f"{of} has messages, but the tokenizer of {self.name} has no chat template; {instead}")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=asks,
                **{**_thinking_switches(think), **self.prompt.template_args},
            )
        except Exception as error:  # the template is somebody else's program and may raise anything
            why = f"{type(error).__name__}: {error!s:.200}"
            raise InputError(f"the chat template of {self.name} fails on {of} ({why}); {instead}") from error
        assert isinstance(text, str)
        return text

    def _prompt_text(self, problem: Problem, think: bool, open_tag: bool) -> str:
        text = self.render(
            self._messages(problem, think),
            think=think,
            of=f"problem {problem.id!r}",
            instead="give the problem a prompt instead, or use an instruction-tuned model",
        )
        if (think and not open_tag) or (self.thinking.mode == "none" and not open_tag):
            return text
        if self.tags is None:
            what = "opened" if open_tag else "switched off"
            raise InputError(
                f"{self.name} has no think tags, so its thinking cannot be {what}; name the tags (--think-tags OPEN CLOSE, or tags= of "
                "load_model), or ask for another style of answer with a system message (--system FILE)"
            )
        return with_tag_open(text, self.tags) if think else with_thinking_closed(text, self.tags)

    def _messages(self, problem: Problem, think: bool) -> list[dict[str, str]]:
        """The messages of a problem with the system message that was asked for."""
        template = chat_template(self.tokenizer) or ""
        by_word = (
            not think and _NO_THINK in template and not any(name in _template_variables(template) for name in _SWITCHES)
        )
        own = [message.content for message in problem.messages if message.role == "system"]
        given = [self.prompt.system.strip()] if self.prompt.system else []
        words = [*given, *own, *([_NO_THINK] if by_word else [])]
        others = [message for message in problem.messages if message.role != "system" or not (given or by_word)]
        system = [Message(role="system", content="\n\n".join(words))] if given or by_word else []
        return [{"role": message.role, "content": message.content} for message in (*system, *others)]


def _thinking_switches(think: bool) -> dict[str, Any]:
    """What switches thinking on or off, by the names of many templates, which ignore those that they do not know."""
    off: dict[str, Any] = {} if think else {"thinking_budget": 0}  # Seed-OSS
    return {**dict.fromkeys(_SWITCHES, think), **off}


@lru_cache(maxsize=16)
def _template_variables(template: str) -> frozenset[str]:
    """The variables that a chat template reads and transformers does not set."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        found = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
    except TemplateSyntaxError:  # tags of transformers' own, such as {% generation %}
        found = set(re.findall(r"\b[a-z_]{3,}\b", template))
    return frozenset(
        found - {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"} - _FUNCTIONS
    )


def load_prompting(
    source: str,
    *,
    revision: str | None = None,
    thinking: Thinking | None = None,
    prompt: PromptOptions | None = None,
) -> Prompting:
    """Load tokenizer and configuration of `source` (as in `load_model`), without weights. Raises ModelLoadError and InputError."""
    config, tokenizer = load_words(source, revision)
    tokenizer, prompt = fast(tokenizer, source), prompt or PromptOptions()
    prompt.check(chat_template(tokenizer), source)
    found = find_thinking(tokenizer, thinking, name=source)
    return Prompting(config=config, tokenizer=tokenizer, thinking=found, name=source, revision=revision, prompt=prompt)


def as_recorded(meta: Mapping[str, Any], how: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Arguments for `load_model`, with how a run finds thinking and renders prompts, by the `meta` of its store, if `how` does not say.

    The revision of the run is that of its own model, so it is left out for a model of another `name`.
    """
    return {
        **_weights_as_recorded(meta, how, name),
        "thinking": how.get("thinking") or Thinking.of_meta(meta),
        "prompt": how.get("prompt") or PromptOptions.of_meta(meta),
    }


def _weights_as_recorded(meta: Mapping[str, Any], how: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Arguments for `load_model`, with revision, type and packing of the weights that a run was recorded with, if `how` does not say.

    Otherwise states that an analysis computes would be of newer weights, or differ from those in the store by the rounding of another type.
    """
    written = meta.get("model") or {}
    packed = written.get("quantised")
    return {
        **how,
        "revision": how.get("revision") or _revision_of(written, name),
        "dtype": how.get("dtype") or written.get("dtype"),
        "quantise": how.get("quantise") or (packed if packed in get_args(Quantise) else None),
        "float32_compute": how.get("float32_compute") or written.get("compute") == "float32",
    }


def _revision_of(written: Mapping[str, Any], name: str | None) -> str | None:
    """The revision of the model of a run, by its fingerprint; None for an adapter, whose fingerprint may have the revision of its base."""
    revision, own = written.get("revision"), written.get("name")
    return revision if revision and own and name in (None, own) and not is_adapter(own) else None
