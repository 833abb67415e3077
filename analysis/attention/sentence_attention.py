"""Attention between sentences: the mean over the tokens of both, by layer and head, gathered block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.rows.functionals import SentenceAttention, SentenceMeans, check_spans
from reasonscope.analysis.attention.rows.served import ServedModel
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.trace import Sentence, Span, Trace
from reasonscope.probes.models.model import Model


def sentence_attention(model: Model | ServedModel, ids: Sequence[int], spans: Sequence[Span]) -> SentenceAttention:
    """Attention between `spans` of the tokens `ids` in every layer and head, in one pass (Thought Anchors, arXiv
    2506.19143, section 4).

    Departures from its code: a sentence that ends the text keeps its last token, and one without tokens is NaN, not 0.
    Raises InputError for spans outside the tokens, and whatever `read_attention` raises.
    """
    means = SentenceMeans(spans, len(ids), model.n_layers, model.n_heads)
    read_attention(model, ids, means)
    return means.result()


def uniform_attention(spans: Sequence[Span], n_tokens: int) -> Values:
    """The matrix (sentence, sentence) of a head that attends equally to all tokens up to its own, in closed form.

    Token t gives each of its t + 1 keys 1 / (t + 1). What such a head shows is due to the positions of sentences, not
    to their content.
    """
    check_spans(spans, n_tokens)
    share = 1.0 / np.arange(1, n_tokens + 1)
    starts, lengths = np.array([[span.start, len(span)] for span in spans]).T
    matrix = np.full((len(spans), len(spans)), np.nan)
    for i, target in enumerate(spans):
        rows = np.arange(target.start, target.stop)
        if len(rows):
            visible = np.clip(rows[:, None] + 1 - starts, 0, lengths)
            matrix[i] = np.where(lengths, share[rows] @ visible / len(rows) / np.maximum(lengths, 1), np.nan)
    return matrix


@dataclass(frozen=True, kw_only=True)
class ReadSentences:
    """The sentences of a trace, and those of them that have tokens. If two sentences share their only token, it belongs
    to the first.

    Attributes:
        sentences: All sentences of the cut.
        places: The indices of those with tokens, whose attention can be read.
        spans: Their tokens.
    """

    sentences: tuple[Sentence, ...]
    places: tuple[int, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, trace: Trace, sentences: Sequence[Sentence] | None = None) -> "ReadSentences":
        """The given sentences, by default those of `cut_trace`. Raises InputError for a trace without tokens."""
        if not len(trace.token_ids):
            raise InputError(
                f"trace {trace.id!r} has no tokens; import it with a tokenizer to read a model's attention over it"
            )
        found = tuple(cut_trace(trace).sentences if sentences is None else sentences)
        places = tuple(i for i, sentence in enumerate(found) if len(sentence.tokens))
        return cls(sentences=found, places=places, spans=tuple(found[i].tokens for i in places))

    def spread(self, values: Values, axes: Literal[1, 2] = 1) -> Values:
        """`values` over the sentences with tokens, in the last one or two axes, expanded to all sentences with NaN
        for the others."""
        if len(self.places) == len(self.sentences):
            return values
        found = np.full((*values.shape[: values.ndim - axes], *[len(self.sentences)] * axes), np.nan)
        inside = np.array(self.places)
        found[(..., inside) if axes == 1 else (..., inside[:, None], inside)] = values
        return found
