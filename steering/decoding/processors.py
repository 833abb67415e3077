"""Controls of the thinking that work on logits alone, as Hugging Face `LogitsProcessor`s.

Each takes the tokens so far (batch, token), left-padded, and logits (batch, vocab), and returns logits; it looks at nothing else,
so it works in `generate(…, processors=[…])` here and in Hugging Face's own, with or without a steering vector.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.data.variants import is_published
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.thinking import Thinking, single_tokens

# What CyclicReflex and TIP call reflection tokens (the former's code, section 4; the latter's list has more alternatives).
REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")
SWITCH_WORDS = ("Alternatively",)


def triangle(t: Tensor, *, amplitude: float, period: float, shift: float = 0.0) -> Tensor:
    """δ(t) = A·|4((t − C/4) mod C)/C − 2| − A of CyclicReflex (arXiv 2506.11077): 0, up to A, down to −A, back to 0 in C steps.

    The paper's phase moves it by `shift` periods. Any shape; logits.
    """
    phase = torch.remainder(t + shift * period - period / 4, period) / period
    return amplitude * (4 * phase - 2).abs() - amplitude


@dataclass(frozen=True, kw_only=True)
class CyclicReflex(LogitsProcessor):
    """δ(t) is added to the logits of `tokens`, t the tokens of thinking written so far (see `triangle`).

    `windows`: where given, half-open ranges of t outside of which nothing is added. Departures from the released code:
    `of` takes the words behind a blank too (`variant="published"`: without), and a word that is no token of the model is an error
    (there a silent shift of every logit). t starts behind what the template puts after the opening tag.
    """

    thinking: Thinking
    tokens: tuple[int, ...]
    amplitude: float
    period: float
    shift: float = 0.0
    windows: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not self.period > 0:
            raise InputError(f"a period of {self.period}; it is a number of tokens above 0")

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        amplitude: float,
        period: float,
        shift: float = 0.0,
        words: tuple[str, ...] = REFLECTION_WORDS,
        variant: str = "corrected",
    ) -> "CyclicReflex":
        tokens = single_tokens(model, words, spaced=_corrected(variant))
        return cls(thinking=Thinking.of(model), tokens=tokens, amplitude=amplitude, period=period, shift=shift)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = self.thinking.written(input_ids)
        bonus = triangle(t.double(), amplitude=self.amplitude, period=self.period, shift=self.shift)
        within = (t >= 0) & _within(t, self.windows)
        return _added(scores, self.tokens, torch.where(within, bonus, 0.0))


@dataclass(frozen=True, kw_only=True)
class TokenBias(LogitsProcessor):
    """A constant `bias` on the logits of `tokens` while thinking (SEAL's baseline is −3 on wait and alternatively), in `windows`."""

    thinking: Thinking
    tokens: tuple[int, ...]
    bias: float
    windows: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = self.thinking.written(input_ids)
        return _added(scores, self.tokens, torch.where((t >= 0) & _within(t, self.windows), self.bias, 0.0))


@dataclass(frozen=True, kw_only=True)
class ThoughtSwitchPenalty(LogitsProcessor):
    """TIP (arXiv 2501.18585): z_v ← z_v − α for the switch tokens v while fewer than β tokens of the current thought are written.

    A thought starts at Ψ, the last switch token of the thinking or its begin; the penalty holds for positions below Ψ + β.
    """

    thinking: Thinking
    tokens: tuple[int, ...]
    penalty: float = 3.0
    window: int = 600

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)

    @classmethod
    def of(
        cls, model: Model, *, penalty: float = 3.0, window: int = 600, words: tuple[str, ...] = SWITCH_WORDS
    ) -> "ThoughtSwitchPenalty":
        return cls(thinking=Thinking.of(model), tokens=single_tokens(model, words), penalty=penalty, window=window)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = self.thinking.written(input_ids)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        switches = torch.isin(input_ids, torch.tensor(self.tokens, device=input_ids.device))
        since_switch = input_ids.shape[1] - torch.where(switches, columns, -input_ids.shape[1]).amax(dim=1)
        early = (t >= 0) & (torch.minimum(t, since_switch) < self.window)
        return _added(scores, self.tokens, torch.where(early, -self.penalty, 0.0))


@dataclass(frozen=True, kw_only=True)
class SuppressTokens(LogitsProcessor):
    """`tokens` cannot be written while thinking (the thinking tokens of MI-Peaks, arXiv 2506.02867: logits of −∞)."""

    thinking: Thinking
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _added(scores, self.tokens, torch.where(self.thinking.written(input_ids) >= 0, -torch.inf, 0.0))


