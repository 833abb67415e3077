"""What a model shows at the ends of its thoughts: the answer it would give, how sure it is, and whether it wants to stop."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from reasonscope.analysis.traces.reflection import find_candidates
from reasonscope.data.arrays import Values
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.text.answers import equivalent
from reasonscope.data.text.steps_and_sentences import classify_step
from reasonscope.data.trace import Sampling, Sentence, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.branches import Writer
from reasonscope.probes.generation.forced_answers import closing_stub, forced_answers
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.unembedding import Unembedding

_READ_TOKENS = 4096  # of one pass that reads the margin, with padding


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitSignals:
    """What is known at each cut of a trace's thinking, (cut,) unless said otherwise.

    Attributes:
        trace: The id of the trace.
        group: The group of its problem.
        cuts: Tokens of the trace before the cut, ascending, int64.
        spent: Tokens of thinking that were written before the cut, int64.
        answers: The answer that was forced there, None if it gave none.
        right: Whether that answer is right.
        confidence: How likely the model found the tokens of that answer: their geometric mean probability.
        trial: Tokens that forcing the answer took, with those that close the thinking.
        margin: Log-probability of the likeliest tokens minus that of closing the thinking, nats; NaN without a tag.
        transition: Whether the model doubts, checks or tries another way next.
        candidates: How many answers the thinking has stated so far.
        score: What a probe says there; NaN without one.
        total: Tokens of the whole thinking (scalar).
        finished: Whether the trace's own answer is right (scalar).
    """

    trace: str
    group: str
    cuts: NDArray[np.int64]
    spent: NDArray[np.int64]
    answers: tuple[str | None, ...]
    right: NDArray[np.bool_]
    confidence: Values
    trial: NDArray[np.int64]
    margin: Values
    transition: NDArray[np.bool_]
    candidates: NDArray[np.int64]
    score: Values
    total: int
    finished: bool

    def with_score(self, score: Values) -> "ExitSignals":
        """The same with what a probe says at each cut."""
        return replace(self, score=score)


@dataclass(frozen=True, kw_only=True)
class ExitPoints:
    """Where a trace's thinking is cut: `cuts` (cut,), whether a doubt follows, and the answers stated by then."""

    cuts: tuple[int, ...]
    transition: tuple[bool, ...]
    candidates: tuple[int, ...]


def exit_points(trace: Trace, *, most: int = 16) -> ExitPoints:
    """The ends of the paragraphs of the thinking, or of its sentences if it has one paragraph; if there are more than `most`, some of
    them, evenly spread. The end of the whole thinking is not one."""
    whole = cut_trace(trace)
    thoughts = _thoughts(whole.sentences, whole.steps)
    ends = list(range(len(thoughts) - 1))
    if len(ends) > most:
        ends = sorted({int(i) for i in np.linspace(0, len(ends) - 1, most).round()})
    stated = [candidate.sentence for candidate in find_candidates(whole.sentences, None)]
    return ExitPoints(
        cuts=tuple(thoughts[i][-1].tokens.stop for i in ends),
        transition=tuple(classify_step(_text(thoughts[i + 1])) != "execution" for i in ends),
        candidates=tuple(sum(at <= thoughts[i][-1].index for at in stated) for i in ends),
    )


