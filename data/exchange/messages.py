"""Messages as servers, trainers and evaluations write them: the text, the reasoning under whatever name, and tool calls."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import parse_json
from reasonscope.data.text.think_tags import GPT_OSS, ThinkTags

# The names under which a message has its reasoning beside its content, the most telling first.
_REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "summary_text", "refusal"))
_REASONING_PARTS = frozenset(
    ("reasoning", "reasoning_text", "thinking", "reasoning.text", "reasoning.summary", "thought")
)
# The provider keeps what it wrote to itself, and sends something that only it can read.
_HIDDEN_PARTS = frozenset(("redacted_thinking", "reasoning.encrypted", "encrypted_content"))
_CALL_PARTS = frozenset(
    ("tool_use", "tool_call", "function_call", "server_tool_use", "custom_tool_call", "mcp_call", "toolCallRequest")
)
_RESULT_PARTS = frozenset(("tool_result", "function_call_output", "custom_tool_call_output", "toolCallResult"))
# An image or a sound was seen by the model, but is not text; the trace says so in its place.
_SEEN_PARTS = frozenset(
    (
        "image",
        "image_url",
        "input_image",
        "audio",
        "input_audio",
        "video",
        "video_url",
        "file",
        "input_file",
        "document",
    )
)
_ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant", "model": "assistant", "ai": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Said:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant", "tool", or what else a server calls it.
        text: What was said, without the reasoning.
        reasoning: The reasoning, if the message has it apart from the text.
        name: The field or part that held the reasoning; "encrypted" if the provider keeps it to itself.
        calls: The tools that were called, each with `name` and `arguments`.
    """

    role: str
    text: str = ""
    reasoning: str = ""
    name: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates of transformers expect it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning:  # Qwen3 and DeepSeek call it reasoning_content, gpt-oss thinking
            message |= {"reasoning_content": self.reasoning, "thinking": self.reasoning}
        if self.calls:
            message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in self.calls]
        return message

    def begins_with(self, tags: ThinkTags) -> bool:
        """Whether the text begins with the opening tag, or with what is left of that of gpt-oss without its special tokens."""
        text = self.text.lstrip()
        bare = tags == GPT_OSS and text.startswith("analysis") and "assistantfinal" in text
        return bare or text.startswith(tags.open)

    @property
    def with_calls(self) -> str:
        """The text, and each tool call as most models write it."""
        calls = [f"<tool_call>\n{json.dumps(dict(call), ensure_ascii=False)}\n</tool_call>" for call in self.calls]
        return "\n".join([*[self.text] * bool(self.text), *calls])


def _role_and_content(value: Any, where: str, role: str | None) -> tuple[str, str | list[Any] | None]:
    """Who speaks, and what; a message may also hold only calls, a refusal or reasoning."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: a message must be a JSON object, got {type(value).__name__}")
    role = role or value.get("role") or value.get("from")
    content = next((value[key] for key in ("content", "value", "parts") if value.get(key) is not None), None)
    told = value.keys() & {"content", "value", "parts", "tool_calls", "refusal", *_REASONING}
    if not isinstance(role, str) or not isinstance(content, str | list | None) or not told:
        raise InputError(f"{where}: a message needs role and content, got {value!s:.80}")
    return role, content


def read_message(value: Any, where: str, role: str | None = None) -> Said:
    """One message, whose role is `role` if it does not say. Raises InputError if it cannot be understood."""
    role, content = _role_and_content(value, where, role)
    parts = _Parts(where)
    parts.read(content)
    reasoning, name = _reasoning_beside(value, where)
    calls = [*parts.calls, *_calls(value.get("tool_calls") or (), where)]
    if isinstance(value.get("function_call"), Mapping):
        calls.append(_call(value["function_call"]))
    if isinstance(value.get("refusal"), str):
        parts.texts.append(value["refusal"])
    inside = "\n".join(parts.reasoning)
    return Said(
        role=_ROLES.get(role, role),
        text="\n".join(parts.texts),
        reasoning=reasoning or inside,
        name=name if reasoning else parts.name if inside else "encrypted" if parts.hidden or name else "",
        calls=tuple(calls),
    )


def read_messages(values: Any, where: str) -> list[Said]:
    """The messages of a conversation. Raises InputError for an empty list, or a message that cannot be understood."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise InputError(f"{where}: messages must be a list of at least one message")
    return [read_message(value, where) for value in values]


def read_items(values: Sequence[Any], where: str, *, role: str = "assistant") -> list[Said]:
    """The turns in a list of items as the Responses API has them, where reasoning, text and calls are items of their own.

    A message that does not say who speaks is `role`'s.
    """
    return joined_turns(said for value in values for said in _item(value, where, role))


def joined_turns(pieces: Iterable[Said]) -> list[Said]:
    """The pieces with what the assistant wrote in a row as one turn, up to the result of a tool."""
    turns: list[Said] = []
    for said in pieces:
        joins = bool(turns) and said.role == turns[-1].role == "assistant"
        turns.append(_joined(turns.pop(), said) if joins else said)
    return turns


