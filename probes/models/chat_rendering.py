"""Conversations that somebody else's server had, rendered as the model read them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import THINK, ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.models.tags import with_reasoning, with_thinking_closed

_MARK = "what0was0said"


@dataclass(frozen=True, kw_only=True)
class TemplateRenderer:
    """Renders conversations by the chat template of a model; see `data.exchange.imported.ChatRenderer`."""

    model: Prompting

    @property
    def thinking(self) -> Thinking:
        """How thinking is found in texts that do not part it."""
        return self.model.thinking

    @property
    def tags(self) -> ThinkTags:
        """The model's own tags; the usual ones if it does not say, since the dump has reasoning all the same."""
        return self.model.tags or THINK

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer_backend

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return self.model.fingerprint

    @property
    def context_length(self) -> int:
        return self.model.context_length

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, think: bool) -> str:
        """The text that the model reads. Without `think` a template that opens the thinking also closes it, since the
        model wrote no thinking."""
        text = self._render(messages, tools, think=think)
        if not think and text.rstrip().endswith(self.tags.open):
            text = with_thinking_closed(text, self.tags)
        return text

    def restored(self, prompt: str) -> str | None:
        """A prompt that was decoded without its special tokens, with them; None if the template writes no such prompt."""
        for think in (True, False):
            for roles in (("user",), ("system", "user")):
                if (found := self._restored(prompt, roles, think=think)) is not None:
                    return found
        return None

    def _restored(self, bare: str, roles: Sequence[str], *, think: bool) -> str | None:
        """The prompt of one message for each of `roles`, if it reads `bare` without its special tokens."""
        try:
            blank = self._render([{"role": role, "content": _MARK} for role in roles], (), think=think)
            around = self._without_specials(blank).split(_MARK)
            found = re.fullmatch("(.*?)".join(map(re.escape, around)), bare, re.DOTALL)
            if found is None or len(around) != len(roles) + 1:
                return None
            said = [{"role": role, "content": text} for role, text in zip(roles, found.groups(), strict=True)]
            whole = self._render(said, (), think=think)
        except InputError:  # a template without a system message
            return None
        return whole if self._without_specials(whole) == bare else None

    def _without_specials(self, text: str) -> str:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def reply(self, messages: Sequence[Mapping[str, Any]], said: Mapping[str, Any], tools: Sequence[Any]) -> str | None:
        """What the model wrote, as the template writes a last turn, up to its end token; None if the template leaves
        something out or changes what was before."""
        prompt = self._render(messages, tools, think=True)
        whole = self._render([*messages, said], tools, think=True, asks=False)
        written = whole[len(prompt) :]
        told = (said.get("reasoning_content", "").strip(), said["content"].strip())
        if not whole.startswith(prompt) or not all(text in written for text in told):
            return None
        end = self.model.tokenizer.eos_token
        return written[: written.rindex(end) + len(end)] if end and end in written else written

    def assembled(self, prompt: str, reasoning: str, text: str, *, ended: bool) -> str:
        """What the model wrote, from its parts; see `ChatRenderer`."""
        end = (self.model.tokenizer.eos_token or "") if ended and (text or not reasoning) else ""
        return (with_reasoning(prompt, reasoning, text, self.tags) if reasoning else text) + end

    def encode(self, text: str) -> list[int]:
        return self.model.encode_text(text)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, think: bool, asks: bool = True
    ) -> str:
        how: dict[str, Any] = {"of": "the dump", "instead": "import it without --model"}
        return self.model.render(messages, think=think, asks=asks, tools=tools, **how)
