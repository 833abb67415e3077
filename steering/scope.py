"""Which tokens an edit touches: by where they stand (thinking, answer, anywhere) and by what they are."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.segment import separator_token_ids
from reasonscope.probes.model import Model


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The tokens of a sequence that are edited: those in region `on` whose id is among `tokens` (None: any id).

    A token lies in the thinking from the one behind the opening tag to the one before the closing tag, whether given or generated:
    the tags' ids are `opens` and `closes`.
    """

    on: Literal["all", "think"] = "all"
    tokens: frozenset[int] | None = None
    opens: int | None = None
    closes: int | None = None

    def __post_init__(self) -> None:
        if self.on == "think" and (self.opens is None or self.closes is None):
            raise InputError("a scope on the thinking needs the ids of the tags; make it with Scope.thinking(model)")

    @classmethod
    def thinking(cls, model: Model, *, at_separators: bool = False) -> "Scope":
        """Every token of the thinking, or those that hold a blank line (where SEAL reads and writes).

        Raises InputError for a model without think tags, or whose tags are not single tokens.
        """
        if model.tags is None:
            raise InputError(f"{model.name} has no think tags, so there is no thinking to edit")
        ids = [model.tokenizer.encode(tag, add_special_tokens=False) for tag in (model.tags.open, model.tags.close)]
        if any(len(tag) != 1 for tag in ids):
            raise InputError(
                f"the think tags of {model.name} take {len(ids[0])} and {len(ids[1])} tokens; "
                "a scope on the thinking needs tags of one token each"
            )
        tokens = frozenset(separator_token_ids(model.tokenizer_backend)) if at_separators else None
        return cls(on="think", tokens=tokens, opens=ids[0][0], closes=ids[1][0])

    def mask(self, ids: Tensor) -> Tensor:
        """True on the tokens of `ids` (batch, token; whole sequences so far, -1 on padding) that are edited."""
        chosen = ids >= 0
        if self.tokens is not None:
            chosen = chosen & torch.isin(ids, torch.tensor(sorted(self.tokens), device=ids.device))
        if self.on == "think":
            assert self.opens is not None and self.closes is not None
            opened, closed = _last_seen(ids, self.opens), _last_seen(ids, self.closes)
            chosen = chosen & (opened > closed) & (ids != self.opens)
        return chosen


def _last_seen(ids: Tensor, token: int) -> Tensor:
    """For each column of `ids` (batch, token) the last column up to it that holds `token`, or -1."""
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    elsewhere: Tensor = ids != token
    return columns.masked_fill(elsewhere, -1).cummax(dim=1).values
