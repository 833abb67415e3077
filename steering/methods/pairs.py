"""Pairs of a concise and a verbose answer, made with any model: the same problems answered under two instructions."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder, write_text_durably
from reasonscope.data.summary import Summary, plural
from reasonscope.data.text.answers import CONTROL
from reasonscope.data.text.parse import THINK, build_trace
from reasonscope.data.text.think_tags import regions_from
from reasonscope.data.trace import Message, Problem, Sampling, Trace
from reasonscope.probes.generation.rollout import as_trace, rollouts, trace_seed
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.server.completions import ServerWriter
from reasonscope.steering.methods.asc import CompletionPair

CONCISE = "Be as brief as you can: only the calculations, no explanations."
VERBOSE = "Think step by step and explain every step in detail, in full sentences."


@dataclass(frozen=True, kw_only=True)
class _MadePairs:
    """The same problems answered briefly and at length.

    Attributes:
        pairs: The pairs in which both answers came to their end.
        n_problems: Problems that were asked.
        n_tokens: Mean tokens of the concise and of the verbose answers of the pairs.
        n_right: Right answers among those of the pairs with a gold answer, concise and verbose; None without gold answers.
    """

    pairs: tuple[CompletionPair, ...]
    n_problems: int
    n_tokens: tuple[float, float]
    n_right: tuple[int, int] | None

    def save(self, path: Path) -> None:
        """Write one pair per line, as `load_pairs` reads them."""
        make_folder(path.parent)
        lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in self.pairs]
        write_text_durably(path, "\n".join(lines) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        names = ("concise", "verbose")
        return {
            "n_pairs": len(self.pairs),
            "n_problems": self.n_problems,
            "n_tokens": dict(zip(names, self.n_tokens, strict=True)),
            "n_right": None if self.n_right is None else dict(zip(names, self.n_right, strict=True)),
        }

    def summary(self) -> Summary:
        """How long the two kinds of answers are, and whether they are right."""
        brief, long = self.n_tokens
        left = self.n_problems - len(self.pairs)
        notes = (
            [f"Left out, because an answer was cut off: {plural(left, 'problem')}; ask for more --max-new-tokens."]
            if left
            else []
        )
        if self.n_right is not None:
            notes.append(f"Right: {self.n_right[0]} of the concise answers, {self.n_right[1]} of the verbose ones.")
        if brief >= long:
            notes.append(
                "Warning: the concise answers are not shorter, so a vector of them will not shorten; word the instructions differently."
            )
        return Summary(
            finding=f"{len(self.pairs)} pairs: {brief:.0f} tokens if concise, {long:.0f} if verbose, on average.",
            notes=notes,
        )


def make_pairs(
    model: Prompting,
    problems: Sequence[Problem],
    *,
    concise: str = CONCISE,
    verbose: str = VERBOSE,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    server: ServerWriter | None = None,
) -> _MadePairs:
    """Let a model answer each problem under two instructions, for `asc` and `speed` (`ExtractionData.pairs`, or `--pairs FILE`).

    Args:
        model: Any model; with a server a `Prompting` is enough.
        problems: The problems.
        concise: What follows each question for a brief answer.
        verbose: What follows it for a long one.
        sampling: How to sample; greedy with 512 tokens if None.
        batch_size: Answers that are written together.
        server: Writes the answers in place of the model here.

    Returns:
        The pairs of answers that both came to their end.

    Raises:
        InputError: No problem has two such answers, or there is neither a model with weights nor a server.

    Example:
        made = make_pairs(model, rs.load_problems("problems.jsonl", n=50))
        uses = rs.steering.extract("asc", store, model, pairs=made.pairs)
    """
    how = sampling or Sampling()
    asked = [_instructed(problem, text) for text in (concise, verbose) for problem in problems]
    written = _written(model, asked, how, batch_size, server)
    sides = list(zip(problems, written[: len(problems)], written[len(problems) :], strict=True))
    ended = [(problem, brief, long) for problem, brief, long in sides if _ended(brief) and _ended(long)]
    if not ended:
        raise InputError(
            f"in none of {len(problems)} problems did both answers come to their end within {how.max_new_tokens} tokens; "
            "ask for more (--max-new-tokens)"
        )
    lengths = np.array([[len(trace.token_ids) - trace.n_prompt_tokens for trace in pair[1:]] for pair in ended])
    graded = [pair for pair in ended if pair[0].answer is not None]
    return _MadePairs(
        pairs=tuple(
            CompletionPair(
                question=_question(problem),
                concise=_completion(brief),
                verbose=_completion(long),
                id=problem.group,
                concise_instruction=concise,
                verbose_instruction=verbose,
            )
            for problem, brief, long in ended
        ),
        n_problems=len(problems),
        n_tokens=(float(lengths[:, 0].mean()), float(lengths[:, 1].mean())),
        n_right=(sum(brief.correct is True for _, brief, _ in graded), sum(long.correct is True for *_, long in graded))
        if graded
        else None,
    )


def _written(
    model: Prompting, asked: Sequence[Problem], how: Sampling, batch_size: int, server: ServerWriter | None
) -> list[Trace]:
    """The answer to each problem, by the server if there is one."""
    if server is not None:
        seeds = [trace_seed(how.seed, f"{problem.id}/0") for problem in asked]
        written = server.complete([model.encode_prompt(problem) for problem in asked], how, seeds)
        return [as_trace(model, problem, 0, one, how) for problem, one in zip(asked, written, strict=True)]
    if not isinstance(model, Model):
        raise InputError(f"{model.name} was loaded without weights; give a server, or load the model with load_model")
    return rollouts(model, asked, how, batch_size=batch_size)


def _instructed(problem: Problem, instruction: str) -> Problem:
    """The problem with an instruction after its last message, or at the end of its prompt."""
    if problem.prompt is not None:
        return replace(problem, prompt=f"{problem.prompt.rstrip()}\n{instruction}\n")
    *before, last = problem.messages
    return replace(problem, messages=(*before, Message(role=last.role, content=f"{last.content}\n\n{instruction}")))


def pair_traces(model: Prompting, pairs: Sequence[CompletionPair]) -> list[tuple[Trace, Trace]]:
    """The two sides of each pair as the model read and wrote them: the template's prompt with the instruction, then the completion.

    A completion without closed thinking counts as thinking as a whole.
    """
    return [
        (
            _trace(model, pair, f"{number}/concise", pair.concise, pair.concise_instruction),
            _trace(model, pair, f"{number}/verbose", pair.verbose, pair.verbose_instruction),
        )
        for number, pair in enumerate(pairs)
    ]


def _trace(model: Prompting, pair: CompletionPair, id: str, completion: str, instruction: str) -> Trace:
    plain = (
        Problem(id=id, messages=(Message(role="user", content=pair.question),), group=pair.id or id)
        if model.tokenizer.chat_template
        else Problem(id=id, prompt=pair.question, group=pair.id or id)
    )
    problem = _instructed(plain, instruction) if instruction else plain
    prompt = model.encode_prompt(problem)
    written = model.tokenizer.encode(_after(prompt, completion, model), add_special_tokens=False)
    end = model.tokenizer.eos_token_id
    trace = build_trace(
        id=id,
        problem=problem,
        token_ids=np.array([*prompt, *written, *([] if end is None else [end])]),
        n_prompt_tokens=len(prompt),
        tokenizer=model.tokenizer_backend,
        tags=model.tags or THINK,
        finish_reason="stop",
        model=model.fingerprint,
    )
    closed = trace.state == "closed" and trace.n_thinking_tokens > 0
    return trace if closed else _all_thinking(trace, len(prompt) + len(written))


def _after(prompt: Sequence[int], completion: str, model: Prompting) -> str:
    """The completion, without the opening tag if the prompt has opened the thinking already."""
    opened = model.tags is not None and str(model.tokenizer.decode(list(prompt))).rstrip().endswith(model.tags.open)
    return completion.removeprefix(model.tags.open).lstrip() if opened and model.tags else completion


def _all_thinking(trace: Trace, stop: int) -> Trace:
    """The trace with all that was written up to the token `stop` as its thinking."""
    start = trace.n_prompt_tokens
    at = [int(trace.offsets[token, 0]) if token < len(trace.offsets) else len(trace.text) for token in (start, stop)]
    chars, tokens = (
        regions_from(a, a, b, b, whole)
        for (a, b), whole in ((at, len(trace.text)), ((start, stop), len(trace.token_ids)))
    )
    return replace(trace, chars=chars, tokens=tokens, state="closed", meta={})


def _ended(trace: Trace) -> bool:
    return trace.finish_reason == "stop" and bool(_completion(trace))


def _completion(trace: Trace) -> str:
    """What was written, without control tokens."""
    start = (
        int(trace.offsets[trace.n_prompt_tokens, 0]) if trace.n_prompt_tokens < len(trace.offsets) else len(trace.text)
    )
    return CONTROL.sub("", trace.text[start:]).strip()


def _question(problem: Problem) -> str:
    return problem.prompt.strip() if problem.prompt is not None else problem.messages[-1].content