def exit_signals(
    model: Model, writer: Writer, trace: Trace, *, most: int = 16, sampling: Sampling | None = None
) -> ExitSignals:
    """Force an answer at every cut of a trace, and read how near the model is to closing its thinking there.

    Args:
        model: The model that wrote the trace.
        writer: Writes the answers: a `PrefixWriter` of the model, or a server of it.
        trace: A trace with tokens, thinking, and a gold answer.
        most: Cuts per trace.
        sampling: How to sample the answers; one greedy answer of at most 32 tokens by default.

    Returns:
        The signals; `score` is NaN, see `ExitSignals.with_score`.

    Raises:
        InputError: For a trace without tokens.

    DEER (arXiv 2504.15895), section 3, for the confidence; ThinkBrake (arXiv 2510.00546) for the margin.

    Departures: the margin is of all tokens that close the thinking (a newline and the tag, for most templates), so that it does not depend
        on where a tokenizer puts the newline.

    Example:
        signals = exit_signals(model, PrefixWriter(model), store.trace("p1/0"))
        signals.spent[signals.right][:1]  # after so many tokens it knew the answer
    """
    points = exit_points(trace, most=most)
    stub = closing_stub(trace, model.encode_continuation, thinking=model.thinking)
    forced = forced_answers(writer, trace, points.cuts, stub, model.decode, sampling=sampling)
    answers = tuple(row[0] for row in forced.answers)
    places = trace.thinking_positions
    written = places[places >= trace.n_prompt_tokens]
    return ExitSignals(
        trace=trace.id,
        group=trace.problem.group,
        cuts=np.array(points.cuts, dtype=np.int64),
        spent=np.searchsorted(written, points.cuts).astype(np.int64),
        answers=answers,
        right=np.array([equivalent(answer, trace.problem.answer or "") for answer in answers], dtype=bool),
        confidence=forced.confidence,
        trial=(forced.tokens + len(stub)).astype(np.int64),
        margin=_margins(model, trace, points.cuts, _closing(model, trace)),
        transition=np.array(points.transition, dtype=bool),
        candidates=np.array(points.candidates, dtype=np.int64),
        score=np.full(len(points.cuts), np.nan),
        total=len(written),
        finished=trace.correct is True,
    )


def _thoughts(sentences: Sequence[Sentence], steps: Sequence[int]) -> list[list[Sentence]]:
    """The sentences of each paragraph; each sentence alone if there is one paragraph."""
    several = len(set(steps)) > 1
    found: dict[int, list[Sentence]] = {}
    for sentence, step in zip(sentences, steps, strict=True):
        found.setdefault(step if several else sentence.index, []).append(sentence)
    return list(found.values())


def _text(sentences: Sequence[Sentence]) -> str:
    return " ".join(sentence.text for sentence in sentences)


def _closing(model: Model, trace: Trace) -> list[int]:
    """The tokens that close the thinking, up to the tag; none for reasoning in the open."""
    if model.tags is None:
        return []
    text = trace.text[trace.chars.close.slice].rstrip() if trace.state == "closed" else f"\n{model.tags.close}"
    return model.encode_continuation(text)


def _margins(model: Model, trace: Trace, cuts: Sequence[int], closing: Sequence[int]) -> Values:
    """log p(likeliest) − log p(closing) at each cut, summed over the tokens that close, (cut,); NaN without such tokens."""
    found = np.full(len(cuts), np.nan)
    group: list[int] = []
    for i in range(len(cuts) if closing else 0):
        if group and (len(group) + 1) * (cuts[i] + len(closing)) > _READ_TOKENS:
            found[group] = _margin(model, trace, [cuts[j] for j in group], closing)
            group = []
        group.append(i)
    if group:
        found[group] = _margin(model, trace, [cuts[j] for j in group], closing)
    return found


def _margin(model: Model, trace: Trace, cuts: Sequence[int], closing: Sequence[int]) -> Values:
    """The margins at some cuts, by one pass over the prefixes, each followed by the tokens that close the thinking."""
    last = Site("resid_post", model.n_layers - 1)
    ids, mask = left_padded([[*trace.token_ids[:cut].tolist(), *closing] for cut in cuts], model.device)
    states = model.backend.forward(ids, mask=mask, last_logits_only=True, read=[last]).activations[last]
    norm, unembedding = model.final_norm, Unembedding.of(model)
    n, margin = len(closing), torch.zeros(len(cuts))
    with torch.no_grad():
        for k, token in enumerate(closing):
            logits = unembedding.logits(norm(states[:, k - n - 1]))
            margin += (logits.amax(dim=-1) - logits[:, token]).cpu()
    return margin.numpy().astype(np.float64)
