"""Problems, and traces with exact spans over characters and tokens."""

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
    """A half-open range [start, stop) of characters or of tokens; whoever holds the span says which.

    Attributes:
        start: First position.
        stop: One past the last position; equal to `start` if the span is empty.

    Raises:
        InputError: If not 0 <= start <= stop.

    Example:
        span = rs.data.Span(3, 7)
        len(span)  # 4
        text[span.slice]
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InputError(f"invalid span [{self.start}, {self.stop}): it needs 0 <= start <= stop")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.stop

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a chat.

    Attributes:
        role: "system", "user" or "assistant".
        content: Its text.

    Example:
        system = rs.Message(role="system", content="Think step by step.")
        user = rs.Message(role="user", content="What is 17 · 24?")
        problem = rs.Problem(id="product", messages=(system, user))
    """

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question for a model, as chat messages or as a raw prompt.

    Attributes:
        id: Unique among the problems of a run.
        messages: The chat, which the model's chat template turns into a prompt. Give either this or `prompt`.
        prompt: The raw prompt, used as it is.
        answer: The gold answer, or None if it is not known.
        group: Problems of one group stay together in every split of the data; by default each problem is its own group.
        difficulty: Any number that grows with difficulty, or None.
        meta: Further fields, in JSON.

    Raises:
        InputError: If both or neither of `messages` and `prompt` are given.

    Example:
        question = rs.Message(role="user", content="What is 17 · 24?")
        problem = rs.Problem(id="product", messages=(question,), answer="408")
        store = rs.record(model, [problem], "runs/mine")
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
            raise InputError(f"problem {self.id!r}: give either messages or prompt, not both or neither")
        if not self.group:
            object.__setattr__(self, "group", self.id)