@dataclass(frozen=True, kw_only=True)
class CloseTag(LogitsProcessor):
    """The closing tag's logit made more likely while thinking: z ← max − τ·(max − z) + b (TS, arXiv 2505.07961).

    `temperature` τ < 1 and `bias` b > 0 close earlier, τ > 1 and b < 0 later; 1 and 0 change nothing. The paper's exact
    expression is not public. Departure from the plain z/τ that circulates: the distance to the largest logit is scaled, so the sign
    of z, which means nothing to a softmax, does not turn the effect round.
    """

    thinking: Thinking
    bias: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"a temperature of {self.temperature} on the closing tag; it is a number above 0")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        closing, highest = scores[:, self.thinking.closes], scores.amax(dim=-1)
        after = highest - self.temperature * (highest - closing) + self.bias
        changed = scores.clone()
        changed[:, self.thinking.closes] = torch.where(self.thinking.written(input_ids) >= 0, after, closing)
        return changed


@dataclass(frozen=True, kw_only=True)
class ForcedClose(LogitsProcessor):
    """Once `budget` tokens of thinking are written, `closing` follows whatever the model says; its last token is the closing tag.

    The cut of s1's budget forcing (arXiv 2501.19393): there a newline comes before the tag, `closing=(newline, tag)`.
    """

    thinking: Thinking
    budget: int
    closing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise InputError(f"a budget of {self.budget} tokens; 0 closes at once")
        if self.closing and self.closing[-1] != self.thinking.closes:
            raise InputError("what is forced has to end with the closing tag, or the thinking would never end")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        closing = self.closing or (self.thinking.closes,)
        over = self.thinking.written(input_ids) - self.budget
        for row in (over >= 0).nonzero()[:, 0].tolist():
            scores = _forced(scores, row, closing[min(int(over[row]), len(closing) - 1)])
        return scores


@dataclass(kw_only=True)
class BudgetForcing(LogitsProcessor):
    """s1's lengthening (arXiv 2501.19393): the first `rounds` times that the model would close, it writes `wait` instead.

    Departures: where s1 samples the tag, drops it and starts a new request, here the tag cannot be sampled while rounds are left and
    `wait` follows where the tag is the likeliest token (the same thing when decoding greedily). One use at a time: how many
    rounds each sequence has had is kept by its tokens.
    """

    thinking: Thinking
    wait: tuple[int, ...]
    rounds: int
    _state: dict[bytes, tuple[int, int]] = field(
        default_factory=dict, init=False
    )  # rounds had, tokens of `wait` to come

    def __post_init__(self) -> None:
        _check_tokens(self.wait)

    @classmethod
    def of(cls, model: Model, *, rounds: int, wait: str = "Wait") -> "BudgetForcing":
        ids = tuple(model.tokenizer.encode(wait, add_special_tokens=False))
        return cls(thinking=Thinking.of(model), wait=ids, rounds=rounds)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        thinks, likeliest = self.thinking.written(input_ids) >= 0, scores.argmax(dim=-1)
        state: dict[bytes, tuple[int, int]] = {}
        rows = input_ids.cpu().numpy()
        for row, ids in enumerate(rows):
            had, to_come = self._state.get(ids[:-1].tobytes(), (0, 0))
            if thinks[row] and not to_come and had < self.rounds:
                if likeliest[row] == self.thinking.closes:
                    had, to_come = had + 1, len(self.wait)
                else:
                    scores = _added(scores, (self.thinking.closes,), _one(scores, row, -torch.inf))
            if to_come:
                scores, to_come = _forced(scores, row, self.wait[-to_come]), to_come - 1
            state[ids.tobytes()] = had, to_come
        self._state = state
        return scores


def _added(scores: Tensor, tokens: tuple[int, ...], bonus: Tensor) -> Tensor:
    """`scores` (batch, vocab) with `bonus` (batch,) on each of `tokens`."""
    changed = scores.clone()
    changed[:, list(tokens)] += bonus.to(scores)[:, None]
    return changed


def _one(scores: Tensor, row: int, value: float) -> Tensor:
    bonus = scores.new_zeros(scores.shape[0])
    bonus[row] = value
    return bonus


def _forced(scores: Tensor, row: int, token: int) -> Tensor:
    changed = scores.clone()
    changed[row] = -torch.inf
    changed[row, token] = 0.0
    return changed


def _within(t: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
    if not windows:
        return torch.ones_like(t, dtype=torch.bool)
    return torch.stack([(t >= start) & (t < stop) for start, stop in windows]).any(dim=0)


def _check_tokens(tokens: tuple[int, ...]) -> None:
    if not tokens:
        raise InputError("no token is given; name at least one id")


def _corrected(variant: str) -> bool:
    return not is_published(variant)
