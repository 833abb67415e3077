"""Arms of a generation experiment: the same problems and draws in each, and accuracy beside length, with the controls' range."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.data.arrays import Values
from reasonscope.data.intervals import mean_estimate
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.generation.rollout import as_trace, check_fits, trace_seed
from reasonscope.probes.models.model import Model

# Prompts and their seeds to completions: a way to decode.
Complete = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Completion]]


def compare_arms(
    method: str, arms: Mapping[str, Sequence[Trace]], *, seed: int, numbers: Mapping[str, object]
) -> Result:
    """Accuracy and generated tokens of each arm, axes (arm, metric); the null is the range of the arms whose name begins with random."""
    rows = {
        name: np.array([[float(bool(t.correct)), len(t.token_ids) - t.n_prompt_tokens] for t in traces])
        for name, traces in arms.items()
    }
    groups = [trace.problem.group for trace in next(iter(arms.values()))]
    values, ends = estimates(rows, groups)
    random = np.stack([row.mean(axis=0) for name, row in rows.items() if name.startswith("random")])
    return Result(
        method=method,
        quantity="accuracy and generated tokens",
        unit="1 (accuracy), tokens",
        axes=(Axis.of("arm", arms), Axis.of("metric", ("accuracy", "tokens"))),
        values=values,
        null=Band.of(random.min(axis=0), random.max(axis=0), values.shape, f"range of {len(random)} random controls"),
        interval=Band.of(ends[0], ends[1], values.shape, "over problems, 95%"),
        numbers=numbers,
        provenance={"seed": seed, "traces": len(groups)},
    )


def estimates(rows: Mapping[str, Values], groups: Sequence[str]) -> tuple[Values, Values]:
    """Means (arm, metric) and interval ends (2, arm, metric) over problems."""
    values = np.stack([row.mean(axis=0) for row in rows.values()])
    ends = np.empty((2, *values.shape))
    for i, row in enumerate(rows.values()):
        for j in range(values.shape[1]):
            ends[:, i, j] = mean_estimate(row[:, j], groups=groups).interval
    return values, ends


def answered(
    model: Model, problems: Sequence[Problem], sampling: Sampling, batch_size: int, complete: Complete
) -> list[Trace]:
    """One trace a problem, in batches, with seeds that follow from the problem alone: the same draws in every arm."""
    traces = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = [model.encode_prompt(problem) for problem in batch]
        for problem, prompt in zip(batch, prompts, strict=True):
            check_fits(model, problem, prompt)
        seeds = [trace_seed(sampling.seed, f"{problem.id}/0") for problem in batch]
        done = complete(prompts, seeds)
        for problem, completion, seed in zip(batch, done, seeds, strict=True):
            traces.append(as_trace(model, problem, 0, completion, replace(sampling, seed=seed)))
    return traces
