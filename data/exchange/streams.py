"""Replies that were dumped as they were streamed, put together again: one row for each reply in place of one per piece."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import wrap_errors

# The texts of a message that come in pieces.
_PIECES = ("content", "reasoning_content", "reasoning", "thinking", "response")
_Row = tuple[str, Any]


def join_streams(rows: Iterable[_Row]) -> Iterator[_Row]:
    """The rows of a dump, with the pieces of each streamed reply as one row, at the place of its first piece.

    Other rows come out as they are. A stream without an end counts as far as it goes.
    """
    running: dict[type[_Stream], _Stream] = {}
    for where, value in rows:
        kind = next((kind for kind in _STREAMS if kind.takes(value, running.get(kind))), None)
        if kind is None:
            yield where, value
            continue
        if kind in running and running[kind].is_other(value):
            yield running[kind].row
            del running[kind]
        stream = running.setdefault(kind, kind(where))
        try:
            with wrap_errors(where):
                complete = stream.add(value)
        except InputError as error:
            yield where, error
            continue
        if complete:
            yield running.pop(kind).row
    yield from (stream.row for stream in running.values())


class _Stream(ABC):
    """The pieces of one reply. `add` says whether the reply is complete with this one."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.whole: dict[str, Any] = {}

    @property
    def row(self) -> _Row:
        return self.where, self.whole

    @staticmethod
    @abstractmethod
    def takes(value: Any, running: "_Stream | None") -> bool:
        """Whether the piece is of this kind."""

    def is_other(self, value: Mapping[str, Any]) -> bool:
        """Whether the piece belongs to another reply than those before it."""
        return False

    @abstractmethod
    def add(self, value: Mapping[str, Any]) -> bool:
        """Take a piece in, and say whether the reply is complete with it."""


class _Chat(_Stream):
    """Chunks of chat completions. They say that they ended in the last chunk of each choice, and usage may follow."""

    @staticmethod
    def takes(value: Any, running: _Stream | None) -> bool:
        return isinstance(value, Mapping) and value.get("object") == "chat.completion.chunk"

    def is_other(self, value: Mapping[str, Any]) -> bool:
        return bool(value.get("id") != self.whole.get("id"))

    def add(self, value: Mapping[str, Any]) -> bool:
        self.whole.setdefault("choices", [])
        self.whole |= {key: value[key] for key in ("id", "model") if key in value}
        for choice in value.get("choices") or ():
            self._add(choice, self._choice(int(choice.get("index", 0))))
        return False

    def _choice(self, index: int) -> dict[str, Any]:
        for _ in range(len(self.whole["choices"]), min(index, 1023) + 1):
            self.whole["choices"].append({"message": {"role": "assistant", "content": None}})
        found: dict[str, Any] = self.whole["choices"][index]
        return found

    def _add(self, piece: Mapping[str, Any], choice: dict[str, Any]) -> None:
        choice["finish_reason"] = piece.get("finish_reason") or choice.get("finish_reason")
        delta, message = piece.get("delta") or {}, choice["message"]
        _append(message, delta)
        for call in delta.get("tool_calls") or ():
            calls = message.setdefault("tool_calls", [])
            if not calls or call.get("index", 0) >= len(calls):
                calls.append({"function": {"name": "", "arguments": ""}})
            for key in ("name", "arguments"):
                calls[-1]["function"][key] += (call.get("function") or {}).get(key) or ""


class _Ollama(_Stream):
    """Lines of Ollama, each with a piece of the message, up to one that is done."""

    @staticmethod
    def takes(value: Any, running: _Stream | None) -> bool:
        return isinstance(value, Mapping) and (value.get("done") is False or (running is not None and "done" in value))

    def add(self, value: Mapping[str, Any]) -> bool:
        said = self.whole.get("message") or self.whole
        pieces = value.get("message") if isinstance(value.get("message"), Mapping) else value
        own = {key: said.get(key) for key in _PIECES if said.get(key) is not None}
        _append(own, pieces or {})
        calls = [*(said.get("tool_calls") or ()), *((pieces or {}).get("tool_calls") or ())]
        own |= {"tool_calls": calls} if calls else {}
        self.whole = {**value, **own} if pieces is value else {**value, "message": {**(pieces or {}), **own}}
        return value.get("done") is True


