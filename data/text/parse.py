"""Find the thinking: split completions into prompt, opening tag, thinking, closing tag and answer, for any chat
template.

Real traces differ in all of this: the opening tag may be in the prompt (the template opened it), in the completion, or
missing; the closing tag is missing if the completion was cut off; the newline before it may be merged with the full
stop in one token; tags may be special tokens, plain added tokens, or several pieces of text; templates may prefill a
closed empty block to switch thinking off; earlier turns have blocks of their own. Tags are therefore searched in the
text, and tokens follow by their offsets.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.text.align import decode_with_offsets, tokens_overlapping
from reasonscope.data.text.answers import extract_answer, judge
from reasonscope.data.trace import FinishReason, Problem, Regions, Sampling, Span, ThinkingState, Trace

# What templates put between turns. A tag before one of these belongs to an earlier turn or to the user's words.
_TURN = re.compile(r"<[|｜][^<>]*[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|</s>")


@dataclass(frozen=True, kw_only=True)
class ThinkTags:
    """The text that opens and closes thinking.

    Attributes:
        open: The opening tag.
        close: The closing tag.
        implied: Whether a completion begins inside the thinking even though no opening tag is visible (text imported
            without its prompt, from a model whose template opens the tag).

    Raises:
        InputError: If a tag is empty or both are equal.

    Example:
        tags = rs.data.ThinkTags(open="<reasoning>", close="</reasoning>")
        model = rs.load_model("models/mine", tags=tags)
        traces = rs.import_jsonl("completions.jsonl", tags=tags)
    """

    open: str = "<think>"
    close: str = "</think>"
    implied: bool = False

    def __post_init__(self) -> None:
        if not self.open.strip() or not self.close.strip() or self.open == self.close:
            raise InputError(
                f"think tags {self.open!r}, {self.close!r}: give two different texts, such as <think> and </think>"
            )


THINK = ThinkTags()
GPT_OSS = ThinkTags(open="<|channel|>analysis<|message|>", close="<|end|><|start|>assistant<|channel|>final<|message|>")


def find_regions(text: str, prompt_stop: int, tags: ThinkTags = THINK) -> tuple[Regions, ThinkingState]:
    r"""Find the thinking and the other regions of a text.

    | state | when | thinking |
    |---|---|---|
    | `closed` | a closing tag follows the opening one (or the start of the completion, if no tag opens) | between them |
    | `truncated` | opened, never closed | the rest of the text; close and answer are empty |
    | `empty` | only white space between the tags, in the prompt (thinking switched off) or in the completion | empty |
    | `absent` | no tag at all | empty; the completion is the answer |

    Only the first closing tag after the opening one counts. Text of the completion before its opening tag belongs to
    `open`.

    Args:
        text: Prompt and completion.
        prompt_stop: The character at which the completion begins.
        tags: What opens and closes thinking.

    Returns:
        The regions over characters, and the state of the thinking.

    Example:
        text = "Q: 2 + 2? <think>\nEasy.\n</think>\n\n4"
        regions, state = rs.data.find_regions(text, prompt_stop=10)
        text[regions.thinking.slice], state  # ("Easy.", "closed")
    """
    opener = _opener(text, prompt_stop, tags)
    if opener is None:
        return _regions(prompt_stop, prompt_stop, prompt_stop, prompt_stop, len(text)), "absent"
    close = text.find(tags.close, opener.stop)
    body = text[opener.stop :] if close < 0 else text[opener.stop : close]
    start = opener.stop + len(body) - len(body.lstrip())
    if close < 0:
        return _regions(opener.start, start, len(text), len(text), len(text)), "truncated"
    stop = max(start, opener.stop + len(body.rstrip()))
    rest = text[close + len(tags.close) :]
    answer = len(text) - len(rest.lstrip())
    return _regions(opener.start, start, stop, answer, len(text)), "closed" if stop > start else "empty"


class _TraceFields(TypedDict, total=False):
    """The optional fields of `Trace` besides its text."""

    finish_reason: FinishReason
    sample: int
    sampling: Sampling | None
    model: Mapping[str, Any]
    logprobs: NDArray[np.float32] | None
    entropies: NDArray[np.float32] | None
    meta: Mapping[str, Any]


def build_trace(
    *,
    id: str,
    problem: Problem,
    token_ids: Sequence[int] | NDArray[np.int64],
    n_prompt_tokens: int,
    tokenizer: Tokenizer,
    tags: ThinkTags = THINK,
    **fields: Unpack[_TraceFields],
) -> Trace:
    """Make the trace of a run from its token ids.

    Args:
        id: Id of the trace.
        problem: What was asked.
        token_ids: (token,), prompt and completion.
        n_prompt_tokens: How many of them are the prompt.
        tokenizer: The model's tokenizer.
        tags: What opens and closes thinking.
        **fields: Further fields of `Trace`, such as `sampling` or `entropies`.

    Returns:
        The trace. Its final answer is searched in the answer only, and missing (None) if the thinking was cut off; `correct`
        says whether it equals `problem.answer` (None without a gold answer, or if that is not decided).

    Raises:
        InputError: If the counts do not fit, or the tokenizer is not supported.

    Example:
        completion = rs.generate(model, [ids])[0]
        trace = rs.data.build_trace(
            id="p/0", problem=problem, token_ids=[*ids, *completion.token_ids], n_prompt_tokens=len(ids), tokenizer=tokenizer
        )
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if not 0 <= n_prompt_tokens <= len(ids):
        raise InputError(
            f"trace {id!r}: n_prompt_tokens must be 0 to {len(ids)}, got {n_prompt_tokens}; give the number of tokens of the prompt"
        )
    text, offsets = decode_with_offsets(ids, tokenizer)
    prompt_stop = int(offsets[n_prompt_tokens, 0]) if n_prompt_tokens < len(ids) else len(text)
    chars, state = find_regions(text, prompt_stop, tags)
    final = None if state == "truncated" else extract_answer(text[chars.answer.slice])
    return Trace(
        id=id,
        problem=problem,
        text=text,
        token_ids=ids,
        offsets=offsets,
        n_prompt_tokens=n_prompt_tokens,
        chars=chars,
        tokens=regions_over_tokens(chars, offsets),
        state=state,
        final_answer=final,
        correct=None if problem.answer is None else judge(final, problem.answer),
        **fields,
    )


