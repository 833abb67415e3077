"""What a model shows where its thinking may stop: the answer it would give, how sure it is, and whether it wants to stop or to doubt."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.arrays import Values
from reasonscope.data.text.answers import stated_answer
from reasonscope.data.text.sentence_splitter import split_sentences
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.branches import Branch, PrefixWriter, Writer
from reasonscope.probes.generation.forced_answers import FINAL, answer_in_box
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.prompting import Prompting
from reasonscope.steering.vectors.thinking import FINAL_ANSWER

# Words with which a thought doubts, checks or tries another way.
DOUBTS = ("Wait", "Hmm", "Alternatively", "However", "Hold", "But", "Another")
GREEDY = Sampling(temperature=0.0, max_new_tokens=32)
_READ_TOKENS = 4096  # of one pass, with padding
_DIGITS = 4  # so that rounding in a pass never decides whether a threshold is reached

_Signals = TypeVar("_Signals", bound="PlaceSignals")


@dataclass(frozen=True, kw_only=True, eq=False)
class PlaceSignals:
    """What a rule may read at each place of a trace's thinking, (place,); each entry depends on nothing after its place.

    Attributes:
        spent: Tokens of thinking that were written before, int64.
        answers: The answer that was forced there, None if it gave none or none was forced.
        confidence: How likely the model found the tokens of that answer: their geometric mean probability; NaN if none was forced.
        trial: Tokens that forcing the answer took, with those that close the thinking.
        margin: Log-probability of the likeliest tokens minus that of closing the thinking, nats; NaN without a tag.
        transition: Whether the likeliest next word doubts, checks or tries another way.
        candidates: How many answers the thinking has stated so far.
        score: What a probe says there; NaN without one.
        draw: A number in [0, 1) that depends on the tokens before and on a seed alone.
    """

    spent: NDArray[np.int64]
    answers: tuple[str | None, ...]
    confidence: Values
    trial: NDArray[np.int64]
    margin: Values
    transition: NDArray[np.bool_]
    candidates: NDArray[np.int64]
    score: Values
    draw: Values

    def then(self: _Signals, later: "PlaceSignals") -> _Signals:
        """These places and then those of `later`."""
        joined: dict[str, Any] = {
            name: (*getattr(self, name), *getattr(later, name))
            if name == "answers"
            else np.concatenate([getattr(self, name), getattr(later, name)])
            for name in (field.name for field in fields(PlaceSignals))
        }
        return replace(self, **joined)


def closing_ids(model: Prompting) -> tuple[int, ...]:
    """The tokens that close the thinking: a newline and the tag, as models that write tags do; in the open, the words that state an
    answer."""
    text = f"\n{model.tags.close}" if model.tags else FINAL_ANSWER
    return tuple(model.encode_continuation(text))


class PlaceReader:
    """Reads signals at places of one model's thinking, from the tokens before each place alone.

    Args:
        model: The model that wrote them.
        writer: Writes the forced answers; a `PrefixWriter` of the model by default.
        sampling: How to sample them; one greedy answer of at most 32 tokens by default.
        seed: Seed of `draw`.
    """

    def __init__(
        self, model: Model, *, writer: Writer | None = None, sampling: Sampling = GREEDY, seed: int = 0
    ) -> None:
        self._model, self._sampling, self._seed = model, sampling, seed
        self._writer = writer or PrefixWriter(model)
        self._closing = closing_ids(model) if model.tags else ()
        how = model.thinking.closing if model.tags else "\n\n"
        self._stub = tuple(model.encode_continuation(f"{how}{FINAL}"))
        self._doubts = _first_tokens(model, DOUBTS)

    def read(
        self, ids: Sequence[int], cuts: Sequence[int], spent: Sequence[int], *, margins: bool = True
    ) -> PlaceSignals:
        """The signals that need no forced answer, at places of one sequence, with `spent` tokens of thinking before each.

        Without `margins` no pass is run, and margins and transitions stay unknown.
        """
        n, rows = len(cuts), list(ids)
        margin, likeliest = self._margins(rows, cuts) if margins and n else (np.full(n, np.nan), np.zeros(n, dtype=int))
        texts = [self._model.decode(rows[cut - written : cut]) for cut, written in zip(cuts, spent, strict=True)]
        return PlaceSignals(
            spent=np.array(spent, dtype=np.int64),
            answers=(None,) * n,
            confidence=np.full(n, np.nan),
            trial=np.zeros(n, dtype=np.int64),
            margin=margin.round(_DIGITS),
            transition=np.isin(likeliest, self._doubts) & margins,
            candidates=np.array([_stated(text) for text in texts], dtype=np.int64),
            score=np.full(n, np.nan),
            draw=np.array([_draw(rows[:cut], self._seed) for cut in cuts]),
        )

    def forced(
        self, signals: _Signals, ids: Sequence[int], cuts: Sequence[int], at: NDArray[np.bool_] | None = None
    ) -> _Signals:
        """The signals with answers that are forced at the places `at`, by default at all of them."""
        chosen = range(len(cuts)) if at is None else np.flatnonzero(at).tolist()
        branches = [Branch(cut=cuts[i], stub=self._stub, seed=self._sampling.seed) for i in chosen]
        answers, confidence, trial = list(signals.answers), signals.confidence.copy(), signals.trial.copy()
        for i, done in zip(chosen, self._writer(list(ids), branches, self._sampling), strict=True):
            answers[i], n = answer_in_box(done, self._model.decode)
            confidence[i] = float(np.exp(done.logprobs[:n].mean())).__round__(_DIGITS)
            trial[i] = n + len(self._stub)
        return replace(signals, answers=tuple(answers), confidence=confidence, trial=trial)

    def _margins(self, ids: Sequence[int], cuts: Sequence[int]) -> tuple[Values, NDArray[np.int64]]:
        """At each cut, log p(likeliest) − log p(closing), summed over the tokens that close, and the likeliest next token."""
        margin, likeliest = np.full(len(cuts), np.nan), np.zeros(len(cuts), dtype=np.int64)
        group: list[int] = []
        for i in [*range(len(cuts)), -1]:
            if group and (i < 0 or (len(group) + 1) * cuts[i] > _READ_TOKENS):
                margin[group], likeliest[group] = self._margin([list(ids[: cuts[j]]) for j in group])
                group = []
            group.append(i)
        return margin, likeliest

    def _margin(self, prefixes: Sequence[Sequence[int]]) -> tuple[Values, NDArray[np.int64]]:
        ids, mask = left_padded(prefixes, self._model.device)
        first = self._model.backend.forward(ids, mask=mask, use_cache=True, last_logits_only=True)
        logits = [first.logits[:, -1]]
        if len(self._closing) > 1:
            rest = torch.tensor([self._closing[:-1]], device=ids.device).expand(len(ids), -1)
            longer = torch.cat([mask, mask.new_ones(rest.shape)], dim=1)
            then = self._model.backend.forward(rest, mask=longer, cache=first.cache, use_cache=True)
            logits += then.logits.unbind(dim=1)
        likeliest = logits[0].argmax(dim=-1).cpu().numpy()
        if not self._closing:
            return np.full(len(prefixes), np.nan), likeliest
        below = [_below(each, token) for each, token in zip(logits, self._closing, strict=True)]
        return torch.stack(below).sum(dim=0).cpu().numpy().astype(np.float64), likeliest


def _below(logits: Tensor, token: int) -> Tensor:
    """How far a token is below the likeliest one, (row,)."""
    wide = logits.float()
    return wide.amax(dim=-1) - wide[:, token]


def _first_tokens(model: Model, words: Sequence[str]) -> NDArray[np.int64]:
    """The first token of each word, with and without a blank before it; a word that begins with one of its letters alone tells nothing."""
    firsts = set()
    for word in words:
        for form in (word, f" {word}"):
            first = model.encode_continuation(form)[0]
            if len(model.decode([first]).strip()) > 1:
                firsts.add(first)
    return np.array(sorted(firsts), dtype=np.int64)


def _stated(text: str) -> int:
    return sum(stated_answer(text[span.slice]) is not None for span in split_sentences(text))


def _draw(ids: Sequence[int], seed: int) -> float:
    """A number in [0, 1) that is the same for the same tokens and seed."""
    digest = hashlib.sha256(np.asarray([seed, *ids], dtype="<i8").tobytes()).digest()
    return int.from_bytes(digest[:6]) / 2**48
