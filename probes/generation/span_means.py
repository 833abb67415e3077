"""Reduces activations on the device that reads them: means over spans of tokens, or single tokens as spans of one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonscope.data.trace import Span


@dataclass(frozen=True, kw_only=True)
class SpanMeans:
    """Means over spans of tokens: (batch, token, …) becomes (span, …), with the spans of the first row first.

    `spans` are (start, stop) columns of the left-padded batch for each row, as plain numbers that can be sent to another machine. A mean
    is computed in float32 and returned in the dtype of the activations; a span of one token is that token, bit by bit.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, spans: Sequence[Sequence[Span]], padding: Sequence[int]) -> "SpanMeans":
        """From spans that count from the first token of each sequence, which comes after `padding` columns."""
        return cls(
            spans=tuple(
                tuple((span.start + n, span.stop + n) for span in row) for row, n in zip(spans, padding, strict=True)
            )
        )

    def __call__(self, activation: Tensor) -> Tensor:
        means = [
            activation[row, start:stop].float().mean(dim=0)
            for row, kept in enumerate(self.spans)
            for start, stop in kept
        ]
        if not means:
            return activation[:, 0][:0]
        return torch.stack(means).to(activation.dtype)
