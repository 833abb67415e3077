"""How a tokenizer marks thinking and steps: the ids that a scope looks for in a sequence."""

from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.text.steps_and_sentences import separator_token_ids
from reasonscope.probes.models.model import Model

# What byte-level (Ċ, Ġ …) and sentencepiece (▁) vocabularies write for white space.
_WHITE = str.maketrans({"Ċ": " ", "Ġ": " ", "ĉ": " ", "č": " ", "▁": " "})


@dataclass(frozen=True, kw_only=True)
class ThinkTokenIds:
    """`opens` and `closes`: the ids of the think tags, in order. `separators`: tokens that hold a blank line (they open steps).
    `blanks`: tokens of white space alone. `tokenizer` reads the words of a step."""

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    separators: frozenset[int] = frozenset()
    blanks: frozenset[int] = frozenset()
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, model: Model) -> "ThinkTokenIds":
        """Raises InputError for a model without think tags, or whose tags may be merged with what stands beside them."""
        if model.tags is None:
            raise InputError(f"{model.name} has no think tags, so there is no thinking to edit")
        added = model.tokenizer.added_tokens_decoder.keys()
        tags = [model.tokenizer.encode(tag, add_special_tokens=False) for tag in (model.tags.open, model.tags.close)]
        if not all(tag[0] in added and tag[-1] in added for tag in tags):
            raise InputError(
                f"the think tags of {model.name} take {len(tags[0])} and {len(tags[1])} tokens that are no tokens of their own; "
                "a scope on the thinking needs tags that begin and end with added tokens, for instance of one token each"
            )
        vocabulary = model.tokenizer_backend.get_vocab(with_added_tokens=True)
        return cls(
            opens=tuple(tags[0]),
            closes=tuple(tags[1]),
            separators=frozenset(separator_token_ids(model.tokenizer_backend)),
            blanks=frozenset(id for token, id in vocabulary.items() if not token.translate(_WHITE).strip()),
            tokenizer=model.tokenizer_backend,
        )


@dataclass(frozen=True, kw_only=True)
class TokenRegions:
    """For each column of a batch (batch, token): whether it is in the thinking, in the close window, in the answer.

    A token is judged by what stands before it and itself, since that is all there is while a model writes: the close window is the
    closing tag with the white space behind it (a full stop that was merged with the newline before the tag is thinking still).
    """

    think: Tensor
    close_window: Tensor
    answer: Tensor

    @classmethod
    def find(cls, ids: Tensor, marks: ThinkTokenIds) -> "TokenRegions":
        opened = last_seen(_ends(ids, marks.opens))
        # The first token of the closing tag ends the thinking: no tag of several tokens begins with one that may be thought.
        ended, closed = last_seen(ids == marks.closes[0]), last_seen(_ends(ids, marks.closes))
        said = last_seen(~torch.isin(ids, _tensor(marks.blanks, ids)))
        columns = torch.arange(ids.shape[1], device=ids.device)
        behind = (opened >= 0) & (ended > opened)
        return cls(
            think=(opened > ended) & (opened != columns),
            close_window=behind & ((closed < ended) | (said <= closed)),
            answer=behind & (closed >= ended) & (said > closed),
        )


def last_seen(found: Tensor) -> Tensor:
    """For each column of `found` (batch, token) the last column up to it where it is true, or -1."""
    columns = torch.arange(found.shape[1], device=found.device).expand_as(found)
    return columns.masked_fill(~found, -1).cummax(dim=1).values


def _ends(ids: Tensor, tag: tuple[int, ...]) -> Tensor:
    """True where the last of the tokens `tag` stands behind the others."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for back, token in enumerate(reversed(tag)):
        found &= torch.nn.functional.pad(ids, (back, 0), value=-1)[:, : ids.shape[1]] == token
    return found


def _tensor(ids: frozenset[int], like: Tensor) -> Tensor:
    return torch.tensor(sorted(ids), dtype=torch.long, device=like.device)
