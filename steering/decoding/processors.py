"""Decoding methods that change only logits, as Hugging Face `LogitsProcessor`s.

Each takes the tokens so far (batch, token), left-padded, and logits (batch, vocab), and returns logits. It reads nothing else, so it
works in `generate(…, processors=[…])` here and in Hugging Face's own, with or without a steering vector.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.data.variants import is_published
from reasonscope.probes.models.model import Model
from reasonscope.steering.decoding.closing import forced
from reasonscope.steering.vectors.thinking import WrittenThinking, single_tokens

# The reflection words of CyclicReflex (its code and section 4) and the switch words of TIP (whose list has more alternatives).
REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")
SWITCH_WORDS = ("Alternatively",)


def _triangle(t: Tensor, *, amplitude: float, period: float, shift: float = 0.0) -> Tensor:
    """δ(t) = A·|4((t − C/4) mod C)/C − 2| − A of CyclicReflex (arXiv 2506.11077), in logits: 0, up to A, down to −A, back to 0 in C steps.

    `shift` is the paper's phase, in periods. `t` may have any shape.
    """
    phase = torch.remainder(t + shift * period - period / 4, period) / period
    return amplitude * (4 * phase - 2).abs() - amplitude


@dataclass(frozen=True, kw_only=True)
class CyclicReflex(LogitsProcessor):
    """Adds a triangle wave δ(t) to the logits of reflection words, with t the number of thinking tokens so far (see `_triangle`).

    Attributes:
        thinking: Finds the thinking.
        tokens: Ids of the words.
        amplitude: The height A of the wave, in logits.
        period: The period C, in tokens.
        shift: The phase, in periods.
        windows: Half-open ranges of t; outside of them nothing is added. By default everywhere.

    CyclicReflex (arXiv 2506.11077).

    Departures: `of` also takes the words after a blank (`variant="published"` does not). A word that is not a single token of the model is
        an error (in the released code it silently shifts every logit). t starts after what the template writes after the opening tag.

    Example:
        wave = CyclicReflex.of(model, amplitude=3, period=100)
        completions = generate(model, prompts, sampling, seeds=[0], processors=[wave])
    """

    thinking: WrittenThinking
    tokens: tuple[int, ...]
    amplitude: float
    period: float
    shift: float = 0.0
    windows: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not self.period > 0:
            raise InputError(f"a period of {self.period} tokens: give a number above 0")

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
        """For the tokens of `words` in this model. Raises InputError if a word is not a single token."""
        tokens = single_tokens(model, words, spaced=_corrected(variant))
        return cls(thinking=WrittenThinking.of(model), tokens=tokens, amplitude=amplitude, period=period, shift=shift)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = self.thinking.written(input_ids)
        bonus = _triangle(t.double(), amplitude=self.amplitude, period=self.period, shift=self.shift)
        within = (t >= 0) & _within(t, self.windows)
        return _added(scores, self.tokens, torch.where(within, bonus, 0.0))


@dataclass(frozen=True, kw_only=True)
class TokenBias(LogitsProcessor):
    """Adds a constant to the logits of some tokens while the model thinks; SEAL's baseline is −3 on "wait" and "alternatively".

    Attributes:
        thinking: Finds the thinking.
        tokens: The ids.
        bias: What is added, in logits.
        windows: Half-open ranges of thinking tokens written so far; outside of them nothing is added. By default everywhere.

    Example:
        bias = TokenBias(thinking=WrittenThinking.of(model), tokens=tuple(model.tokenizer.encode("Wait")), bias=-3.0)
        completions = generate(model, prompts, sampling, seeds=[0], processors=[bias])
    """

    thinking: WrittenThinking
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
    """TIP (arXiv 2501.18585): a penalty on words that switch to another thought, early in each thought.

    z_v ← z_v − α for the switch tokens v while the current thought has fewer than β tokens. A thought starts at Ψ, the last switch token
    or the begin of the thinking; the penalty applies at positions below Ψ + β.

    Attributes:
        thinking: Finds the thinking.
        tokens: Ids of the switch words.
        penalty: α, in logits.
        window: β, in tokens.

    Example:
        tip = ThoughtSwitchPenalty.of(model, penalty=3, window=600)
        completions = generate(model, prompts, sampling, seeds=[0], processors=[tip])
    """

    thinking: WrittenThinking
    tokens: tuple[int, ...]
    penalty: float = 3.0
    window: int = 600

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)

    @classmethod
    def of(
        cls, model: Model, *, penalty: float = 3.0, window: int = 600, words: tuple[str, ...] = SWITCH_WORDS
    ) -> "ThoughtSwitchPenalty":
        """For the tokens of `words` in this model. Raises InputError if a word is not a single token."""
        return cls(
            thinking=WrittenThinking.of(model), tokens=single_tokens(model, words), penalty=penalty, window=window
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = self.thinking.written(input_ids)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        switches = torch.isin(input_ids, torch.tensor(self.tokens, device=input_ids.device))
        since_switch = input_ids.shape[1] - torch.where(switches, columns, -input_ids.shape[1]).amax(dim=1)
        early = (t >= 0) & (torch.minimum(t, since_switch) < self.window)
        return _added(scores, self.tokens, torch.where(early, -self.penalty, 0.0))


@dataclass(frozen=True, kw_only=True)
class SuppressTokens(LogitsProcessor):
    """Forbids tokens while the model thinks, by logits of −∞ (the thinking tokens of MI-Peaks, arXiv 2506.02867).

    Attributes:
        thinking: Finds the thinking.
        tokens: The forbidden ids.

    Example:
        forbid = SuppressTokens(thinking=WrittenThinking.of(model), tokens=tuple(model.tokenizer.encode("Wait")))
        completions = generate(model, prompts, sampling, seeds=[0], processors=[forbid])
    """

    thinking: WrittenThinking
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _added(scores, self.tokens, torch.where(self.thinking.written(input_ids) >= 0, -torch.inf, 0.0))


@dataclass(frozen=True, kw_only=True)
class CloseTag(LogitsProcessor):
    """Makes the closing tag more or less likely while the model thinks: z ← max − τ·(max − z) + b (TS, arXiv 2505.07961).

    Attributes:
        thinking: Finds the thinking, and the token that closes it.
        bias: b, in logits; above 0 it closes earlier, below 0 later.
        temperature: τ; below 1 it closes earlier, above 1 later.

    Departures: The paper's exact expression is not public. Instead of the plain z/τ that circulates, the distance to the largest logit is
        scaled, so that the sign of z, which means nothing to a softmax, does not reverse the effect.

    Example:
        sooner = CloseTag(thinking=WrittenThinking.of(model), bias=4.0)
        completions = generate(model, prompts, sampling, seeds=[0], processors=[sooner])
    """

    thinking: WrittenThinking
    bias: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature} of the closing tag: give a number above 0")
        self.thinking.closing_token("CloseTag")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.thinking.closing_token("CloseTag")
        closing, highest = scores[:, token], scores.amax(dim=-1)
        after = highest - self.temperature * (highest - closing) + self.bias
        changed = scores.clone()
        changed[:, token] = torch.where(self.thinking.written(input_ids) >= 0, after, closing)
        return changed


@dataclass(frozen=True, kw_only=True)
class ForcedClose(LogitsProcessor):
    """Closes the thinking once a budget of tokens is used up, whatever the model would write (s1, arXiv 2501.19393).

    Attributes:
        thinking: Finds the thinking, and the token that closes it.
        budget: Thinking tokens before it is closed; 0 closes at once.
        closing: Ids to write, the last of which is the closing tag; by default the tag alone, or "Final answer:" for reasoning in the
            open. s1 writes a newline before it.

    Example:
        close = ForcedClose(thinking=WrittenThinking.of(model), budget=120)
        completions = generate(model, prompts, sampling, seeds=[0], processors=[close])
    """

    thinking: WrittenThinking
    budget: int
    closing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise InputError(f"a budget of {self.budget} tokens: give 0 (which closes at once) or more")
        if self.closing and self.closing[-1] != self.thinking.closing[-1]:
            raise InputError(
                "closing does not end with the closing tag, so the thinking would never end; add its id as the last one"
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        closing = self.closing or self.thinking.closing
        over = self.thinking.written(input_ids) - self.budget
        for row in (over >= 0).nonzero()[:, 0].tolist():
            scores = forced(scores, row, closing[min(int(over[row]), len(closing) - 1)])
        return scores


@dataclass(kw_only=True)
class BudgetForcing(LogitsProcessor):
    """Lengthens the thinking: the first times that the model would close it, it writes "Wait" instead (s1, arXiv 2501.19393).

    Use one object per generation: it counts the rounds of each sequence by its tokens.

    Attributes:
        thinking: Finds the thinking, and the token that closes it.
        wait: Ids to write in place of the closing tag.
        rounds: How many times.

    Departures: s1 samples the tag, drops it and starts a new request. Here the tag cannot be sampled while rounds are left, and `wait`
        follows if the tag is the likeliest token; in greedy decoding this is the same.

    Example:
        longer = BudgetForcing.of(model, rounds=1)
        completions = generate(model, prompts, sampling, seeds=[0], processors=[longer])
    """

    thinking: WrittenThinking
    wait: tuple[int, ...]
    rounds: int
    _state: dict[bytes, tuple[int, int]] = field(
        default_factory=dict, init=False
    )  # by sequence: rounds done, tokens of `wait` still to write

    def __post_init__(self) -> None:
        _check_tokens(self.wait)
        self.thinking.closing_token("BudgetForcing")

    @classmethod
    def of(cls, model: Model, *, rounds: int, wait: str = "Wait") -> "BudgetForcing":
        """For the tokens of `wait` in this model."""
        ids = tuple(model.tokenizer.encode(wait, add_special_tokens=False))
        return cls(thinking=WrittenThinking.of(model), wait=ids, rounds=rounds)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        closes = self.thinking.closing_token("BudgetForcing")
        thinks, likeliest = self.thinking.written(input_ids) >= 0, scores.argmax(dim=-1)
        state: dict[bytes, tuple[int, int]] = {}
        rows = input_ids.cpu().numpy()
        for row, ids in enumerate(rows):
            had, to_come = self._state.get(ids[:-1].tobytes(), (0, 0))
            if thinks[row] and not to_come and had < self.rounds:
                if likeliest[row] == closes:
                    had, to_come = had + 1, len(self.wait)
                else:
                    scores = _added(scores, (closes,), _one(scores, row, -torch.inf))
            if to_come:
                scores, to_come = forced(scores, row, self.wait[-to_come]), to_come - 1
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


def _within(t: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
    if not windows:
        return torch.ones_like(t, dtype=torch.bool)
    return torch.stack([(t >= start) & (t < stop) for start, stop in windows]).any(dim=0)


def _check_tokens(tokens: tuple[int, ...]) -> None:
    if not tokens:
        raise InputError("no tokens given; give at least one id")


def _corrected(variant: str) -> bool:
    return not is_published(variant)