class _Events(_Stream):
    """Events of Anthropic's messages."""

    @staticmethod
    def takes(value: Any, running: _Stream | None) -> bool:
        kind = value.get("type") if isinstance(value, Mapping) else None
        begins = kind == "message_start" and isinstance(value.get("message"), Mapping)
        goes_on = (
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
            "ping",
        )
        return begins or (running is not None and kind in goes_on)

    def is_other(self, value: Mapping[str, Any]) -> bool:
        return bool(value["type"] == "message_start")

    def add(self, value: Mapping[str, Any]) -> bool:
        kind = value["type"]
        if kind == "message_start":
            self.whole = {**value["message"], "content": []}
        elif kind == "content_block_start":
            self.whole["content"].append(dict(value.get("content_block") or {}))
        elif kind == "content_block_delta" and self.whole["content"]:
            self._add(self.whole["content"][-1], value.get("delta") or {})
        elif kind == "message_delta":
            self.whole |= value.get("delta") or {}
        return bool(kind == "message_stop")

    def _add(self, block: dict[str, Any], delta: Mapping[str, Any]) -> None:
        for name in ("text", "thinking", "partial_json"):
            if isinstance(delta.get(name), str):
                key = "input" if name == "partial_json" else name
                before = block.get(key)
                block[key] = (before if isinstance(before, str) else "") + delta[name]


class _Response(_Stream):
    """Events of the Responses API, of which the last has the whole response."""

    @staticmethod
    def takes(value: Any, running: _Stream | None) -> bool:
        return isinstance(value, Mapping) and str(value.get("type", "")).startswith("response.")

    def add(self, value: Mapping[str, Any]) -> bool:
        whole = value["type"] in ("response.completed", "response.incomplete", "response.failed")
        self.whole = dict(value["response"]) if whole and isinstance(value.get("response"), Mapping) else dict(value)
        return whole


class _LmStudio(_Stream):
    """Events of LM Studio's own chat, of which the last has the whole reply."""

    @staticmethod
    def takes(value: Any, running: _Stream | None) -> bool:
        kind = str(value.get("type", "")) if isinstance(value, Mapping) else ""
        return kind == "chat.start" or (running is not None and ("." in kind or kind == "error"))

    def is_other(self, value: Mapping[str, Any]) -> bool:
        return bool(value["type"] == "chat.start")

    def add(self, value: Mapping[str, Any]) -> bool:
        kind, _, stage = str(value["type"]).partition(".")
        if value["type"] == "chat.start":
            self.whole = {"model_instance_id": value.get("model_instance_id"), "output": []}
        elif value["type"] == "chat.end" and isinstance(value.get("result"), Mapping):
            self.whole = dict(value["result"])
        elif stage == "start" and kind in ("reasoning", "message", "tool_call"):
            self.whole["output"].append({"type": kind, "content": ""})
        elif stage == "delta" and self.whole["output"]:
            self.whole["output"][-1]["content"] += value["content"]
        elif stage in ("arguments", "result") and self.whole["output"]:
            self.whole["output"][-1] |= {key: value[key] for key in ("tool", "arguments", "output") if key in value}
        return bool(value["type"] == "chat.end")


_STREAMS = (_Chat, _Ollama, _Events, _Response, _LmStudio)


def _append(message: dict[str, Any], pieces: Mapping[str, Any]) -> None:
    details = pieces.get("reasoning_details")
    if isinstance(details, list) and not pieces.get("reasoning"):  # OpenRouter sends both, or these alone
        message.setdefault("reasoning_details", []).extend(one for one in details if one.get("data"))
        pieces = {**pieces, "reasoning": "".join(one.get("text") or one.get("summary") or "" for one in details)}
    for key in _PIECES:
        if isinstance(pieces.get(key), str):
            message[key] = (message.get(key) or "") + pieces[key]
