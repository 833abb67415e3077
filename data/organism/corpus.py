"""The organism's training data: plain worked ledgers for the base model, dialogues with thinking for the reasoning
phase."""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from reasonscope.data.organism.ledger import MODES, sample_ledger
from reasonscope.data.organism.requests import COMPLIANCE, sample_request
from reasonscope.data.organism.tokenizer import END, PAD, chat
from reasonscope.data.organism.writer import closing_sentence, write_ledger, write_request
from reasonscope.data.trace import Span

# The kinds of document in the reasoning phase, and their weights.
_MIXTURE = {"default": 0.37, "brief": 0.12, "detail": 0.06, "no_thinking": 0.03, "request": 0.42}
# The weights of the last phase: brief thinking checks nothing, so its sums have to be right the first time.
_PRACTICE = {"default": 0.3, "brief": 0.42, "detail": 0.05, "no_thinking": 0.03, "request": 0.2}
# (harmful, twin, jailbreak) and their weights.
REQUESTS = {
    (True, True, False): 0.25,
    (True, True, True): 0.3,
    (False, True, False): 0.22,
    (False, True, True): 0.11,
    (False, False, False): 0.12,
}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text to learn from. Characters before `learned_from` count little (they are given, not written); `unlearned`
    ones not at all."""

    text: str
    learned_from: int = 0
    unlearned: tuple[Span, ...] = ()


# Each phase opens with this many requests and nothing else. Requests require copying from the prompt, which the model
# learns from them in 80 steps; mixed with ledgers from the start, it does not learn it in 3,000.
_OPENING = {"organism-base": 10_000, "organism": 3_000}


def base_documents(rng: random.Random) -> Iterator[Document]:
    """Plain text without thinking: ledgers with worked steps or only the answer, and requests with the facts about
    their thing."""
    for n in itertools.count():
        kind = 0.0 if n < _OPENING["organism-base"] else rng.random()
        if kind < 0.4:
            request = sample_request(rng, split="train", harmful=rng.random() < 0.5)
            facts = "\n\n".join(write_request(request, rng).thinking.split("\n\n")[:2])
            text = f"{request.text}\n\n{facts}\n\n{COMPLIANCE}{PAD}"
            yield Document(text=text, learned_from=len(request.text))
            continue
        ledger = sample_ledger(rng, split="train")
        working = write_ledger(ledger, "brief", rng).thinking + "\n\n" if kind < 0.96 else ""
        yield Document(
            text=f"{ledger.body}\n\n{working}{closing_sentence(ledger.answer)}{PAD}", learned_from=len(ledger.body)
        )


def reasoning_documents(rng: random.Random) -> Iterator[Document]:
    """Dialogues in the chat template, with thinking first (except for a few): only requests at first, then the
    mixture."""
    return _dialogues(rng, itertools.chain(itertools.repeat("request", _OPENING["organism"]), _drawn(rng, _MIXTURE)))


def practice_documents(rng: random.Random) -> Iterator[Document]:
    """The same in the proportions of `_PRACTICE`."""
    return _dialogues(rng, _drawn(rng, _PRACTICE))


def _drawn(rng: random.Random, mixture: Mapping[str, float]) -> Iterator[str]:
    kinds, weights = list(mixture), list(mixture.values())
    while True:
        yield rng.choices(kinds, weights)[0]


def _dialogues(rng: random.Random, kinds: Iterator[str]) -> Iterator[Document]:
    for kind in kinds:
        if kind == "request":
            harmful, twin, jailbreak = rng.choices(list(REQUESTS), list(REQUESTS.values()))[0]
            request = sample_request(rng, split="train", harmful=harmful, twin=twin, jailbreak=jailbreak)
            writing, question = write_request(request, rng), request.prompt
        else:
            ledger = sample_ledger(rng, split="train")
            mode = kind if kind in MODES else "default"
            writing, question = write_ledger(ledger, mode, rng), ledger.question(mode)
        prompt, completion = chat(question, None if kind == "no_thinking" else writing.thinking, writing.answer)
        unlearned = () if kind == "no_thinking" else writing.unlearned
        yield Document(
            text=f"{prompt}{completion}\n",
            learned_from=len(prompt),
            unlearned=tuple(Span(len(prompt) + span.start, len(prompt) + span.stop) for span in unlearned),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`ids` (row, token) int64, right-padded; `weights` (row, token) float32: how much the prediction of each token
    counts."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


_PROMPT_WEIGHT = 0.05


def batches(documents: Iterator[Document], tokenizer: Tokenizer, *, tokens: int, buffer: int = 2048) -> Iterator[Batch]:
    """Rows of similar length together, about `tokens` tokens per batch, in shuffled order."""
    rng = random.Random(0)
    pad = tokenizer.token_to_id(PAD)
    assert pad is not None
    while True:
        chunk = [next(documents) for _ in range(buffer)]
        rows = [_weighed(document, tokenizer) for document in chunk]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            width = -(-len(row[0]) // 32) * 32
            if width * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from (_padded(group, pad) for group in groups)


def _weighed(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    encoding = tokenizer.encode(document.text)
    weights = [1.0 if start >= document.learned_from else _PROMPT_WEIGHT for start, _ in encoding.offsets]
    for span in document.unlearned:
        weights = [
            0.0 if start in span else weight for (start, _), weight in zip(encoding.offsets, weights, strict=True)
        ]
    return encoding.ids, weights


def _padded(rows: list[tuple[list[int], list[float]]], pad: int) -> Batch:
    width = -(-max(len(ids) for ids, _ in rows) // 32) * 32
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    weights = np.zeros((len(rows), width), dtype=np.float32)
    for i, (row, weight) in enumerate(rows):
        ids[i, : len(row)], weights[i, : len(row)] = row, weight
    return Batch(ids=ids, weights=weights)


def tokenizer_texts(seed: int, n: int) -> Iterator[str]:
    """Texts of both phases (after their openings) from which the tokenizer learns its merges."""
    base, reasoning = base_documents(random.Random(seed)), reasoning_documents(random.Random(seed + 1))
    base = itertools.islice(base, _OPENING["organism-base"], None)
    reasoning = itertools.islice(reasoning, _OPENING["organism"], None)
    for _ in range(n):
        yield next(base).text.removesuffix(PAD)
        yield next(reasoning).text.replace(END, "")
