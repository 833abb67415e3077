"""Attention between sentences: the mean over the tokens of both, by layer and head, gathered block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from reasonscope.analysis.attention.blocks import AttentionBlock, read_attention
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.trace import Sentence, Span, Trace
from reasonscope.probes.models.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceAttention:
    """Attention between the sentences of one sequence.

    `matrix` (layer, head, sentence, sentence): mean attention of the tokens of the row's sentence on those of the
    column's; the causal zeros inside a sentence count. NaN for a sentence without tokens. `sink` (layer, head): mean
    share that token 0 takes from all rows.
    """

    spans: tuple[Span, ...]
    matrix: Values
    sink: Values
    n_tokens: int


class SentenceMeans:
    """A reader for `read_attention` that keeps only the means between `spans` of tokens: R · A · E without A.

    The rows of a block are summed by sentence first, so that only as many rows as the block has sentences are
    multiplied by E.
    """

    def __init__(self, spans: Sequence[Span], n_tokens: int, n_layers: int, n_heads: int) -> None:
        check_spans(spans, n_tokens)
        self._spans = tuple(spans)
        self._n_tokens = n_tokens
        self._columns = torch.zeros(n_tokens, len(spans) + 1)  # the last column: token 0, the usual sink
        for index, span in enumerate(spans):
            self._columns[span.slice, index] = 1.0
        self._columns[0, -1] = 1.0
        self._sums = torch.zeros(n_layers, n_heads, len(spans), len(spans) + 1, dtype=torch.float64)
        self._sink = torch.zeros(n_layers, n_heads, dtype=torch.float64)

    def __call__(self, block: AttentionBlock) -> None:
        probabilities = block.probabilities
        columns = self._columns[block.keys.slice].to(probabilities)
        members = self._columns[block.rows.slice, :-1]
        n_edited = members.any(dim=0).nonzero()[:, 0]
        own = members[:, n_edited].T.to(probabilities) @ probabilities  # (head, sentence, key)
        self._sums[block.layer][:, n_edited] += (own @ columns).cpu()
        if block.keys.start == 0:
            self._sink[block.layer] += probabilities[..., 0].sum(dim=-1).cpu()

    def result(self) -> SentenceAttention:
        """The means over all rows."""
        lengths = torch.tensor([len(span) for span in self._spans], dtype=torch.float64)
        means = self._sums[..., :-1] / lengths[:, None] / lengths  # a sentence without tokens: 0 / 0 is NaN
        return SentenceAttention(
            spans=self._spans,
            matrix=means.numpy(),
            sink=(self._sink / self._n_tokens).numpy(),
            n_tokens=self._n_tokens,
        )


def sentence_attention(model: Model, ids: Sequence[int], spans: Sequence[Span]) -> SentenceAttention:
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


def check_spans(spans: Sequence[Span], n_tokens: int) -> None:
    """Raise InputError unless there are spans, inside the tokens, ascending and without overlaps."""
    if not spans:
        raise InputError("no sentences; give at least one span of tokens")
    ends = [0, *(span.stop for span in spans)]
    if any(span.start < end for span, end in zip(spans, ends, strict=False)) or ends[-1] > n_tokens:
        raise InputError(
            f"spans of {len(spans)} sentences over {n_tokens} tokens overlap, do not ascend or end outside; split the trace again"
        )


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
