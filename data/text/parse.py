"""Traces of what a model read and wrote: the text, the tokens, and the regions of both.

The newline before a closing tag may be merged with the full stop in one token, and tags may be special tokens, plain added tokens, or
several pieces of text. Regions are therefore found in the text, and tokens follow by their offsets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.text.align import decode_with_offsets, tokens_overlapping
from reasonscope.data.text.answers import extract_answer, judge
from reasonscope.data.text.channels import find_channels
from reasonscope.data.text.think_tags import GPT_OSS as GPT_OSS
from reasonscope.data.text.think_tags import THINK as THINK
from reasonscope.data.text.think_tags import FoundThinking, TagPlaces, find_tagged, regions_from
from reasonscope.data.text.think_tags import ThinkTags as ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import FinishReason, Problem, Regions, Sampling, Span, ThinkingState, Trace


def find_regions(text: str, prompt_stop: int, tags: ThinkTags = THINK) -> tuple[Regions, ThinkingState]:
    r"""Find the thinking and the other regions of a text.

    | state | when | thinking |
    |---|---|---|
    | `closed` | a closing tag follows the opening one (or the start of the completion, if no tag opens) | between them |
    | `truncated` | opened, never closed | the rest of the text; close and answer are empty |
    | `empty` | only white space between the tags, in the prompt (thinking switched off) or in the completion | empty |
    | `absent` | no tag at all | empty; the completion is the answer |

    Only the first block counts; of a trace, `thinking_blocks` has them all. Tags in quotes, in code or in the middle of a sentence are
    words. Text of the completion before its opening tag belongs to `open`.

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
    found = (
        find_channels(text, prompt_stop) if tags == GPT_OSS else find_tagged(text, prompt_stop, tags, only_first=True)
    )
    return found.regions, found.state


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
    thinking: Thinking | None = None,
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
        thinking: How thinking is found, if not between `tags`.
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
    return _trace_of_ids(
        id, problem, token_ids, n_prompt_tokens, tokenizer, thinking or Thinking(tags=tags), True, fields
    )


def _trace_of_ids(
    id: str,
    problem: Problem,
    token_ids: Sequence[int] | NDArray[np.int64],
    n_prompt_tokens: int,
    tokenizer: Tokenizer,
    thinking: Thinking,
    of_run: bool,
    fields: _TraceFields,
) -> Trace:
    """The trace of token ids; only those `of_run` tell a tag that the model wrote from one that it quoted."""
    ids = np.asarray(token_ids, dtype=np.int64)
    if not 0 <= n_prompt_tokens <= len(ids):
        raise InputError(
            f"trace {id!r}: n_prompt_tokens must be 0 to {len(ids)}, got {n_prompt_tokens}; give the number of tokens of the prompt"
        )
    text, offsets = decode_with_offsets(ids, tokenizer)
    prompt_stop = int(offsets[n_prompt_tokens, 0]) if n_prompt_tokens < len(ids) else len(text)
    found = thinking.find(
        text,
        prompt_stop,
        finish=fields.get("finish_reason", "unknown"),
        places=_tag_places(ids, offsets, tokenizer, thinking) if of_run else None,
        turn_start=_turn_start(text, prompt_stop, problem, thinking),
    )
    if thinking.mode == "completion":
        found = replace(found, regions=_on_tokens(text, found.regions, offsets))
    tokens = regions_over_tokens(found.regions, offsets)
    if thinking.mode == "completion" and found.state == "closed" and not len(tokens.close_window):
        tokens = replace(tokens, close_window=Span(max(tokens.thinking.stop - 1, 0), tokens.thinking.stop))
    return _trace(id, problem, text, ids, offsets, n_prompt_tokens, found, tokens, thinking, fields)


def _trace(
    id: str,
    problem: Problem,
    text: str,
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    n_prompt_tokens: int,
    found: FoundThinking,
    tokens: Regions,
    thinking: Thinking,
    fields: _TraceFields,
) -> Trace:
    final = None if found.state == "truncated" else found.final or extract_answer(text[found.regions.answer.slice])
    told: _TraceFields = {**fields, "meta": {**fields.get("meta", {}), **_meta(found, thinking)}}
    return Trace(
        id=id,
        problem=problem,
        text=text,
        token_ids=ids,
        offsets=offsets,
        n_prompt_tokens=n_prompt_tokens,
        chars=found.regions,
        tokens=tokens,
        state=found.state,
        final_answer=final,
        correct=None if problem.answer is None else judge(final, problem.answer),
        **told,
    )