@dataclass(frozen=True, kw_only=True)
class Regions:
    r"""The parts of a trace: `prompt open thinking close answer`, in this order and without gaps or overlaps.

    A trace has its regions twice, over characters and over tokens. A token belongs to the region that holds its first
    character.

    Attributes:
        prompt: The prompt without the opening tag.
        open: The opening tag and the white space after it; may be empty.
        thinking: The reasoning between the tags.
        close: The closing tag and the white space around it; may be empty. Without tags, the white space before the answer.
        answer: Everything after the closing tag.
        close_window: Every token that overlaps `close`. It may begin with the last token of `thinking`, if the
            tokenizer merged ".\n" in front of the tag. Without tags, the last token of `thinking` if `close` is empty.

    Raises:
        InputError: If a region does not begin where the one before it ends.

    Example:
        trace = next(iter(store))
        trace.text[trace.chars.answer.slice]
        trace.token_ids[trace.tokens.thinking.slice]
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
                f"regions {parts} leave a gap or overlap: the first must begin at 0, and each where the last one ends"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: Nucleus sampling: tokens are drawn from the smallest set with this probability.
        max_new_tokens: Completions are cut after so many tokens.
        seed: Seed of the draws; each problem and each sample derives its own from it.
        top_k: Tokens are drawn from this many of the likeliest; 0 for all.
        min_p: Tokens are drawn from those with at least this share of the probability of the likeliest.
        repetition_penalty: Divides positive logits of tokens that the prompt or the completion holds, and multiplies negative ones.
        presence_penalty: Is taken off the logits of tokens that the completion holds.
        stop: Texts that end a completion, which keeps them.

    Raises:
        InputError: If a value is out of its range.

    Example:
        sampling = rs.Sampling(temperature=0.6, top_p=0.95, max_new_tokens=4096)
        store = rs.record(model, problems, "runs/mine", sampling=sampling)
        store.traces[0].sampling.temperature  # 0.6
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        wrong = {
            "top_k": self.top_k < 0,
            "min_p": not 0 <= self.min_p <= 1,
            "repetition_penalty": not self.repetition_penalty > 0,
            "stop": not all(self.stop),
        }
        for name in (name for name, bad in wrong.items() if bad):
            raise InputError(
                f"invalid {name} {getattr(self, name)!r}: top_k is 0 or more, min_p from 0 to 1, repetition_penalty above 0, stop not empty"
            )

    @property
    def penalises(self) -> bool:
        """Whether a penalty depends on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One prompt and one completion, with the tokens of the run and their exact place in the text.

    Two traces are equal if all their fields are, arrays by value and dtype.

    Attributes:
        id: `problem.id` and the number of the sample, such as "gsm-194/0".
        problem: The problem that was asked.
        text: What the model read and wrote.
        token_ids: (token,) int64, the token ids of the run, never re-tokenised. Empty for an imported text without
            tokens.
        offsets: (token, 2) int64, the character span of each token in `text`.
        n_prompt_tokens: How many of the tokens were given; the rest was generated.
        chars: The regions over characters.
        tokens: The regions over tokens.
        state: Whether the thinking block is "closed", "truncated", "empty" or "absent".
        finish_reason: "stop", "length" or "unknown".
        final_answer: The extracted answer, or None.
        correct: Whether it equals the gold answer; None without a gold answer, or if that is not decided.
        sample: Number of the sample among those of the problem.
        sampling: How the completion was sampled, if that is known.
        model: Fingerprint of the model that wrote it.
        logprobs: (generated token,) float32, nats at the sampling temperature, or None.
        entropies: (generated token,) float32, entropy in nats of each next-token distribution, or None.
        meta: Further fields, in JSON.

    Raises:
        InputError: If arrays, regions and text do not fit each other.

    Example:
        trace = rs.open_run("runs/mine").traces[0]
        trace.thinking, trace.final_answer, trace.correct
        trace.entropies[: trace.n_thinking_tokens]
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
            raise InputError(f"trace {self.id!r}: offsets have shape {self.offsets.shape}; {n} tokens need ({n}, 2)")
        if not 0 <= self.n_prompt_tokens <= n:
            raise InputError(f"trace {self.id!r}: n_prompt_tokens must be 0 to {n}, got {self.n_prompt_tokens}")
        if (self.chars.answer.stop, self.tokens.answer.stop) != (len(self.text), n):
            raise InputError(
                f"trace {self.id!r}: its regions must end with its {len(self.text)} characters and {n} tokens"
            )
        for name in ("logprobs", "entropies"):
            values = getattr(self, name)
            if values is not None and (values.shape, values.dtype) != ((n - self.n_prompt_tokens,), np.float32):
                raise InputError(
                    f"trace {self.id!r}: {name} must be float32 ({n - self.n_prompt_tokens},), one per generated token, "
                    f"got {values.dtype} {values.shape}"
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
    def undecided(self) -> bool:
        """Whether there is a gold answer, but comparing it with the final answer took too long and was given up."""
        return self.correct is None and self.problem.answer is not None

    @property
    def n_thinking_tokens(self) -> int:
        """The tokens of all blocks of thinking together."""
        return sum(map(len, self.thinking_blocks)) if self._has_blocks else len(self.tokens.thinking)

    @property
    def thinking_spans(self) -> tuple[Span, ...]:
        """The blocks of thinking, as spans of characters: one, or several if the model thought again after the first."""
        if not self._has_blocks:
            return (self.chars.thinking,)
        return tuple(Span(*block) for block in self.meta["thinking"]["blocks"])

    @property
    def thinking_blocks(self) -> tuple[Span, ...]:
        """The blocks of thinking, as spans of tokens."""
        if not self._has_blocks:
            return (self.tokens.thinking,)
        return tuple(
            Span(*np.searchsorted(self.offsets[:, 0], [span.start, span.stop], side="left").tolist())
            for span in self.thinking_spans
        )

    @property
    def thinking_positions(self) -> NDArray[np.int64]:
        """The positions of all tokens of thinking, block after block: (thinking token,)."""
        return np.concatenate([np.arange(block.start, block.stop) for block in self.thinking_blocks])

    def without_gaps(self, span: Span) -> NDArray[np.int64]:
        """The positions of a span of tokens, without those that are written between two blocks of thinking."""
        places, whole, blocks = np.arange(span.start, span.stop), self.tokens.thinking, self.thinking_positions
        return places[(places < whole.start) | (places >= whole.stop) | np.isin(places, blocks)]

    def only_thinking(self, values: NDArray[Any]) -> NDArray[Any]:
        """`values` (…, token) of all tokens, from the first of the thinking to the last; NaN between two blocks of thinking."""
        kept = np.full(values.shape, np.nan)
        kept[..., self.thinking_positions] = values[..., self.thinking_positions]
        return kept[..., self.tokens.thinking.slice]

    @property
    def written_thinking(self) -> NDArray[np.int64]:
        """The positions of the thinking that the model wrote itself, after the prompt and its prefill."""
        return self.thinking_positions[self.thinking_positions >= self.n_prompt_tokens]

    @property
    def _has_blocks(self) -> bool:
        told = self.meta.get("thinking")
        return isinstance(told, Mapping) and "blocks" in told


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return bool(type(a) is type(b) and a == b)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A paragraph of the reasoning: the text between two blank lines.

    Attributes:
        index: Its number in the reasoning, from 0.
        kind: "execution", "reflection" or "transition" (SEAL, arXiv 2504.07986).
        text: Its text.
        chars: Its span in the characters of the trace.
        tokens: Its span in the tokens of the trace.
        separator: The token that opens it, at which SEAL reads and steers.

    Example:
        steps = rs.steps(trace)
        [step.kind for step in steps]
        trace.text[steps[0].chars.slice]
    """

    index: int
    kind: StepKind
    text: str
    chars: Span
    tokens: Span
    separator: int


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence of the reasoning.

    Attributes:
        index: Its number in the reasoning, from 0.
        tag: Its function, one of the eight of Thought Anchors (arXiv 2506.19143).
        text: Its text.
        chars: Its span in the characters of the trace.
        tokens: Its span in the tokens of the trace.

    Example:
        sentences = rs.sentences(trace)
        [sentence.tag for sentence in sentences]
        trace.token_ids[sentences[0].tokens.slice]
    """

    index: int
    tag: str
    text: str
    chars: Span
    tokens: Span
