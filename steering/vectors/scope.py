"""Which tokens an edit changes: by where they stand, by what they are, by what part of the trace they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.text.steps_and_sentences import classify_step
from reasonscope.data.trace import StepKind
from reasonscope.data.variants import Variant
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.token_regions import ThinkTokenIds, TokenRegions, last_seen

Window: TypeAlias = tuple[int, int | None]
Region = Literal["all", "think", "close_window", "answer"]
Steps: TypeAlias = Literal["separators"] | StepKind

_KINDS = get_args(StepKind)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The tokens of a sequence that are edited; with no field given, all of them.

    The words are EasySteer's. What the fields of the first group name is united, what `exclude_…` names is taken away from it; a token
    then has to lie in region `on`, at `steps`, and to be among `tokens`, where these are given.

    | field | names |
    |---|---|
    | `prompt_positions`, `prompt_window` | tokens of the prompt, counted from 0 without padding; negative ones from its end |
    | `prompt_tokens` | ids, where they stand in the prompt |
    | `generation_positions`, `generation_window` | generated tokens, the first of which is 0; no negative ones, the end is not known |
    | `generation_tokens` | ids, where they were generated |
    | `exclude_…` | the same, never edited |
    | `on` | `think`, `close_window` or `answer`, as in `TokenRegions` |
    | `steps` | `separators`: the tokens of the thinking that hold a blank line; a kind: the tokens of steps of that kind |
    | `tokens` | ids, anywhere |

    A window is half-open, (start, stop), `None` for no end. What is edited is the state of the token itself: position 0 of the
    generation is fed to predict the second generated token, so the state that predicts the first is the last of the prompt. The kind of
    a step is judged by its words so far, the token's own included: before its keyword has come, a step is execution. The same tokens are
    touched while generating, and in one pass over the finished text where the number of prompt tokens is said.

    Departure from EasySteer: a position behind the end of the prompt names nothing, rather than the last token.
    """

    on: Region = "all"
    steps: Steps | None = None
    tokens: frozenset[int] | None = None
    prompt_positions: tuple[int, ...] = ()
    prompt_window: Window | None = None
    prompt_tokens: frozenset[int] = frozenset()
    generation_positions: tuple[int, ...] = ()
    generation_window: Window | None = None
    generation_tokens: frozenset[int] = frozenset()
    exclude_prompt_positions: tuple[int, ...] = ()
    exclude_prompt_window: Window | None = None
    exclude_prompt_tokens: frozenset[int] = frozenset()
    exclude_generation_positions: tuple[int, ...] = ()
    exclude_generation_window: Window | None = None
    exclude_generation_tokens: frozenset[int] = frozenset()
    variant: Variant = "corrected"
    marks: ThinkTokenIds | None = None

    def __post_init__(self) -> None:
        if self.on not in get_args(Region):
            raise InputError(f"a scope on {self.on!r}: there are {', '.join(get_args(Region))}")
        if self.steps not in (None, "separators", *_KINDS):
            raise InputError(f"steps={self.steps!r}: there are 'separators', {', '.join(map(repr, _KINDS))}")
        if (self.on != "all" or self.steps is not None) and self.marks is None:
            raise InputError(
                "a scope on a part of the trace needs the ids of the tags; make it with Scope.of(model, …)"
            )
        for name in ("generation", "exclude_generation"):
            bounds = getattr(self, f"{name}_window") or (0, None)
            if min((*getattr(self, f"{name}_positions"), *(b for b in bounds if b is not None)), default=0) < 0:
                raise InputError(
                    f"{name}: a position is negative, but the end of a generation is not known before it is reached"
                )

    @classmethod
    def of(cls, model: Model, *, on: Region = "all", steps: Steps | None = None, **fields: object) -> "Scope":
        """A scope with any of the fields, its marks those of `model`.

        Raises InputError for a model without think tags, or whose tags are no tokens of their own (see `ThinkTokenIds.of`).
        """
        return cls(on=on, steps=steps, marks=ThinkTokenIds.of(model), **fields)  # type: ignore[arg-type]  # the caller's own types

    @classmethod
    def thinking(cls, model: Model, *, at_separators: bool = False) -> "Scope":
        """Every token of the thinking, or those that hold a blank line (where SEAL reads and writes). Raises as `of`."""
        return cls.of(model, on="think", steps="separators" if at_separators else None)

    def mask(self, ids: Tensor, *, n_prompt: Tensor | None = None, last: int | None = None) -> Tensor:
        """True on the tokens of `ids` (batch, token; whole sequences so far, -1 on padding) that are edited.

        `n_prompt` (batch,) says how many tokens of each row were given (None: all). `last` columns alone are judged where it is set.
        """
        real = ids >= 0
        index = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        given = real.sum(dim=1) if n_prompt is None else n_prompt.to(ids.device)
        chosen = self.local_mask(ids, index, given)
        if self.on != "all" or self.steps is not None:
            assert self.marks is not None
            places = TokenRegions.find(ids, self.marks)
            if self.on != "all":
                chosen = chosen & getattr(places, self.on)
            if self.steps is not None:
                chosen = chosen & places.think
                if self.steps == "separators":
                    chosen = chosen & _among(ids, self.marks.separators)
        chosen = chosen[:, -(last or ids.shape[1]) :]
        return self._of_kind(ids, chosen) if self.steps in _KINDS else chosen

    @property
    def is_local(self) -> bool:
        """Whether a token's own place and id decide, whatever was said before it."""
        return self.on == "all" and self.steps is None

    def of_generated(self, index: int) -> bool | None:
        """Whether the generated token `index` is edited, whatever it and those beside it are; None where that hangs on words."""
        if not self._by_place:
            return None
        named = index in self.generation_positions or _within(index, self.generation_window)
        excluded = index in self.exclude_generation_positions or _within(index, self.exclude_generation_window)
        return (named or self._of_all) and not excluded

    @cached_property
    def _by_place(self) -> bool:
        return (
            self.is_local and self.tokens is None and not self.generation_tokens and not self.exclude_generation_tokens
        )

    @cached_property
    def _of_all(self) -> bool:
        """Whether no field of the first group is set."""
        return not any(
            getattr(self, f"{phase}_{what}") not in ((), None, frozenset())
            for phase in ("prompt", "generation")
            for what in ("positions", "window", "tokens")
        )

    def local_mask(self, ids: Tensor, index: Tensor, n_prompt: Tensor) -> Tensor:
        """True on the columns that positions, windows and ids name, less those that are excluded.

        `ids` and `index` (batch, token) may be any columns of the sequences: `index` says where they stand, -1 on padding.
        """
        chosen = index >= 0
        if (named := self._named("", ids, index, n_prompt)) is not None:
            chosen = chosen & named
        if (excluded := self._named("exclude_", ids, index, n_prompt)) is not None:
            chosen = chosen & ~excluded
        return chosen if self.tokens is None else chosen & _among(ids, self.tokens)

    def _named(self, prefix: str, ids: Tensor, index: Tensor, given: Tensor) -> Tensor | None:
        """The union of what the fields with `prefix` name; None where none of them is set."""
        found = []
        n = given[:, None]
        for phase in ("prompt", "generation"):
            positions, window, tokens = (
                getattr(self, f"{prefix}{phase}_{w}") for w in ("positions", "window", "tokens")
            )
            if not positions and window is None and not tokens:
                continue
            at, inside = (index, index < n) if phase == "prompt" else (index - n, index >= n)
            found += [inside & (at == (p if p >= 0 else n + p)) for p in positions]
            if window is not None:
                start, stop = (b if b is None or b >= 0 else n + b for b in window)
                found.append(inside & (at >= start) & (at < stop if stop is not None else True))
            if tokens:
                found.append(inside & _among(ids, tokens))
        return torch.stack(found).any(dim=0) if found else None

    def _of_kind(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """Of the `chosen` last columns, those whose step, read from its separator up to the token, is of the kind."""
        assert self.marks is not None
        if self.marks.tokenizer is None:
            raise InputError("the kind of a step is in its words; make the scope with Scope.of(model, …)")
        separator = _among(ids, self.marks.separators)
        begins, first = last_seen(separator), ids.shape[1] - chosen.shape[1]
        opened = last_seen(_among(ids, frozenset(self.marks.opens)))
        kept = torch.zeros_like(chosen)
        for row, column in chosen.nonzero().tolist():
            at = first + column
            begin = int(begins[row, at])
            if begin < int(opened[row, at]) or begin == at:  # before the first separator there is no step, nor in one
                continue
            words = self.marks.tokenizer.decode(ids[row, begin + 1 : at + 1].tolist(), skip_special_tokens=False)
            kept[row, column] = classify_step(words, variant=self.variant) == self.steps
        return kept


def _within(index: int, window: Window | None) -> bool:
    return window is not None and window[0] <= index and (window[1] is None or index < window[1])


def _among(ids: Tensor, tokens: frozenset[int] | Sequence[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=torch.long, device=ids.device))
