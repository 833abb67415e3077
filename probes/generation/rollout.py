"""Completions as traces: let a model answer problems, or continue from reasoning that was begun for it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from transformers import LogitsProcessor

from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.progress import working
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit
from reasonscope.probes.generation.decoding import BatchProgress, Completion, DecodingStep, generate
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.prompting import Prompting

# From prompts and seeds to completions: a decoding loop that replaces `generate`.
Decode: TypeAlias = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Completion]]


def rollouts(
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = 32,
    think: bool | None = None,
    open_tag: bool | None = None,
    prefill: str | Sequence[str] = "",
    write: Mapping[Site, Edit] | None = None,
    on_step: Callable[[DecodingStep], None] | None = None,
    processors: Sequence[LogitsProcessor] = (),
    decode: Decode | None = None,
) -> list[Trace]:
    """Let a model answer problems, without storing anything.

    The seed of a trace depends on `sampling.seed` and on its id `problem/sample`. So a problem gets the same random draws with an edit
    and without, in any batch.

    Args:
        model: The model.
        problems: The problems.
        sampling: How to sample.
        samples: Completions of each problem.
        batch_size: Completions that are written together; at least one per prefill.
        think: False closes the thinking block at once; as `model.prompt` says if None.
        open_tag: Append the opening tag to the prompt, for models that forget it; as `model.prompt` says if None.
        prefill: Text after the opening tag, which counts as prompt. Several prefills give several sets of traces; each batch then holds
            its prompts with every prefill.
        write: Edits by site while the model reads and writes.
        on_step: Called before each forward pass.
        processors: Logits processors, as `generate` takes them.
        decode: A decoding loop that replaces `generate`, without edits and processors.

    Returns:
        The traces in the order of the problems, with their samples together; those of the first prefill come first.

    Raises:
        InputError: If a prompt cannot be fed.
        ContextError: If a prompt leaves no room in the context.

    Example:
        problems = rs.load_problems("ledger", n=8)
        traces = rs.probes.rollouts(model, problems, rs.Sampling(temperature=0.7))
        print(sum(trace.correct is True for trace in traces), "of 8 are right")
    """
    prefills = (prefill,) if isinstance(prefill, str) else tuple(prefill)
    asked = [(problem, sample) for problem in problems for sample in range(samples)]
    prompts = [asked_of(model, asked, think=think, open_tag=open_tag, prefill=text) for text in prefills]
    order = sorted(range(len(asked)), key=lambda i: len(prompts[0][i]))
    traces: dict[tuple[int, int], Trace] = {}
    at_once = max(1, batch_size // len(prefills))
    total = len(order) * len(prefills)
    with working("writing", total=total, unit="answers") as work:
        progress = BatchProgress(work, total, sampling.max_new_tokens)
        follow = both(on_step, progress.on_step)
        for start in range(0, len(order), at_once):
            batch = [(copy, i) for copy in range(len(prefills)) for i in order[start : start + at_once]]
            seeds = [trace_seed(sampling.seed, f"{asked[i][0].id}/{asked[i][1]}") for _, i in batch]
            together = [prompts[copy][i] for copy, i in batch]
            if decode is not None:
                completions = decode(together, seeds)
            else:
                completions = generate(
                    model, together, sampling, seeds=seeds, write=write, on_step=follow, processors=processors
                )
            for (copy, i), completion, seed in zip(batch, completions, seeds, strict=True):
                traces[copy, i] = as_trace(model, *asked[i], completion, replace(sampling, seed=seed))
            progress.batch_done(len(batch))
    return [traces[copy, i] for copy in range(len(prefills)) for i in range(len(asked))]


def continuations(
    model: Model, begun: Sequence[tuple[Trace, str]], sampling: Sampling, *, batch_size: int = 32
) -> list[Trace]:
    """Let a model continue from reasoning that replaces the reasoning of a trace.

    The text is tokenised by itself and appended to the tokens of the prompt, so it has to end where a token ends: inside a sentence,
    and not at a full stop that would have merged with the blank line after it.

    Args:
        model: The model.
        begun: Pairs of a trace, whose prompt is used, and the reasoning to begin with.
        sampling: How to sample; the seed of each continuation also depends on the id of its trace.
        batch_size: Continuations that are written together.

    Returns:
        One trace per pair. The given text counts as generated, with NaN for its log-probabilities and entropies.

    Raises:
        InputError: If a trace has no thinking block.
        ContextError: If prompt and text leave no room in the context.

    Example:
        begun = [(trace, "Okay, the total is 7. Wait,") for trace in traces]
        again = rs.probes.continuations(model, begun, rs.Sampling(temperature=0.7))
        print([trace.final_answer for trace in again])
    """
    prompts, given = [], []
    for trace, text in begun:
        if trace.state not in ("closed", "truncated"):
            raise InputError(f"trace {trace.id!r} has no thinking block to replace; leave it out")
        start = trace.tokens.thinking.start
        prompts.append([*trace.token_ids[:start].tolist(), *model.tokenizer.encode(text, add_special_tokens=False)])
        given.append(min(trace.n_prompt_tokens, start))  # the text replaces the prefill, if there was one
    traces = []
    with working("writing", total=len(begun), unit="continuations") as work:
        progress = BatchProgress(work, len(begun), sampling.max_new_tokens)
        for start in range(0, len(begun), batch_size):
            batch = range(start, min(start + batch_size, len(begun)))
            seeds = [trace_seed(sampling.seed, begun[i][0].id) for i in batch]
            chosen = [prompts[i] for i in batch]
            completions = generate(model, chosen, sampling, seeds=seeds, on_step=progress.on_step)
            for i, seed, done in zip(batch, seeds, completions, strict=True):
                origin, whole = begun[i][0], counting_begun(done, given[i])
                traces.append(as_trace(model, origin.problem, origin.sample, whole, replace(sampling, seed=seed)))
            progress.batch_done(len(batch))
    return traces


def asked_of(model: Prompting, asked: Sequence[tuple[Problem, int]], **how: Any) -> list[list[int]]:
    """The prompt of each problem and sample, as `encode_prompt` makes it. Raises ContextError if one leaves no room in the context."""
    prompts = [model.encode_prompt(problem, **how) for problem, _ in asked]
    for (problem, _), prompt in zip(asked, prompts, strict=True):
        check_fits(model, problem, prompt)
    return prompts


def both(
    first: Callable[[DecodingStep], None] | None, second: Callable[[DecodingStep], None]
) -> Callable[[DecodingStep], None]:
    """A listener that calls both."""
    if first is None:
        return second

    def on_step(step: DecodingStep) -> None:
        first(step)
        second(step)

    return on_step


def counting_begun(done: Completion, n_prompt_tokens: int) -> Completion:
    """The continuation, with the text that was begun for it after `n_prompt_tokens` counted as generated."""
    unknown = np.full(done.n_prompt_tokens - n_prompt_tokens, np.nan, dtype=np.float32)
    return replace(
        done,
        n_prompt_tokens=n_prompt_tokens,
        logprobs=np.concatenate([unknown, done.logprobs]),
        entropies=np.concatenate([unknown, done.entropies]),
    )


def as_trace(model: Prompting, problem: Problem, sample: int, completion: Completion, sampling: Sampling) -> Trace:
    """The completion of a problem as a trace with its regions and the id `problem/sample`."""
    return build_trace(
        id=f"{problem.id}/{sample}",
        problem=problem,
        token_ids=completion.token_ids,
        n_prompt_tokens=completion.n_prompt_tokens,
        tokenizer=model.tokenizer_backend,
        thinking=model.thinking,
        finish_reason=completion.finish_reason,
        sample=sample,
        sampling=sampling,
        model=model.fingerprint,
        logprobs=completion.logprobs,
        entropies=completion.entropies,
    )


def check_fits(model: Prompting, problem: Problem, prompt: Sequence[int]) -> None:
    """Raise ContextError if a prompt leaves no room to answer."""
    if len(prompt) >= model.context_length:
        raise ContextError(
            f"problem {problem.id!r} has {len(prompt)} tokens and the context of {model.name} holds "
            f"{model.context_length}; leave it out or shorten it"
        )


def trace_seed(seed: int, id: str) -> int:
    """The seed of the trace `id` in a run with `seed`: 63 bits of a hash of both."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8]) >> 1
