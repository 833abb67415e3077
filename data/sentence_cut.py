"""The one way a trace is cut into sentences: the published cut, the one of the organism's grammar, or our own."""

from dataclasses import dataclass

from reasonscope.data.exchange.importers import published_sentences
from reasonscope.data.organism.truth import true_sentences
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Sentence, Trace


@dataclass(frozen=True, kw_only=True)
class CutTrace:
    """A trace as it is cut_trace: its sentences, and the step (a paragraph) that each belongs to.

    `labels` says whose the sentences are: published, of the grammar (whose truth `depends_on` is, by sentence), or ours.
    """

    trace: Trace
    sentences: tuple[Sentence, ...]
    steps: tuple[int, ...]
    labels: str
    depends_on: tuple[tuple[int, ...], ...] | None = None


def cut_trace(trace: Trace) -> CutTrace:
    """A trace cut into its published sentences, those of the organism's grammar, or our own."""
    depends_on = None
    if cut := published_sentences(trace):
        labels = "published"
    elif "ledger" in trace.problem.meta:
        cut, depends_on = true_sentences(trace)
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


def sentence_at(cut_trace: CutTrace, token: int) -> int:
    """The sentence that holds the token, or the last one before it."""
    return max((one.index for one in cut_trace.sentences if one.tokens.start <= token), default=0)