def _meta(found: FoundThinking, thinking: Thinking) -> dict[str, Any]:
    """What a trace says about its thinking beyond the regions: the mode if it is not tags, several blocks, and doubts."""
    told: dict[str, Any] = {} if thinking.mode == "tags" else {"mode": thinking.mode}
    if found.answer_by:
        told["answer_by"] = found.answer_by
    if len(found.blocks) > 1:
        told["blocks"] = [[block.start, block.stop] for block in found.blocks]
    if found.doubts:
        told["doubts"] = list(dict.fromkeys(found.doubts))
    return {"thinking": told} if told else {}


def _tag_places(
    ids: NDArray[np.int64], offsets: NDArray[np.int64], tokenizer: Tokenizer, thinking: Thinking
) -> TagPlaces | None:
    """Where the tags stand that begin with a token of their own."""
    if thinking.mode != "tags":
        return None
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    tags = thinking.tags or THINK

    def places(tag: str) -> frozenset[int] | None:
        heads = [content for content in added if content.strip() and tag.startswith(content)]
        if not heads:
            return None
        return frozenset(offsets[ids == added[max(heads, key=len)], 0].tolist())

    return TagPlaces(opens=places(tags.open), closes=places(tags.close))


def _turn_start(text: str, prompt_stop: int, problem: Problem, thinking: Thinking) -> int:
    """Where the last message of the prompt ends; what follows is the template's. 0 if it is not found, or for a raw prompt."""
    content = problem.messages[-1].content.strip() if problem.messages else ""
    tags = thinking.tags or THINK
    if not content or content in tags.open or content in tags.close:
        return 0
    at = text.rfind(content, 0, prompt_stop)
    return at + len(content) if at >= 0 else 0


def _on_tokens(text: str, chars: Regions, offsets: NDArray[np.int64]) -> Regions:
    """Regions that begin where tokens do, if only white space is between: the token " The" belongs to the answer "The …"."""
    starts = []
    for start in (chars.thinking.start, chars.answer.start):
        token = int(np.searchsorted(offsets[:, 0], start, side="right")) - 1
        begin = int(offsets[token, 0]) if token >= 0 else start
        starts.append(begin if not text[begin:start].strip() else start)
    thinking = max(starts[0], chars.open.start)
    answer = max(starts[1], chars.close.start) if len(chars.answer) else chars.answer.start
    return regions_from(chars.open.start, thinking, max(thinking, chars.close.start), answer, len(text))


def trace_from_text(
    *,
    id: str,
    problem: Problem,
    prompt: str,
    completion: str,
    tokenizer: Tokenizer | None = None,
    tags: ThinkTags = THINK,
    thinking: Thinking | None = None,
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
        thinking: How thinking is found, if not between `tags`.
        **fields: Further fields of `Trace`, such as `model` or `meta`.

    Returns:
        The trace.

    Example:
        problem = rs.Problem(id="p", prompt="2 + 2?", answer="4")
        trace = rs.data.trace_from_text(id="p/0", problem=problem, prompt="2 + 2?", completion="<think>Easy.</think>4")
        trace.correct  # True
    """
    thinking = thinking or Thinking(tags=tags)
    if tokenizer is not None:
        encoding = tokenizer.encode(prompt + completion, add_special_tokens=False)
        n_prompt_tokens = sum(start < len(prompt) for start, _ in encoding.offsets)
        return _trace_of_ids(id, problem, encoding.ids, n_prompt_tokens, tokenizer, thinking, False, fields)
    text = prompt + completion
    found = thinking.find(
        text,
        len(prompt),
        finish=fields.get("finish_reason", "unknown"),
        turn_start=_turn_start(text, len(prompt), problem, thinking),
    )
    none = np.zeros(0, dtype=np.int64)
    return _trace(id, problem, text, none, none.reshape(0, 2), 0, found, regions_from(0, 0, 0, 0, 0), thinking, fields)


def regions_over_tokens(chars: Regions, offsets: NDArray[np.int64]) -> Regions:
    """The regions over tokens that correspond to `chars` (see `Regions`), by the `offsets` (token, 2)."""
    begins = (chars.open.start, chars.thinking.start, chars.close.start, chars.answer.start)
    opened, thinking, close, answer = np.searchsorted(offsets[:, 0], begins, side="left").tolist()
    return replace(
        regions_from(opened, thinking, close, answer, len(offsets)),
        close_window=tokens_overlapping(offsets, chars.close),
    )
