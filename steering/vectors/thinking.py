"""How many tokens of thinking each sequence of a batch has written, read from its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.tags import chat_template
from reasonscope.steering.vectors.token_regions import ThinkTokenIds


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """The ids of the think tags, and how many tokens the chat template puts after the opening tag (mostly one newline)."""

    opens: int
    closes: int
    given: int = 0

    @classmethod
    def of(cls, model: Model) -> Self:
        """Those of a model. Raises InputError for a model without think tags, or with tags of several tokens."""
        marks = ThinkTokenIds.of(model)
        if len(marks.opens) != 1 or len(marks.closes) != 1:
            raise InputError(
                f"the think tags of {model.name} take {len(marks.opens)} and {len(marks.closes)} tokens; one each is needed here"
            )
        (opens,), (closes,) = marks.opens, marks.closes
        given = 0
        if chat_template(model.tokenizer) is not None:
            asked = Problem(id="template", messages=(Message(role="user", content="x"),))
            given = model.encode_prompt(asked, open_tag=True)[::-1].index(opens)
        return cls(opens=opens, closes=closes, given=given)

    def written(self, ids: Tensor) -> Tensor:
        """How many tokens of thinking each row of `ids` (batch, token) has written, -1 for a row that is not thinking: (batch,)."""
        columns = torch.arange(ids.shape[1], device=ids.device)
        opened = torch.where(ids == self.opens, columns, -1).amax(dim=1)
        closed = torch.where(ids == self.closes, columns, -1).amax(dim=1)
        written = (ids.shape[1] - 1 - opened - self.given).clamp(min=0)
        return torch.where(opened > closed, written, -1)


def single_tokens(
    model: Model, words: Sequence[str], *, spaced: bool = True, skip_longer: bool = False
) -> tuple[int, ...]:
    """The ids of `words` that are one token, with (`spaced`) and without a leading space; ascending.

    Raises InputError for a word that is one token in neither form, so that no logit is its own; with `skip_longer`, only if no word is.
    """
    found: set[int] = set()
    for word in words:
        forms = [model.tokenizer.encode(form, add_special_tokens=False) for form in (word, f" {word}")[: 1 + spaced]]
        ids = {form[0] for form in forms if len(form) == 1}
        if not ids and not skip_longer:
            raise InputError(
                f"{word!r} is more than one token for {model.name}; choose words that its vocabulary holds, or give token ids"
            )
        found |= ids
    if words and not found:
        raise InputError(
            f"{', '.join(map(repr, words))}: each is more than one token for {model.name}; choose other words"
        )
    return tuple(sorted(found))
