"""What flows through the toolkit: problems, and traces with exact spans over characters and tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError

StepKind = Literal["execution", "reflection", "transition"]
ThinkingState = Literal["closed", "truncated", "empty", "absent"]
FinishReason = Literal["stop", "length", "unknown"]


@dataclass(frozen=True, order=True)
class Span:
    """A half-open range [start, stop) of characters or of tokens; which, is said where it stands."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InputError(f"span [{self.start}, {self.stop}) is not a range: 0 <= start <= stop is needed")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.stop

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question to put to a model: `messages` (put through the chat template) or a raw `prompt`, exactly one of them.

    `group` is what must stay together in a split (by default the id); `meta` is JSON.
    """

    id: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    group: str = ""
    difficulty: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise InputError(f"problem {self.id!r}: give either messages or prompt, and not both")
        if not self.group:
            object.__setattr__(self, "group", self.id)


@dataclass(frozen=True, kw_only=True)
class Regions:
    """The parts of a trace; `prompt open thinking close answer` follow each other and cover it without gap or overlap.

    Over characters: `open` is the opening tag with the white space behind it, `close` the closing tag with the white space around it;
    either may be empty. Over tokens: a token belongs to the part that holds its first character. `close_window` is every token that
    overlaps `close`, so it may begin with the last token of `thinking` where the tokenizer merged ".\\n" before the tag.
    """

    prompt: Span
    open: Span
    thinking: Span
    close: Span
    answer: Span
    close_window: Span

    def __post_init__(self) -> None:
        parts = (self.prompt, self.open, self.thinking, self.close, self.answer)
        if parts[0].start != 0 or any(a.stop != b.start for a, b in pairwise(parts)):
            raise InputError(
                f"regions {parts} leave a gap or overlap: each has to begin where the one before it ends, from 0"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a completion was drawn. `temperature` 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One prompt and one completion.

    `text` is what the model saw and wrote; `token_ids` (token,) int64 are the very ids of the run, `offsets` (token, 2) their
    character spans in `text`. The first `n_prompt_tokens` were given, the rest generated. `chars` and `tokens` are the regions over
    characters and over tokens. `logprobs` and `entropies` (generated token,) float32 in nats at the generating temperature, or None.
    `correct` is None where there is no gold answer. `model` is the fingerprint of the model that wrote it. `meta` is JSON.
    An imported text that nobody tokenised has no tokens: its arrays and all its token spans are empty. Two traces are equal when every
    field is, arrays by value and dtype.
    """

    id: str
    problem: Problem
    text: str
    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    n_prompt_tokens: int
    chars: Regions
    tokens: Regions
    state: ThinkingState
    finish_reason: FinishReason = "unknown"
    final_answer: str | None = None
    correct: bool | None = None
    sample: int = 0
    sampling: Sampling | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    logprobs: NDArray[np.float32] | None = None
    entropies: NDArray[np.float32] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if self.offsets.shape != (n, 2):
            raise InputError(
                f"trace {self.id!r}: offsets {self.offsets.shape} for {n} tokens; they have to be ({n}, 2)"
            )
        if not 0 <= self.n_prompt_tokens <= n:
            raise InputError(f"trace {self.id!r}: {self.n_prompt_tokens} prompt tokens of {n} tokens")
        if (self.chars.answer.stop, self.tokens.answer.stop) != (len(self.text), n):
            raise InputError(
                f"trace {self.id!r}: its regions do not end where its {len(self.text)} characters and {n} tokens do"
            )
        for name in ("logprobs", "entropies"):
            values = getattr(self, name)
            if values is not None and (values.shape, values.dtype) != ((n - self.n_prompt_tokens,), np.float32):
                raise InputError(
                    f"trace {self.id!r}: {name} are {values.dtype} {values.shape}; "
                    f"float32 is needed, one per generated token, ({n - self.n_prompt_tokens},)"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return all(_same(getattr(self, item.name), getattr(other, item.name)) for item in fields(self))

    def __hash__(self) -> int:
        return hash((self.id, self.text))

    @property
    def thinking(self) -> str:
        return self.text[self.chars.thinking.slice]

    @property
    def answer_text(self) -> str:
        return self.text[self.chars.answer.slice]

    @property
    def n_thinking_tokens(self) -> int:
        return len(self.tokens.thinking)


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return bool(type(a) is type(b) and a == b)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A piece of thinking between blank lines. `separator` is the token that opens it (SEAL reads and steers there)."""

    index: int
    kind: StepKind
    text: str
    chars: Span
    tokens: Span
    separator: int


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence of the thinking: `index` is its place among them, `chars` and `tokens` are spans in the whole trace; `tag` is its
    function, one of the eight."""

    index: int
    tag: str
    text: str
    chars: Span
    tokens: Span
