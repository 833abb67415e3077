"""Two ways to split reasoning: steps between blank lines (SEAL), and sentences (Thought Anchors, and our own)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.text.align import token_strings
from reasonscope.data.text.parse import THINK, ThinkTags
from reasonscope.data.text.sentence_labels import label_sentences
from reasonscope.data.text.sentence_splitter import Splitter, split_sentences
from reasonscope.data.trace import Sentence, Span, Step, StepKind, Trace
from reasonscope.data.variants import Variant, is_published

_BLANK_LINE = "\n\n"
_REFLECTION = (
    "verify", "make sure", "hold on", "think again", "'s correct", "'s incorrect", "let me check", "seems right",
)  # fmt: skip
_TRANSITION = (
    "another way", "another approach", "another method", "another solution", "another strategy", "another technique",
)  # fmt: skip
# The published list misspells this keyword, so it never matches English text.
_DIFFERENTLY = {"corrected": "think differently", "published": "think differenly"}


def steps(trace: Trace, *, variant: Variant = "corrected") -> list[Step]:
    """Split the thinking of a trace into steps (SEAL, arXiv 2504.07986; `generate_index` of its code).

    A separator is a token whose string holds two newlines in a row; each opens a step that runs to the next separator,
    or to the closing tag. Text before the first separator is not a step. Two separators in a row enclose an empty step,
    of kind execution. Token spans exclude both separators; `text` is exactly what lies between them.

    Args:
        trace: A trace with tokens.
        variant: "published" uses the published keyword list with its misspelling.

    Returns:
        The steps, in order.

    Raises:
        InputError: For a trace without tokens.

    Departures: the region is the trace's thinking, found in the text, so traces whose opening tag is missing or is not
    a single token have steps too (the published code finds none there, or searches for a piece of the tag). Of several
    blocks of thinking each has steps; `published` takes those of the first. Some tokenizers write a blank line as two
    tokens, of which the second is a separator here (`published` finds no step then).
    `seal_steps` is the rule to the letter.

    Example:
        steps = rs.steps(trace)
        [step.kind for step in steps]
        [step.separator for step in steps]
    """
    _need_tokens(trace)
    opened = trace.chars.open.start + len(trace.text[trace.chars.open.slice].rstrip())
    closed = trace.chars.close.stop - len(trace.text[trace.chars.close.slice].lstrip())
    start, stop = np.searchsorted(trace.offsets[:, 0], [opened, max(opened, closed)], side="left").tolist()
    blocks, ends = trace.thinking_blocks, [*(span.stop for span in trace.thinking_spans[:-1]), closed]
    starts = [start, *(block.start for block in blocks[1:])]
    stops = [*(block.stop for block in blocks[:-1]), stop]
    pieces = token_strings(trace.text, trace.offsets)
    cut = [
        (tokens, end)
        for begin, until, end in list(zip(starts, stops, ends, strict=True))[: 1 if is_published(variant) else None]
        for tokens in _between_separators(pieces, Span(begin, max(begin, until)), in_pieces=not is_published(variant))
    ]
    return [_step(trace, index, tokens, end, variant) for index, (tokens, end) in enumerate(cut)]


def seal_steps(
    pieces: Sequence[str], *, variant: Variant = "corrected", think_only: bool = True, tags: ThinkTags = THINK
) -> list[Step]:
    """The steps from the strings of the tokens, to the letter of the published rule; spans count from their start, joined.

    The region is strictly between the first opening tag and the next closing tag, or all of it unless `think_only`.
    """
    region = Span(0, len(pieces))
    if think_only:
        if tags.open not in pieces:
            return []
        start = list(pieces).index(tags.open) + 1
        stop = list(pieces).index(tags.close, start) if tags.close in pieces[start:] else len(pieces)
        region = Span(start, stop)
    begins = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(int).tolist()
    found = []
    for index, tokens in enumerate(_between_separators(pieces, region)):
        text = "".join(pieces[tokens.slice])
        chars = Span(begins[tokens.start], begins[tokens.stop])
        found.append(_named(index, text, chars, tokens, variant))
    return found


def classify_step(text: str, *, variant: Variant = "corrected") -> StepKind:
    """The kind of a step by its words, ignoring case; the first match wins: reflection, then transition, else
    execution."""
    is_published(variant)
    words = (
        text.strip(" ").strip("\n").lower()
    )  # in this order, as published: "\n wait" keeps its space and is not a reflection
    if words.startswith("wait") or any(word in words for word in _REFLECTION):
        return "reflection"
    if words.startswith("alternatively") or any(word in words for word in (*_TRANSITION, _DIFFERENTLY[variant])):
        return "transition"
    return "execution"


def separator_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids, ascending, of all tokens of a byte-level vocabulary whose string has a blank line (two newlines in a
    row)."""
    newline = "ĊĊ"  # a byte-level vocabulary writes a newline as Ċ
    return sorted(
        index
        for token, index in tokenizer.get_vocab(with_added_tokens=True).items()
        if newline in token or _BLANK_LINE in token
    )


