"""What is kept of activations where they are read: means over stretches of tokens, and so single tokens too."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonscope.data.trace import Span


@dataclass(frozen=True, kw_only=True)
class SpanMeans:
    """Means over `spans` of tokens, those of each row of a batch: (batch, token, …) becomes (span of any row, …), row by row.

    `spans` are (start, stop) columns of the left-padded batch, plain numbers that can be sent along. A mean is taken in float32 and
    given in the dtype that was read; a span of one token is that token, bit by bit.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, spans: Sequence[Sequence[Span]], padding: Sequence[int]) -> "SpanMeans":
        """Of spans counted from each sequence's first token, behind `padding` columns."""
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
