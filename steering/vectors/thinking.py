"""How many tokens of thinking each sequence of a batch has written, read from its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.models.tags import chat_template
from reasonscope.steering.vectors.token_regions import ThinkTokenIds, written_states

if TYPE_CHECKING:
    from reasonscope.probes.models.prompting import Prompting

_QUESTION = "xyzzy"
_ASKED = Problem(id="template", messages=(Message(role="user", content=_QUESTION),))


# Ends reasoning in the open for methods that close the thinking; the colon completes the statement of an answer.
FINAL_ANSWER = "\n\nFinal answer:"


@dataclass(frozen=True, kw_only=True)
class WrittenThinking:
    """Counts the tokens of thinking that a model has written.

    Tags that are one token each are found by their ids. Otherwise the text since the start of the answer's turn is read, which the template
    begins with `header`.

    Attributes:
        opens: The id of the opening tag, or None if the text tells.
        closes: The id of the closing tag, or None if the text tells.
        given: How many tokens the chat template puts after the opening tag (mostly one newline).
        closing: The ids that end the thinking; the closing tag by default.
        header: The ids with which the chat template begins an answer, if the text tells.
        marks: What finds the thinking in the text.
    """

    opens: int | None
    closes: int | None
    given: int = 0
    closing: tuple[int, ...] = ()
    header: tuple[int, ...] = ()
    marks: ThinkTokenIds | None = None

    def __post_init__(self) -> None:
        if not self.closing and self.closes is not None:
            object.__setattr__(self, "closing", (self.closes,))

    @classmethod
    def of(cls, model: "Prompting") -> Self:
        """Those of a model. Raises InputError for a model whose thinking is not looked for, or without a template to show its turns."""
        marks = ThinkTokenIds.of(model)
        if len(marks.opens) == len(marks.closes) == 1:
            return cls(
                opens=marks.opens[0], closes=marks.closes[0], given=_given(model, marks.opens[0]), closing=marks.closes
            )
        end = FINAL_ANSWER if model.tags is None else f"\n{model.tags.close}"
        by_text = replace(marks, by_text=model.thinking, opens=(), closes=())
        closing = tuple(model.tokenizer.encode(end, add_special_tokens=False))
        return cls(opens=None, closes=None, closing=closing, header=_header(model), marks=by_text)

    def closing_token(self, what: str) -> int:
        """The id of the closing tag. Raises InputError if the thinking has none, for `what` changes its logit."""
        if self.closes is None:
            raise InputError(
                f"{what} changes the logit of the closing tag, and the thinking of this model has none of one token; use ForcedClose"
            )
        return self.closes

    def written(self, ids: Tensor) -> Tensor:
        """How many tokens of thinking each row of `ids` (batch, token) has written, -1 for a row that is not thinking: (batch,)."""
        if self.marks is not None:
            return torch.tensor([self._in_text(row) for row in ids.tolist()], device=ids.device)
        assert self.opens is not None
        assert self.closes is not None
        columns = torch.arange(ids.shape[1], device=ids.device)
        opened = torch.where(ids == self.opens, columns, -1).amax(dim=1)
        closed = torch.where(ids == self.closes, columns, -1).amax(dim=1)
        written = (ids.shape[1] - 1 - opened - self.given).clamp(min=0)
        return torch.where(opened > closed, written, -1)

    def _in_text(self, row: Sequence[int]) -> int:
        """The thinking tokens of one row, -1 if it is not thinking now."""
        assert self.marks is not None
        start = _after_last(row, self.header)
        if start is None:
            return -1
        begun = list(row[start:])
        if self.marks.by_text is not None and self.marks.by_text.mode == "completion":
            return len(begun) if not begun or written_states(begun, 0, self.marks)[-1][0] == "think" else -1
        states = [state for state, _ in written_states(begun, 0, self.marks)]
        opened = bool(begun) and self.marks.tokenizer is not None and states[-1] == "" and _ends_open(begun, self.marks)
        return states.count("think") if states[-1:] == ["think"] or opened else -1


def _ends_open(begun: Sequence[int], marks: ThinkTokenIds) -> bool:
    """Whether the text so far ends with the opening tag."""
    assert marks.tokenizer is not None
    assert marks.by_text is not None
    assert marks.by_text.tags is not None
    return (
        str(marks.tokenizer.decode(list(begun), skip_special_tokens=False)).rstrip().endswith(marks.by_text.tags.open)
    )


def _given(model: "Prompting", opens: int) -> int:
    """The tokens that the template puts after the opening tag."""
    if chat_template(model.tokenizer) is None:
        return 0
    return model.encode_prompt(_ASKED, think=True, open_tag=True)[::-1].index(opens)


def _header(model: "Prompting") -> tuple[int, ...]:
    """The ids that follow a question in the prompt. Raises InputError without a chat template."""
    if chat_template(model.tokenizer) is None:
        raise InputError(
            f"{model.name} has no chat template, so where the prompt ends is not known; use an instruction-tuned model"
        )
    text = str(
        model.tokenizer.decode(model.encode_prompt(_ASKED, think=True, open_tag=False), skip_special_tokens=False)
    )
    begins = text.rpartition(_QUESTION)[2]
    if model.tags is not None:  # a tag that the template opens is the model's thinking already
        begins = begins.partition(model.tags.open)[0]
    return tuple(model.tokenizer.encode(begins, add_special_tokens=False))


def _after_last(row: Sequence[int], header: Sequence[int]) -> int | None:
    """The position after the last occurrence of `header` in a row, or None."""
    n = len(header)
    found = (at + n for at in range(len(row) - n, -1, -1) if tuple(row[at : at + n]) == tuple(header))
    return next(found, None)


def single_tokens(
    model: "Prompting", words: Sequence[str], *, spaced: bool = True, skip_longer: bool = False
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
