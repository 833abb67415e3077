"""The one way to cut a trace into sentences: as published, by the grammar of its problem set, or by our own splitter."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from reasonscope.data.grammars import grammar_of
from reasonscope.data.text.published_chunks import published_sentences
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Sentence, Trace


@dataclass(frozen=True, kw_only=True)
class CutTrace:
    """A trace cut into sentences.

    Attributes:
        trace: The trace.
        sentences: Its sentences.
        steps: The step (paragraph) of each sentence.
        labels: Who made the cut: "published", "the grammar's" or "our".
        depends_on: Of each sentence, the sentences it truly depends on, if a grammar tells; else None.

    Example:
        cut = rs.data.cut_trace(trace)
        cut.labels  # "our"
        [sentence.text for sentence in cut.sentences]
    """

    trace: Trace
    sentences: tuple[Sentence, ...]
    steps: tuple[int, ...]
    labels: str
    depends_on: tuple[tuple[int, ...], ...] | None = None

    @cached_property
    def cut_hash(self) -> str:
        """The `cut_hash` of the sentences."""
        return cut_hash(self.sentences)


def cut_trace(trace: Trace) -> CutTrace:
    """Cut a trace into its published sentences, if it has any, else those of its problem set's grammar, else our own.

    Args:
        trace: A trace of a store or an import.

    Returns:
        The trace with its sentences and the step of each.

    Example:
        cut = rs.data.cut_trace(trace)
        len(cut.sentences)
        cut.sentences[0].tokens
    """
    depends_on = None
    if cut := published_sentences(trace):
        labels = "published"
    elif grammar := grammar_of(trace.problem):
        cut, depends_on = grammar.true_sentences(trace)
        labels = "the grammar's"
    else:
        cut, labels = sentences(trace), "our"
    step, steps = 0, []
    for before, after in zip([None, *cut], cut, strict=False):
        if before is not None and "\n\n" in trace.text[before.chars.stop : after.chars.start]:
            step += 1
        steps.append(step)
    return CutTrace(
        trace=trace,
        sentences=tuple(cut),
        steps=tuple(steps),
        labels=labels,
        depends_on=None if depends_on is None else tuple(depends_on),
    )


def cut_hash(sentences: Sequence[Sentence]) -> str:
    """Identifies a cut of a trace: 16 hexadecimal digits of the SHA-256 of the character spans of its sentences."""
    spans = ",".join(f"{one.chars.start}-{one.chars.stop}" for one in sentences)
    return sha256(spans.encode()).hexdigest()[:16]


def cut_provenance(sentences: Sequence[Sentence]) -> dict[str, str]:
    """The entry `cut` of a result's provenance, which says over which sentences it was measured; empty without
    sentences."""
    return {"cut": cut_hash(sentences)} if sentences else {}


def sentence_at(cut_trace: CutTrace, token: int) -> int:
    """The sentence that holds the token, or the last one before it."""
    return max((one.index for one in cut_trace.sentences if one.tokens.start <= token), default=0)


def trace_sentences(trace: Trace) -> list[Sentence]:
    """The sentences of a trace as the app shows them: the published ones, the grammar's if its truth is known, else ours."""
    return list(cut_trace(trace).sentences)
