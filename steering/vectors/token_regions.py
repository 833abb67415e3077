"""The tokens that mark thinking and steps, and the regions of a sequence that they enclose.

Tags that are tokens of their own are found by their ids. Tags that are ordinary text, which may merge with adjacent text, and the sentence
that ends reasoning in the open are found in the text of the tokens so far.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.text.align import decode_with_offsets
from reasonscope.data.text.final_answer import CUE, compiled
from reasonscope.data.text.steps_and_sentences import newline_token_ids, separator_token_ids
from reasonscope.data.text.think_tags import opener_in_prompt
from reasonscope.data.text.thinking import Thinking

if TYPE_CHECKING:
    from reasonscope.probes.models.prompting import Prompting

# What byte-level (Ċ, Ġ …) and sentencepiece (▁) vocabularies write for white space.
_WHITE = str.maketrans({"Ċ": " ", "Ġ": " ", "ĉ": " ", "č": " ", "▁": " "})


@dataclass(frozen=True, kw_only=True)
class ThinkTokenIds:
    """The ids that a scope looks for.

    Attributes:
        opens: The opening think tag, one or several tokens; empty if the text tells.
        closes: The closing think tag; empty if the text tells.
        separators: Tokens that hold a blank line; they open steps.
        newlines: Tokens that are one newline; the second of two in a row opens a step, too.
        blanks: Tokens of white space alone.
        tokenizer: Decodes the words of a step.
        by_text: How the thinking is found in the text of the tokens, if not by ids.
    """

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    separators: frozenset[int] = frozenset()
    newlines: frozenset[int] = frozenset()
    blanks: frozenset[int] = frozenset()
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)
    by_text: Thinking | None = None

    @classmethod
    def of(cls, model: "Prompting") -> "ThinkTokenIds":
        """Those of a model. Raises InputError for a model whose thinking is not looked for."""
        if model.thinking.mode == "none":
            raise InputError(
                f"{model.name} is read without thinking (--thinking none); use a scope of positions or tokens, or record with "
                "--thinking completion"
            )
        added = model.tokenizer.added_tokens_decoder.keys()
        named = (model.tags.open, model.tags.close) if model.tags else ()
        tags = [tuple(model.tokenizer.encode(tag, add_special_tokens=False)) for tag in named]
        by_ids = bool(tags) and all(tag[0] in added and tag[-1] in added for tag in tags)
        vocabulary = model.tokenizer_backend.get_vocab(with_added_tokens=True)
        return cls(
            opens=tags[0] if by_ids else (),
            closes=tags[1] if by_ids else (),
            separators=frozenset(separator_token_ids(model.tokenizer_backend)),
            newlines=frozenset(newline_token_ids(model.tokenizer_backend)),
            blanks=frozenset(id for token, id in vocabulary.items() if not token.translate(_WHITE).strip()),
            tokenizer=model.tokenizer_backend,
            by_text=None if by_ids else model.thinking,
        )


@dataclass(frozen=True, kw_only=True)
class TokenRegions:
    """For each column of a batch (batch, token): whether it is in the thinking, in the close window, in the answer.

    A token is judged by itself and the tokens before it, since nothing else is known while a model writes. The close window is the closing
    tag with the white space after it; a full stop that merged with the newline before the tag still belongs to the thinking.

    Reasoning in the open is thinking up to the token that completes a statement of the answer, such as "the answer is", "####" with a
    digit, or a box; that token is the close window. `opened` is the column before the first of the thinking, -1 without thinking so far.
    """

    think: Tensor
    close_window: Tensor
    answer: Tensor
    opened: Tensor

    @classmethod
    def find(cls, ids: Tensor, marks: ThinkTokenIds, n_prompt: Tensor | None = None) -> "TokenRegions":
        """The regions of `ids` (batch, token), -1 on padding; `n_prompt` (batch,) of them are the prompt, all by default."""
        if marks.by_text is not None:
            return cls._by_text(ids, marks, n_prompt)
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
            opened=opened,
        )

    @classmethod
    def _by_text(cls, ids: Tensor, marks: ThinkTokenIds, n_prompt: Tensor | None) -> "TokenRegions":
        real = ids >= 0
        given = real.sum(dim=1) if n_prompt is None else n_prompt
        parts = {name: torch.zeros_like(real, device="cpu") for name in ("think", "close_window", "answer")}
        opened = torch.full_like(ids, -1, device="cpu")
        for row, (tokens, n) in enumerate(zip(ids.cpu(), given.tolist(), strict=True)):
            columns = (tokens >= 0).nonzero()[:, 0]
            states = written_states(tokens[columns].tolist(), int(n), marks)
            for name, state in (("think", "think"), ("close_window", "close"), ("answer", "answer")):
                parts[name][row, columns] = torch.tensor([one == state for one, _ in states], dtype=torch.bool)
            before = [int(columns[at]) if at >= 0 else -1 for _, at in states]
            opened[row, columns] = torch.tensor(before, dtype=opened.dtype)
        return cls(**{name: part.to(ids.device) for name, part in parts.items()}, opened=opened.to(ids.device))


def written_states(ids: Sequence[int], n_prompt: int, marks: ThinkTokenIds) -> list[tuple[str, int]]:
    """For each token of one sequence what it is part of ("", "think", "close" or "answer"), and the token before its thinking or -1.

    A token is judged by the text up to its own end.
    """
    assert marks.tokenizer is not None
    assert marks.by_text is not None
    text, offsets = decode_with_offsets(list(ids), marks.tokenizer)
    ends, starts = offsets[:, 1].tolist(), offsets[:, 0].tolist()
    begin = starts[n_prompt] if n_prompt < len(ids) else len(text)
    if marks.by_text.mode == "completion":
        events = [(n_prompt - 1, True), *_stated(text, begin, ends, marks.by_text)]
    else:
        events = _tagged(text, begin, ends, marks.by_text)
    return _states(text, starts, ends, events)


def _stated(text: str, begin: int, ends: Sequence[int], thinking: Thinking) -> list[tuple[int, bool]]:
    """The token that completes the first statement of an answer."""
    pattern = compiled(thinking.answer_pattern) if thinking.answer_pattern else CUE
    match = pattern.search(text, begin)
    return [(bisect_left(ends, match.end()), False)] if match else []


def _tagged(text: str, begin: int, ends: Sequence[int], thinking: Thinking) -> list[tuple[int, bool]]:
    """The tokens that complete opening (True) and closing tags, without those after a quotation mark."""
    assert thinking.tags is not None
    given = opener_in_prompt(text, begin, thinking.tags)
    start = begin if given is None else given.start
    found = []
    for tag, opens in ((thinking.tags.open, True), (thinking.tags.close, False)):
        at = text.find(tag, start)
        while at >= 0:
            if text[at - 1 : at] not in ("`", '"', "'", "“"):
                found.append((bisect_left(ends, at + len(tag)), opens))
            at = text.find(tag, at + len(tag))
    return sorted(found)


def _states(
    text: str, starts: Sequence[int], ends: Sequence[int], events: Sequence[tuple[int, bool]]
) -> list[tuple[str, int]]:
    """The state of each token, by the tokens at which thinking opens (True) and closes."""
    at = dict(events)
    state, opened = "open" if at.get(-1) else "", -1
    found = []
    for token in range(len(ends)):
        if token in at:
            state, opened = ("close", opened) if not at[token] and state == "think" else (state, opened)
            if at[token]:
                state, opened = "open", token
        elif state == "open":
            state = "think"
        elif state == "close" and text[starts[token] : ends[token]].strip():
            state = "answer"
        found.append((state if state != "open" else "", opened))
    return found


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
