"""How thinking is found in what a model wrote: between tags, in the open, or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from reasonscope.data.errors import InputError
from reasonscope.data.text.channels import find_channels
from reasonscope.data.text.final_answer import compiled, find_stated
from reasonscope.data.text.think_tags import (
    GPT_OSS,
    THINK,
    FoundThinking,
    TagPlaces,
    ThinkTags,
    find_tagged,
    regions_from,
)
from reasonscope.data.trace import FinishReason

ThinkingMode = Literal["tags", "completion", "none"]


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How thinking is found in a completion. A store keeps it in its manifest, and every later command uses it again.

    Attributes:
        mode: "tags": between the think tags. "completion": the model reasons in the open, and everything before the sentence that
            states the final answer is its reasoning. "none": nothing is reasoning, and the completion is the answer.
        tags: The tags, for the mode "tags"; None for those that `load_model` finds in tokenizer and chat template.
        answer_pattern: For the mode "completion", a regular expression that matches in the sentence that states the final answer; its
            first group, if it has one, is the answer. By default the rules of docs/thinking.md.

    Raises:
        InputError: If the mode is unknown, the pattern is invalid, or tags and pattern do not fit the mode.

    Example:
        in_the_open = rs.Thinking(mode="completion", answer_pattern="So the result is (.+)")
        model = rs.load_model("models/mine", thinking=in_the_open)
        store = rs.record(model, problems, "runs/mine")
    """

    mode: ThinkingMode = "tags"
    tags: ThinkTags | None = None
    answer_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(ThinkingMode):
            raise InputError(f"unknown kind of thinking {self.mode!r}; choose from {', '.join(get_args(ThinkingMode))}")
        if self.tags is not None and self.mode != "tags":
            raise InputError(f"thinking {self.mode!r} has no tags; leave them out, or choose thinking 'tags'")
        if self.answer_pattern is not None:
            if self.mode != "completion":
                raise InputError(f"an answer pattern needs thinking 'completion', not {self.mode!r}")
            compiled(self.answer_pattern)

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> "Thinking | None":
        """How thinking is found in a store, by its `meta`; None for a store that does not say. Raises InputError for invalid values."""
        known = meta.get("thinking")
        if known is None:
            return None
        if not isinstance(known, Mapping):
            raise InputError(f"the store says {known!r} about its thinking; a mapping with a mode is needed")
        tags = known.get("tags")
        return cls(
            mode=known.get("mode", "tags"),
            tags=None if tags is None else ThinkTags(**tags),
            answer_pattern=known.get("answer_pattern"),
        )

    def to_dict(self) -> dict[str, Any]:
        """For the `meta` of a store, in JSON."""
        told: dict[str, Any] = {"mode": self.mode}
        if self.tags is not None:
            told["tags"] = {"open": self.tags.open, "close": self.tags.close, "answer": self.tags.answer}
        return told | ({"answer_pattern": self.answer_pattern} if self.answer_pattern is not None else {})

    def find(
        self,
        text: str,
        prompt_stop: int,
        *,
        finish: FinishReason = "unknown",
        places: TagPlaces | None = None,
        turn_start: int = 0,
    ) -> FoundThinking:
        """Where a prompt of `prompt_stop` characters and its completion think; `places` and `turn_start` as in `find_tagged`."""
        if self.mode == "none":
            absent = regions_from(prompt_stop, prompt_stop, prompt_stop, prompt_stop, len(text))
            return FoundThinking(regions=absent, state="absent")
        if self.mode == "completion":
            return find_stated(text, prompt_stop, self.answer_pattern, finish)
        tags = self.tags or THINK
        if (tags.open, tags.close) == (GPT_OSS.open, GPT_OSS.close):
            return find_channels(text, prompt_stop)
        return find_tagged(text, prompt_stop, tags, places=places, turn_start=turn_start)

    @property
    def closing(self) -> str:
        """What ends the thinking of a text that is still thinking, and begins the answer."""
        return f"\n{(self.tags or THINK).close}\n\n" if self.mode == "tags" else "\n\n"

    def continued(self, text: str, *, finish: FinishReason) -> tuple[str, FoundThinking]:
        """Where a continuation that begins inside the thinking thinks on; with the text that this refers to."""
        if self.mode != "tags":
            return text, self.find(text, 0, finish=finish)
        opened = f"{(self.tags or THINK).open}{text}"
        return opened, self.find(opened, 0, finish=finish)
