"""The sentences of a trace that was published with them (Thought Anchors, arXiv 2506.19143), found in its text."""

from collections.abc import Mapping
from typing import Any

from reasonscope.data.text.steps_and_sentences import sentences_at
from reasonscope.data.trace import Sentence, Span, Trace


def published_sentences(trace: Trace) -> list[Sentence]:
    """The published sentences of an imported Thought Anchors trace, with exact spans and their first published tag.

    The chunks lost their line breaks when they were cut, so they are found in the thinking regardless of white space. A
    chunk that does not occur (an edited row) is left out. Empty for a trace without published chunks.
    """
    placed = _placed_chunks(trace)
    tags = [(chunk["function_tags"] or ["unknown"])[0] for _, _, chunk in placed]
    return sentences_at(trace, [span for span, _, _ in placed], tags)


def published_numbers(trace: Trace) -> list[int]:
    """The published `chunk_idx` of each of `published_sentences`, by which published importances and effects refer
    to it."""
    return [number for _, number, _ in _placed_chunks(trace)]


def _placed_chunks(trace: Trace) -> list[tuple[Span, int, Mapping[str, Any]]]:
    """The span of each published chunk in the text, its `chunk_idx`, and the chunk; chunks that do not occur are
    left out."""
    thinking, base = trace.thinking, trace.chars.thinking.start
    places = [i for i, char in enumerate(thinking) if not char.isspace()]
    dense = "".join(thinking[i] for i in places)
    found, cursor = [], 0
    for index, chunk in enumerate(trace.meta.get("chunks", ())):
        text = "".join(chunk["chunk"].split())
        start = dense.find(text, cursor)
        if text and start >= 0:
            cursor = start + len(text)
            span = Span(base + places[start], base + places[cursor - 1] + 1)
            found.append((span, int(chunk.get("chunk_idx", index)), chunk))
    return found