def _item(value: Any, where: str, role: str) -> list[Said]:
    kind = value.get("type", "message") if isinstance(value, Mapping) else None
    if kind == "message" or kind in _TEXT_PARTS:
        content = value.get("content", value.get("text"))
        return [read_message({**value, "content": content}, where, None if value.get("role") else role)]
    if kind in _SEEN_PARTS:
        return [read_message({"content": [value]}, where, role)]
    if kind == "reasoning":
        # The reasoning itself is in `content`; most providers send only what they made of it, in `summary`.
        found = {name: _as_text(value.get(name), where).strip() for name in ("content", "summary")}
        name = next((name for name, text in found.items() if text), "encrypted")
        return [Said(role="assistant", reasoning=found.get(name, ""), name="reasoning" if name == "content" else name)]
    if kind in _CALL_PARTS:
        called = read_message({"content": [value]}, where, "assistant")
        # LM Studio calls tools itself, and has what they returned in the same item.
        returned = [Said(role="tool", text=_as_text(value["output"], where))] if value.get("output") else []
        return [called, *returned]
    if kind in _RESULT_PARTS:
        return [read_message({"content": [value]}, where, "tool")]
    raise InputError(f"{where}: an item of type {kind!r} is not known")


def _joined(first: Said, second: Said) -> Said:
    return Said(
        role=first.role,
        text="\n".join(filter(None, (first.text, second.text))),
        reasoning="\n\n".join(filter(None, (first.reasoning, second.reasoning))),
        name=first.name if first.reasoning else second.name or first.name,
        calls=first.calls + second.calls,
    )


def _reasoning_beside(message: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The reasoning in a field of its own, and the name of the field; the name alone if nobody can read it."""
    hidden = ""
    for name in _REASONING:
        value = message.get(name)
        if isinstance(value, str) and value.strip():
            return value, name
        if isinstance(value, list):
            parts = _Parts(where)
            parts.read(value)
            found = "\n".join([*parts.reasoning, *parts.texts])
            if found.strip():
                return found, name
            hidden = name if parts.hidden else hidden
    return "", hidden


class _Parts:
    """The parts of a message's content, sorted by what they are."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[Mapping[str, Any]] = []
        self.hidden = False
        self.name = ""

    def read(self, content: str | Sequence[Any] | None) -> None:
        for part in [content] if isinstance(content, str) else content or ():
            if isinstance(part, str):
                self.texts.append(part)
            elif isinstance(part, Mapping):
                self._read_part(part, str(part.get("type", "text")))
            else:
                raise InputError(f"{self._where}: a part of a message must be text or a JSON object, got {part!r:.60}")

    def _read_part(self, part: Mapping[str, Any], kind: str) -> None:
        if kind in _HIDDEN_PARTS:
            self.hidden = True
        elif kind in _REASONING_PARTS or part.get("thought") is True:
            self._read_reasoning(part, kind)
        elif kind in _TEXT_PARTS:
            self.texts.append(_first_text(part, ("text", "refusal", "content"), self._where))
        elif kind in _CALL_PARTS:
            self.calls.append(_call(part))
        elif kind in _RESULT_PARTS:
            self.texts.append(_as_text(part.get("content", part.get("output")), self._where))
        elif kind in _SEEN_PARTS:
            self.texts.append(f"[{kind}]")
        else:
            raise InputError(f"{self._where}: a part of type {kind!r} is not known")

    def _read_reasoning(self, part: Mapping[str, Any], kind: str) -> None:
        # What is redacted is encrypted, and at most its summary can be read.
        told = () if part.get("redacted") else ("thinking", "reasoning", "text", "content")
        found = _first_text(part, (*told, "summary"), self._where)
        if found:
            self.reasoning.append(found)
            self.name = self.name or ("summary" if part.get("redacted") else kind)
        else:
            self.hidden = True


def _first_text(part: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    return next((_as_text(part[key], where) for key in keys if part.get(key)), "")


def _as_text(value: Any, where: str) -> str:
    """A text, or the texts of a list of parts."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        parts = _Parts(where)
        parts.read(value)
        return "\n".join([*parts.reasoning, *parts.texts])
    return json.dumps(value, ensure_ascii=False)


def _calls(values: Any, where: str) -> Iterator[Mapping[str, Any]]:
    if not isinstance(values, Sequence) or not all(isinstance(value, Mapping) for value in values):
        raise InputError(f"{where}: tool_calls must be a list of JSON objects, got {values!r:.60}")
    yield from map(_call, values)


def _call(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name of a called tool and its arguments, as JSON values if they are."""
    inner = value["function"] if isinstance(value.get("function"), Mapping) else value
    name = inner.get("name") or inner.get("function") or inner.get("tool") or ""
    arguments: Any = next(
        (inner[key] for key in ("arguments", "input", "parameters") if inner.get(key) is not None), {}
    )
    return {"name": str(name), "arguments": _parsed(arguments) if isinstance(arguments, str) else arguments}


def _parsed(text: str) -> Any:
    try:
        return parse_json(text, "arguments of a tool")
    except InputError:
        return text
