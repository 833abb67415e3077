"""What a dump says was asked and written, before it is a trace, and how the readers of its shapes put it together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.messages import Said
from reasonscope.data.trace import FinishReason

_FINISH: Mapping[str, FinishReason] = {
    **dict.fromkeys(("stop", "end_turn", "stop_sequence", "eos", "tool_calls", "tool_use"), "stop"),
    **dict.fromkeys(("eosFound", "stopStringFound", "toolCalls"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length", "max_output_tokens"), "length"),
    **dict.fromkeys(("maxPredictedTokensReached", "contextLengthReached"), "length"),
}


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What was asked and what a model wrote, before it is a trace.

    Attributes:
        kind: The shape that it was found in.
        said: The messages, in order. The model wrote the last.
        prompt: The text that the model read, if the dump has it in place of messages.
        bare: Whether that text lost its special tokens.
        id: Its id; empty if it has none.
        problem_id: Id of what was asked; empty if it has none.
        gold: The gold answer, or None.
        group: What belongs together.
        difficulty: Of the problem, or None.
        sample: Its number among the samples, or None.
        finish: Why the model stopped.
        model: What is known about the model.
        tools: The tools that the model was offered.
        prompt_ids: Token ids of the prompt, if the server returned them.
        token_ids: Token ids of what it wrote, if the server returned them.
        meta: Further fields, in JSON.
        about: Those of them that the line itself calls `meta`; they are the problem's, too.
    """

    kind: str
    said: tuple[Said, ...]
    prompt: str | None = None
    bare: bool = False
    id: str = ""
    problem_id: str = ""
    gold: str | None = None
    group: str = ""
    difficulty: float | None = None
    sample: int | None = None
    finish: FinishReason = "unknown"
    model: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Any, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asked, as far as the dump has it."""

    said: tuple[Said, ...] = ()
    prompt: str | None = None
    prompt_ids: tuple[int, ...] = ()
    tools: tuple[Any, ...] = ()


def replied(kind: str, asked: Asked, said: Said, **fields: Any) -> Exchange:
    """What was asked, with the reply."""
    return Exchange(kind=kind, said=(*asked.said, said), prompt=asked.prompt, tools=asked.tools, **fields)


def replied_in_chat(kind: str, asked: Asked, said: Said, **fields: Any) -> Exchange:
    """As `replied`, for servers that put a prompt into the chat template as what the user says."""
    if asked.prompt and not asked.said:
        asked = replace(asked, said=(Said(role="user", text=asked.prompt),), prompt=None)
    return replied(kind, asked, said, **fields)


def completed(kind: str, asked: Asked, text: Any, where: str, **fields: Any) -> Exchange:
    """A completion that is one text."""
    if not isinstance(text, str):
        raise InputError(f"{where}: the completion is missing or not text")
    return replied(kind, asked, Said(role="assistant", text=text), **fields)


def number(value: Any, key: str, where: str) -> float:
    """`value`, if it is a finite number of the usual size. Raises InputError."""
    if not isinstance(value, int | float) or not abs(value) < 2**63:  # false for NaN too
        raise InputError(f"{where}: {key} must be a finite number below 2^63, got {value!r:.60}")
    return value


def finish_of(reason: Any) -> FinishReason:
    """Why a model stopped, by any of the names that programs give it."""
    return _FINISH.get(str(reason), "unknown")


def ids_of(values: Any) -> tuple[int, ...]:
    """Token ids; none if `values` are something else."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        return ()
    ids = tuple(values)
    return ids if all(isinstance(i, int) and i >= 0 for i in ids) else ()


def given_or(row: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of `key`, or `default` if it is missing or null."""
    return default if row.get(key) is None else row[key]


def object_of(value: Any, where: str) -> Mapping[str, Any]:
    """`value`, if it is a JSON object. Raises InputError."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value
