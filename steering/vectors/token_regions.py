"""The tokens that mark thinking and steps, and the regions of a sequence that they enclose."""

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
    """The ids that a scope looks for.

    Attributes:
        opens: The opening think tag, one or several tokens.
        closes: The closing think tag.
        separators: Tokens that hold a blank line; they open steps.
        blanks: Tokens of white space alone.
        tokenizer: Decodes the words of a step.
    """

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    separators: frozenset[int] = frozenset()
    blanks: frozenset[int] = frozenset()
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, model: Model) -> "ThinkTokenIds":
        """Those of a model. Raises InputError for a model without think tags, or with tags that may merge with adjacent text."""
        if model.tags is None:
            raise InputError(
                f"{model.name} has no think tags, so its thinking cannot be found; use a scope of positions or tokens"
            )
        added = model.tokenizer.added_tokens_decoder.keys()
        tags = [model.tokenizer.encode(tag, add_special_tokens=False) for tag in (model.tags.open, model.tags.close)]
        if not all(tag[0] in added and tag[-1] in added for tag in tags):
            raise InputError(
                f"the think tags of {model.name} are {len(tags[0])} and {len(tags[1])} ordinary tokens that may merge with adjacent text; "
                "a scope on the thinking needs tags that begin and end with added tokens, for instance one token each"
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

    A token is judged by itself and the tokens before it, since nothing else is known while a model writes. The close window is the closing
    tag with the white space after it; a full stop that merged with the newline before the tag still belongs to the thinking.
    """

    think: Tensor
    close_window: Tensor
    answer: Tensor

    @classmethod
    def find(cls, ids: Tensor, marks: ThinkTokenIds) -> "TokenRegions":
        """The regions of `ids` (batch, token)."""
        opened = last_seen(_ends(ids, marks.opens))
        # The first token of the closing tag ends the thinking: it is an added token, which is never part of a thought.
        ended, closed = last_seen(ids == marks.closes[0]), last_seen(_ends(ids, marks.closes))
        said = last_seen(~torch.isin(ids, _tensor(marks.blanks, ids)))
        columns = torch.arange(ids.shape[1], device=ids.device)
        after = (opened >= 0) & (ended > opened)
        return cls(
            think=(opened > ended) & (opened != columns),
            close_window=after & ((closed < ended) | (said <= closed)),
            answer=after & (closed >= ended) & (said > closed),
        )


def last_seen(found: Tensor) -> Tensor:
    """For each column of `found` (batch, token), the last true column up to it, or -1."""
    columns = torch.arange(found.shape[1], device=found.device).expand_as(found)
    return columns.masked_fill(~found, -1).cummax(dim=1).values


def _ends(ids: Tensor, tag: tuple[int, ...]) -> Tensor:
    """True on the last token of each occurrence of `tag`."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for back, token in enumerate(reversed(tag)):
        found &= torch.nn.functional.pad(ids, (back, 0), value=-1)[:, : ids.shape[1]] == token
    return found


def _tensor(ids: frozenset[int], like: Tensor) -> Tensor:
    return torch.tensor(sorted(ids), dtype=torch.long, device=like.device)