def newline_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids, ascending, of the tokens that are one newline."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(vocabulary[token] for token in ("Ċ", "\n", "<0x0A>") if token in vocabulary)


def sentences(trace: Trace, *, splitter: Splitter = "default") -> list[Sentence]:
    """Split the thinking of a trace into sentences with their tags (see `label_sentences`).

    Character spans have no white space at either end. A token belongs to the sentence that holds its first character
    that is not white space (a token " So" begins with the blank before the sentence); white space between sentences
    belongs to none.

    Args:
        trace: A trace; without tokens, the token spans are empty.
        splitter: "default"; "thought_anchors", the published splitter (arXiv 2506.19143) with the last piece kept; or
            "thought_anchors_published", which drops a piece that no stop closes.

    Returns:
        The sentences, in order.

    Example:
        sentences = rs.sentences(trace)
        [sentence.text for sentence in sentences]
        [sentence.tag for sentence in sentences]
    """
    spans = [
        Span(block.start + span.start, block.start + span.stop)
        for block in trace.thinking_spans
        for span in split_sentences(trace.text[block.slice], splitter)
    ]
    return sentences_at(trace, spans, label_sentences([trace.text[span.slice] for span in spans]))


def sentences_at(trace: Trace, spans: Sequence[Span], tags: Sequence[str]) -> list[Sentence]:
    """Sentences at given character spans of a trace, ascending and disjoint, with given tags; tokens as in `sentences`."""
    leads = np.array([_lead(trace.text, start, stop) for start, stop in trace.offsets.tolist()], dtype=np.int64)
    found = []
    for index, (span, tag) in enumerate(zip(spans, tags, strict=True)):
        start, stop = np.searchsorted(leads, [span.start, span.stop], side="left").tolist()
        found.append(Sentence(index=index, tag=tag, text=trace.text[span.slice], chars=span, tokens=Span(start, stop)))
    return found


def sentence_of_each(sentences: Sequence[Sentence], n_tokens: int) -> NDArray[np.int64]:
    """The number of the sentence of each of a trace's first `n_tokens` tokens: the last that begins at or before it,
    −1 before all."""
    begins = [one.tokens.start for one in sentences]
    return np.asarray(np.searchsorted(begins, np.arange(n_tokens), side="right") - 1)


def _lead(text: str, start: int, stop: int) -> int:
    """The position of a token's first character that is not white space, else its start."""
    piece = text[start:stop]
    return start + len(piece) - len(piece.lstrip()) if piece.strip() else start


def _between_separators(pieces: Sequence[str], region: Span, *, in_pieces: bool = False) -> list[Span]:
    """The tokens after each separator in `region`, up to the next one or the end of the region.

    With `in_pieces` the second of two newlines that are tokens of their own is a separator, too.
    """
    separators = [
        i
        for i in range(region.start, region.stop)
        if _BLANK_LINE in pieces[i] or (in_pieces and _second_newline(pieces, i))
    ]
    stops = [*separators[1:], region.stop]
    return [
        Span(begin + 1, stop) for begin, stop in zip(separators, stops, strict=False)
    ]  # without separators, no steps


def _second_newline(pieces: Sequence[str], i: int) -> bool:
    return i > 0 and pieces[i] == pieces[i - 1] == "\n" and (i < 2 or pieces[i - 2] != "\n")


def _step(trace: Trace, index: int, tokens: Span, closed: int, variant: Variant) -> Step:
    start = int(trace.offsets[tokens.start - 1, 1])
    last = int(trace.offsets[tokens.stop, 0]) if tokens.stop < len(trace.offsets) else closed
    chars = Span(start, max(start, min(last, closed)))
    return _named(index, trace.text[chars.slice], chars, tokens, variant)


def _named(index: int, text: str, chars: Span, tokens: Span, variant: Variant) -> Step:
    kind = classify_step(text, variant=variant)
    return Step(index=index, kind=kind, text=text, chars=chars, tokens=tokens, separator=tokens.start - 1)


def _need_tokens(trace: Trace) -> None:
    if not len(trace.token_ids) and trace.text:
        raise InputError(f"trace {trace.id!r} has no tokens, and steps need tokens; import it with a tokenizer")
