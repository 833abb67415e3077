"""Forced answers: cut the thinking, close it, and see what the model would answer now."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.progress import working
from reasonscope.data.text.answers import equivalent, extract_answer
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Sampling, Trace
from reasonscope.probes.generation.branches import Branch, Writer
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.generation.rollout import trace_seed

FINAL = "The answer is \\boxed{"

# `Prompting.encode_continuation` and `Prompting.decode`.
Encoder = Callable[[str], list[int]]
Decoder = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True, eq=False)
class ForcedAnswers:
    """The answers at each cut: `answers[cut][sample]`, None if the box was never closed.

    `cuts` (cut,) in tokens of the trace. `correct` and `own` (cut,): share of the samples that give the gold answer,
    and the trace's own final answer; a sample without an answer gives neither. NaN if there is nothing to compare with.
    `confidence` (cut,): geometric mean probability of the tokens of the answer up to the end of its box, at the sampling temperature (1
    if greedy), and `tokens` (cut,) how many those are; means over samples.
    """

    cuts: tuple[int, ...]
    answers: tuple[tuple[str | None, ...], ...]
    correct: NDArray[np.float64]
    own: NDArray[np.float64]
    confidence: NDArray[np.float64]
    tokens: NDArray[np.float64]


def closing_stub(
    trace: Trace, encode: Encoder, *, thinking: Thinking | None = None, final: str = FINAL
) -> tuple[int, ...]:
    """The tokens that close the thinking and open the answer's box: the trace's own close window if it has one.

    Reasoning in the open is closed by a blank line, because the box itself states the answer.
    """
    how = thinking or Thinking()
    close = trace.text[trace.chars.close.slice] if trace.state == "closed" and how.mode == "tags" else how.closing
    return tuple(int(i) for i in encode(f"{close}{final}"))


@working("forcing answers")
def forced_answers(
    writer: Writer,
    trace: Trace,
    cuts: Sequence[int],
    stub: Sequence[int],
    decode: Decoder,
    *,
    samples: int = 1,
    sampling: Sampling | None = None,
) -> ForcedAnswers:
    r"""Answers after the first `cuts` tokens of a trace followed by `stub`, joined as tokens: nothing is tokenised
    again.

    `stub` ends inside \boxed{. Without `sampling`, one greedy answer of at most 32 tokens; all samples of all cuts
    share the prefix's keys and values (see `PrefixWriter`). Used by forced importance (Thought Anchors), premature
    confidence (arXiv 2605.24396) and early exits. Raises InputError for a trace without tokens, and whatever the writer
    raises.
    """
    if not len(trace.token_ids):
        raise InputError(f"trace {trace.id!r} has no tokens; import it with the model's tokenizer")
    sampling = sampling or Sampling(temperature=0.0, max_new_tokens=32)
    if sampling.temperature == 0 and samples > 1:
        raise InputError(f"{samples} greedy samples would all be the same; give a temperature, or one sample")
    branches = [
        Branch(cut=cut, stub=tuple(stub), seed=trace_seed(sampling.seed, f"{trace.id}/forced/{cut}/{sample}"))
        for cut in cuts
        for sample in range(samples)
    ]
    done = writer(trace.token_ids.tolist(), branches, sampling)
    read = [answer_in_box(c, decode) for c in done]
    found = [answer for answer, _ in read]
    sure = [float(np.exp(c.logprobs[:n].mean())) for c, (_, n) in zip(done, read, strict=True)]
    answers = tuple(tuple(found[i * samples : (i + 1) * samples]) for i in range(len(cuts)))
    return ForcedAnswers(
        cuts=tuple(cuts),
        answers=answers,
        correct=_share(answers, trace.problem.answer),
        own=_share(answers, trace.final_answer),
        confidence=np.reshape(sure, (len(cuts), samples)).mean(axis=1),
        tokens=np.reshape([float(n) for _, n in read], (len(cuts), samples)).mean(axis=1),
    )


def answer_in_box(completion: Completion, decode: Decoder) -> tuple[str | None, int]:
    """The answer in the box that a completion was begun in, and how many tokens it took until the box was closed."""
    ids = completion.token_ids[completion.n_prompt_tokens :].tolist()
    for n in range(1, len(ids) + 1):
        if (answer := _boxed_answer("\\boxed{" + decode(ids[:n]))) is not None:
            return answer, n
    return None, len(ids)


def _boxed_answer(text: str) -> str | None:
    """The content of the box that `text` begins in; None if it is never closed."""
    depth = 0
    for position, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "}" and depth == 0:
            return extract_answer(text[: position + 1])
    return None


def _share(answers: Sequence[Sequence[str | None]], wanted: str | None) -> NDArray[np.float64]:
    if wanted is None:
        return np.full(len(answers), np.nan)
    return np.array([np.mean([equivalent(answer, wanted) for answer in samples]) for samples in answers])
