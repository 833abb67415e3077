"""Closing the thinking of some sequences of a batch, whatever the model would write."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.steering.vectors.thinking import WrittenThinking


class Closing:
    """Writes the tokens that close the thinking, from the step at which a sequence is to stop.

    Args:
        thinking: Finds the thinking.
        ids: What to write, the closing tag last; the tag alone by default.

    Raises:
        InputError: If the ids do not end with the closing tag.
    """

    def __init__(self, thinking: WrittenThinking, ids: Sequence[int] = ()) -> None:
        self.ids = tuple(ids) or thinking.closing
        if self.ids[-1] != thinking.closing[-1]:
            raise InputError("closing does not end with the closing tag; add its id as the last one")
        self._thinking = thinking
        self._closes: dict[int, int] = {}  # rows whose closing is being written, with the thinking tokens before it

    def __bool__(self) -> bool:
        """Whether the closing of any row is being written."""
        return bool(self._closes)

    def __contains__(self, row: int) -> bool:
        return row in self._closes

    def begin(self, row: int, written: int) -> None:
        """Close a row that has written so many tokens of thinking."""
        self._closes[row] = written

    def due(self, row: int, written: int) -> int | None:
        """The next token of the closing of a row that has written so many tokens of thinking; None if it is not being closed (any more)."""
        if row not in self._closes:
            return None
        if written < 1:
            del self._closes[row]
            return None
        return self.ids[min(written - self._closes[row], len(self.ids) - 1)]

    def write(self, scores: Tensor, rows: Sequence[int], ids: Tensor) -> Tensor:
        """`scores` (batch, vocab) that leave no choice but the next token of the closing, in the rows that are being closed."""
        written = self._thinking.written(ids).tolist()
        for place, row in enumerate(rows):
            if (token := self.due(row, written[place])) is not None:
                scores = forced(scores, place, token)
        return scores


def forced(scores: Tensor, row: int, token: int) -> Tensor:
    """`scores` (batch, vocab) that leave no choice but `token` in one row."""
    changed = scores.clone()
    changed[row] = -torch.inf
    changed[row, token] = 0.0
    return changed
