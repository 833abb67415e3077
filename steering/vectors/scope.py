"""Which tokens an edit changes: by position, by id, by the part of the trace that they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.text.steps_and_sentences import classify_step
from reasonscope.data.trace import StepKind
from reasonscope.data.variants import Variant, is_published
from reasonscope.steering.vectors.token_regions import ThinkTokenIds, TokenRegions, last_seen

if TYPE_CHECKING:
    from reasonscope.probes.models.model import Model

Window: TypeAlias = tuple[int, int | None]
Region = Literal["all", "think", "close_window", "answer"]
Steps: TypeAlias = Literal["separators"] | StepKind

_KINDS = get_args(StepKind)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The tokens of a sequence that an edit changes; all of them if no field is given.

    Positions, windows and ids of the prompt and of the generation are united, and what `exclude_…` names is taken away. The tokens left
    are further limited to the region `on`, to `steps` and to the ids `tokens`, if these are given. A window is half-open, (start, stop),
    with None for no end. The names are EasySteer's.

    What is edited is the state of the token itself: position 0 of the generation is fed to predict the second generated token, so the
    state that predicts the first one is the last of the prompt. The same tokens are edited while generating and in one pass over the
    finished text, if the number of prompt tokens is given.

    Attributes:
        on: `think`, `close_window` or `answer` (see `TokenRegions`); `all` by default.
        steps: `separators`, the tokens of the thinking that hold a blank line; or a kind of step, judged by its words so far: before its
            keyword has come, a step is an execution step.
        tokens: Ids, anywhere.
        prompt_positions: Tokens of the prompt, counted from 0 without padding; negative ones from its end.
        prompt_window: The same as a window.
        prompt_tokens: Ids in the prompt.
        generation_positions: Generated tokens, counted from 0; not negative, since the end is not known in advance.
        generation_window: The same as a window.
        generation_tokens: Ids among the generated tokens.
        exclude_prompt_positions: Never edited, and so on for the other five.
        exclude_prompt_window: See above.
        exclude_prompt_tokens: See above.
        exclude_generation_positions: See above.
        exclude_generation_window: See above.
        exclude_generation_tokens: See above.
        variant: Whose keywords tell the kind of a step: `corrected` or `published`.
        marks: The ids of tags and separators; `Scope.of` fills them in.

    Raises:
        InputError: For an unknown region or step, a region without `marks`, and negative positions of the generation.

    Departures: EasySteer takes the last token of the prompt for a position past its end; here such a position names nothing.

    Example:
        thinking = Scope.thinking(model)
        first_ten = Scope.of(model, on="think", generation_window=(0, 10))
        last_prompt_token = Scope(prompt_positions=(-1,))
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
            raise InputError(f"on={self.on!r}; choose from {', '.join(get_args(Region))}")
        if self.steps not in (None, "separators", *_KINDS):
            raise InputError(f"steps={self.steps!r}; choose from 'separators', {', '.join(map(repr, _KINDS))}")
        if (self.on != "all" or self.steps is not None) and self.marks is None:
            raise InputError(
                "a scope on a part of the trace needs the ids of the tags; make it with Scope.of(model, …)"
            )
        for name in ("generation", "exclude_generation"):
            bounds = getattr(self, f"{name}_window") or (0, None)
            if min((*getattr(self, f"{name}_positions"), *(b for b in bounds if b is not None)), default=0) < 0:
                raise InputError(
                    f"{name}: negative positions count from the end, which is not known while a model writes; give positions from 0"
                )

    @classmethod
    def of(cls, model: "Model", *, on: Region = "all", steps: Steps | None = None, **fields: object) -> "Scope":
        """A scope with the think tags and separators of `model`, and any other fields.

        Raises InputError for a model that is read without thinking (`Thinking(mode="none")`).
        """
        return cls(on=on, steps=steps, marks=ThinkTokenIds.of(model), **fields)  # type: ignore[arg-type]  # the caller's own types

    @classmethod
    def thinking(cls, model: "Model", *, at_separators: bool = False) -> "Scope":
        """Every token of the thinking, or only its separators, where SEAL reads and writes. Raises as `of`."""
        return cls.of(model, on="think", steps="separators" if at_separators else None)

    def mask(self, ids: Tensor, *, n_prompt: Tensor | None = None, last: int | None = None) -> Tensor:
        """True on the edited tokens of `ids` (batch, token), whole sequences so far, -1 on padding.

        `n_prompt` (batch,) is the number of prompt tokens of each row, all by default. With `last`, only that many last columns are
        returned.
        """
        real = ids >= 0
        index = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        given = real.sum(dim=1) if n_prompt is None else n_prompt.to(ids.device)
        chosen = self.local_mask(ids, index, given)
        if self.on != "all" or self.steps is not None:
            assert self.marks is not None
            places = TokenRegions.find(ids, self.marks, given)
            opened = places.opened
            if self.on != "all":
                chosen = chosen & getattr(places, self.on)
            if self.steps is not None:
                chosen = chosen & places.think
                if self.steps == "separators":
                    chosen = chosen & self._separators(ids)
        chosen = chosen[:, -(last or ids.shape[1]) :]
        return self._of_kind(ids, chosen, opened) if self.steps in _KINDS else chosen

    @property
    def is_local(self) -> bool:
        """Whether the position and id of a token decide, whatever came before it."""
        return self.on == "all" and self.steps is None

    def of_generated(self, index: int) -> bool | None:
        """Whether the generated token `index` is edited whatever its text; None if that depends on the text."""
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
        """Whether no position, window or id is named."""
        return not any(
            getattr(self, f"{phase}_{what}") not in ((), None, frozenset())
            for phase in ("prompt", "generation")
            for what in ("positions", "window", "tokens")
        )

    def local_mask(self, ids: Tensor, index: Tensor, n_prompt: Tensor) -> Tensor:
        """True on the columns that positions, windows and ids name, without those that are excluded.

        `ids` and `index` (batch, token) may be any columns of the sequences; `index` is their position, -1 on padding.
        """
        chosen = index >= 0
        if (named := self._named("", ids, index, n_prompt)) is not None:
            chosen = chosen & named
        if (excluded := self._named("exclude_", ids, index, n_prompt)) is not None:
            chosen = chosen & ~excluded
        return chosen if self.tokens is None else chosen & _among(ids, self.tokens)

    def _named(self, prefix: str, ids: Tensor, index: Tensor, given: Tensor) -> Tensor | None:
        """The union of what the fields with `prefix` name; None if no such field is set."""
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

    def _separators(self, ids: Tensor) -> Tensor:
        """True on the tokens that open a step, as `steps` of a trace finds them."""
        assert self.marks is not None
        whole = _among(ids, self.marks.separators)
        if is_published(self.variant) or not self.marks.newlines:
            return whole
        newline = _among(ids, self.marks.newlines)
        before = torch.nn.functional.pad(newline, (1, 0))[:, :-1]
        return whole | (newline & before & ~torch.nn.functional.pad(before, (1, 0))[:, :-1])

    def _of_kind(self, ids: Tensor, chosen: Tensor, opened: Tensor) -> Tensor:
        """Those of the `chosen` last columns whose step, read from its separator up to the token, is of the kind."""
        assert self.marks is not None
        if self.marks.tokenizer is None:
            raise InputError(
                "the kind of a step depends on its words; make the scope with Scope.of(model, …), which brings a tokenizer"
            )
        separator = self._separators(ids)
        begins, first = last_seen(separator), ids.shape[1] - chosen.shape[1]
        kept = torch.zeros_like(chosen)
        for row, column in chosen.nonzero().tolist():
            at = first + column
            begin = int(begins[row, at])
            if (
                begin < int(opened[row, at]) or begin == at
            ):  # neither a separator nor what comes before the first one is in a step
                continue
            words = self.marks.tokenizer.decode(ids[row, begin + 1 : at + 1].tolist(), skip_special_tokens=False)
            kept[row, column] = classify_step(words, variant=self.variant) == self.steps
        return kept


def _within(index: int, window: Window | None) -> bool:
    return window is not None and window[0] <= index and (window[1] is None or index < window[1])


def _among(ids: Tensor, tokens: frozenset[int] | Sequence[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=torch.long, device=ids.device))
