"""The places at which thinking may stop: after a blank line, or after a sentence, known from the tokens written so far alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.steering.vectors.thinking import WrittenThinking

if TYPE_CHECKING:
    from reasonscope.probes.models.prompting import Prompting

PlaceKind = Literal["paragraph", "sentence"]
KINDS: tuple[PlaceKind, ...] = ("paragraph", "sentence")
MASKS = ("ends", "newline", "stop", "digit", "blank")  # what is known of each token of a vocabulary
# A sentence ends with its mark; a full stop after a digit may be a decimal point, also if the digit is the token before.
_ENDS_SENTENCE = re.compile(r"(?:^|[^\d])[.!?][\"')\]]*\s*$|\n\s*$")


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Finds the places of a model's thinking.

    A place lies after the token that completes a blank line, or a sentence. Nothing after that token is looked at, so a model that is
    still writing and its finished text have the same places.

    Attributes:
        thinking: Finds the thinking.
        ends: Whether each token of the vocabulary ends a thought, (vocab,).
        newline: Whether each token is one newline, of which two in a row end a paragraph, (vocab,).
        stop: Whether each token is a bare full stop, which ends no sentence directly after a digit, (vocab,); none for paragraphs.
        digit: Whether each token ends in a digit, (vocab,); none for paragraphs.
        blank: Whether each token begins with white space: then a full stop after a digit ended a sentence, (vocab,); none for
            paragraphs.
        every: The fewest tokens of thinking between two places, and before the first.
        kind: "paragraph" or "sentence".
    """

    thinking: WrittenThinking
    ends: Tensor
    newline: Tensor
    stop: Tensor
    digit: Tensor
    blank: Tensor
    every: int
    kind: PlaceKind

    @classmethod
    def of(cls, model: "Prompting", *, kind: PlaceKind = "paragraph", every: int = 4) -> "Places":
        """Those of a model. Raises InputError for an unknown kind, or a tokenizer in which no token ends a thought."""
        if kind not in KINDS or every < 1:
            raise InputError(
                f"places after each {kind}, {every} tokens apart: give paragraph or sentence, and 1 or more"
            )
        pieces = model.tokenizer_backend.decode_batch([[i] for i in range(model.vocabulary)], skip_special_tokens=False)
        sentence = kind == "sentence"
        masks = {
            "ends": torch.tensor([_ends(piece, kind) for piece in pieces]),
            "newline": torch.tensor([piece == "\n" for piece in pieces]),
            "stop": torch.tensor([sentence and piece == "." for piece in pieces]),
            "digit": torch.tensor([sentence and piece[-1:].isdecimal() for piece in pieces]),
            "blank": torch.tensor([sentence and piece[:1].isspace() for piece in pieces]),
        }
        if not (masks["ends"].any() or masks["newline"].any()):
            raise InputError(f"the tokenizer of {model.name} has no token that ends a {kind}")
        return cls(thinking=WrittenThinking.of(model), every=every, kind=kind, **masks)

    def ended(self, ids: Tensor) -> Tensor:
        """Whether the last token of each row of `ids` (batch, token) ends a thought, (batch,)."""
        masks: list[Tensor] = [getattr(self, name).to(ids.device) for name in MASKS]
        ends, newline, stop, digit, blank = masks
        last, before, first = (ids[:, -min(back, ids.shape[1])] for back in (1, 2, 3))
        thought = ends[last] & ~(stop[last] & digit[before])
        after_number = blank[last] & stop[before] & digit[first]
        return thought | after_number | (newline[last] & newline[before])

    def written(self, row: Sequence[int] | Tensor) -> int:
        """The tokens of thinking that one sequence has written; −1 if it is not thinking."""
        ids = torch.as_tensor(row)[None]
        return int(self.thinking.written(ids)[0])

    def of_trace(self, trace: Trace) -> tuple[list[int], list[int]]:
        """The places of a trace as numbers of tokens before them, and the tokens of thinking that were written by then."""
        ids = torch.from_numpy(trace.token_ids)
        recent = torch.cat([ids[:1], ids]).unfold(0, 3, 1)
        cuts: list[int] = []
        spent: list[int] = []
        for at in self.ended(recent).nonzero()[:, 0].tolist():
            cut = at + 2
            if cut <= trace.n_prompt_tokens or cut >= len(ids):
                continue
            written = self.written(ids[:cut])
            if written >= self.every + (spent[-1] if spent else 0):
                cuts.append(cut)
                spent.append(written)
        return cuts, spent


def _ends(piece: str, kind: PlaceKind) -> bool:
    return "\n\n" in piece if kind == "paragraph" else bool(_ENDS_SENTENCE.search(piece)) and bool(piece.strip())
