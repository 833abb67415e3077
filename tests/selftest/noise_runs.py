"""Small runs whose activations know nothing, for the null of a probe: fresh noise and fresh labels each time, all in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.requests import COMPLIANCE, REFUSAL
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem, Trace

N_PROBLEMS, WIDTH = 40, 8
_LENGTHS = (3, 4, 5, 6, 7, 8, 9, 10)


@dataclass(frozen=True, kw_only=True)
class NoiseRun:
    """What the probes ask of a `TraceStore`, kept in memory: `states[site][trace id]` is (row, d_model)."""

    traces: tuple[Trace, ...]
    states: Mapping[str, Mapping[str, NDArray[np.float32]]]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.states)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(trace.id for trace in self.traces)

    @property
    def meta(self) -> dict[str, Any]:
        return {}

    def __len__(self) -> int:
        return len(self.traces)

    def __iter__(self):
        return iter(self.traces)

    def activations(self, id: str, site: str) -> NDArray[np.float32]:
        return self.states[site][id]


def noise_run(rng: np.random.Generator, n_layers: int, *, answers: Sequence[str] = ("7", "8")) -> NoiseRun:
    """Forty problems whose lengths, answers and states have nothing to do with each other or with the prompts.

    Half of the problems get either answer. The first layer is left out, because it would be one more baseline.
    """
    lengths = rng.choice(_LENGTHS, size=N_PROBLEMS)
    which = rng.permutation(np.arange(N_PROBLEMS) % len(answers))
    traces = tuple(_trace(i, int(lengths[i]), answers[which[i]]) for i in range(N_PROBLEMS))
    sites = [f"resid_post.{layer}" for layer in range(1, n_layers + 1)]
    rows = [len(trace.token_ids) - 1 for trace in traces]
    ends = np.cumsum(rows)[:-1]
    return NoiseRun(traces=traces, states={site: _by_trace(rng, traces, sum(rows), ends) for site in sites})


def requests_run(rng: np.random.Generator, n_layers: int) -> NoiseRun:
    """The same of harmful requests that are refused or complied with at random."""
    return noise_run(rng, n_layers, answers=(REFUSAL, COMPLIANCE))


def uneven_run(rng: np.random.Generator, n_layers: int) -> NoiseRun:
    """Forty traces of very different lengths, each with one random state at all its tokens: rows of a trace are as alike as can be."""
    lengths = np.clip(np.exp(rng.normal(1.5, 1, size=N_PROBLEMS)), 1, 40).astype(int)
    traces = tuple(_trace(i, int(lengths[i]), "7") for i in range(N_PROBLEMS))
    own = rng.standard_normal((n_layers, N_PROBLEMS, WIDTH), dtype=np.float32)
    states = {
        f"resid_post.{layer + 1}": {
            trace.id: np.repeat(state[None], len(trace.token_ids) - 1, axis=0)
            for trace, state in zip(traces, own[layer], strict=True)
        }
        for layer in range(n_layers)
    }
    return NoiseRun(traces=traces, states=states)


def _by_trace(
    rng: np.random.Generator, traces: Sequence[Trace], n: int, ends: NDArray[np.intp]
) -> dict[str, NDArray[np.float32]]:
    states = np.split(rng.standard_normal((n, WIDTH), dtype=np.float32), ends)
    return {trace.id: own for trace, own in zip(traces, states, strict=True)}


@cache
def _trace(index: int, length: int, answer: str) -> Trace:
    prompt, completion = chat(f"What is balance {index + 10}?", " Wait." * length, answer)
    given, written = _tokenizer().encode(prompt).ids, _tokenizer().encode(completion).ids
    problem = Problem(id=str(index), prompt=prompt, answer="7", meta={"harmful": True})
    return build_trace(
        id=f"{index}/0",
        problem=problem,
        token_ids=given + written,
        n_prompt_tokens=len(given),
        tokenizer=_tokenizer(),
    )


@cache
def _tokenizer() -> Tokenizer:
    return train_tokenizer(tokenizer_texts(0, 50))