def trace_from_text(
    *,
    id: str,
    problem: Problem,
    prompt: str,
    completion: str,
    tokenizer: Tokenizer | None = None,
    tags: ThinkTags = THINK,
    **fields: Unpack[_TraceFields],
) -> Trace:
    """Make a trace from imported text.

    Args:
        id: Id of the trace.
        problem: What was asked.
        prompt: What the model read.
        completion: What it wrote.
        tokenizer: Encodes the text once, as a whole and without adding special tokens (a rendered template has its
            own); the first token that begins in the completion ends the prompt. Without it the trace has no tokens: its
            arrays and token spans are empty, and methods that need tokens refuse it.
        tags: What opens and closes thinking.
        **fields: Further fields of `Trace`, such as `model` or `meta`.

    Returns:
        The trace.

    Example:
        problem = rs.Problem(id="p", prompt="2 + 2?", answer="4")
        trace = rs.data.trace_from_text(id="p/0", problem=problem, prompt="2 + 2?", completion="<think>Easy.</think>4")
        trace.correct  # True
    """
    if tokenizer is not None:
        encoding = tokenizer.encode(prompt + completion, add_special_tokens=False)
        n_prompt_tokens = sum(start < len(prompt) for start, _ in encoding.offsets)
        return build_trace(
            id=id,
            problem=problem,
            token_ids=encoding.ids,
            n_prompt_tokens=n_prompt_tokens,
            tokenizer=tokenizer,
            tags=tags,
            **fields,
        )
    text = prompt + completion
    chars, state = find_regions(text, len(prompt), tags)
    final = None if state == "truncated" else extract_answer(text[chars.answer.slice])
    return Trace(
        id=id,
        problem=problem,
        text=text,
        token_ids=np.zeros(0, dtype=np.int64),
        offsets=np.zeros((0, 2), dtype=np.int64),
        n_prompt_tokens=0,
        chars=chars,
        tokens=_regions(0, 0, 0, 0, 0),
        state=state,
        final_answer=final,
        correct=None if problem.answer is None else judge(final, problem.answer),
        **fields,
    )


def regions_over_tokens(chars: Regions, offsets: NDArray[np.int64]) -> Regions:
    """The regions over tokens that correspond to `chars` (see `Regions`), by the `offsets` (token, 2)."""
    begins = (chars.open.start, chars.thinking.start, chars.close.start, chars.answer.start)
    opened, thinking, close, answer = np.searchsorted(offsets[:, 0], begins, side="left").tolist()
    return replace(
        _regions(opened, thinking, close, answer, len(offsets)), close_window=tokens_overlapping(offsets, chars.close)
    )


def _opener(text: str, prompt_stop: int, tags: ThinkTags) -> Span | None:
    """The start of `open` and the end of its tag; an empty span if thinking begins with the completion, without a
    tag."""
    given = _opener_in_prompt(text, prompt_stop, tags)
    written = text.find(tags.open, prompt_stop)
    first_close = text.find(tags.close, prompt_stop)
    if given is not None:
        prefill = text[given.stop : prompt_stop].strip()
        if not prefill:
            return given
        if prefill == tags.close:  # thinking was switched off, but a model may still open it
            reopened = text[prompt_stop:].lstrip().startswith(tags.open)
        else:  # a prefix of the thinking was given, or the prompt mentions the tag and the model opens its own
            reopened = written >= 0 and not 0 <= first_close < written
        if not reopened:
            return given
    if written >= 0:
        return Span(prompt_stop, written + len(tags.open))
    return Span(prompt_stop, prompt_stop) if tags.implied or first_close >= 0 else None


def _opener_in_prompt(text: str, prompt_stop: int, tags: ThinkTags) -> Span | None:
    """The tag that the prompt leaves open, or opens and closes at its very end; not one of an earlier turn."""
    start = text.rfind(tags.open, 0, prompt_stop)
    if start < 0:
        return None
    stop = start + len(tags.open)
    inside, closed, behind = text[stop:prompt_stop].partition(tags.close)
    if _TURN.search(inside) or (closed and behind.strip()):
        return None
    return Span(start, stop)


def _regions(open_start: int, thinking: int, close: int, answer: int, end: int) -> Regions:
    """The regions, from the start of each part but the first."""
    return Regions(
        prompt=Span(0, open_start),
        open=Span(open_start, thinking),
        thinking=Span(thinking, close),
        close=Span(close, answer),
        answer=Span(answer, end),
        close_window=Span(close, answer),
    )
