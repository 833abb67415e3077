"""What steering does to how long a model thinks and how often it is right, beside what a random direction does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.evaluate import Estimate, Values, cluster_bootstrap
from reasonscope.probes.model import Model
from reasonscope.probes.rollout import rollouts
from reasonscope.steering.apply import Steering
from reasonscope.steering.scope import Scope
from reasonscope.steering.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run the same problems with the same seeds.

    `tokens` and `accuracy` are means with intervals over problems; `change` is the mean change of thinking tokens against the
    unsteered arm as a share of its mean, paired by problem (0 for that arm itself). `touched` counts the tokens edited.
    """

    name: str
    multiplier: float
    n_problems: int
    tokens: Estimate
    accuracy: Estimate
    change: Estimate
    touched: int


def compare(
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    vectors: Mapping[str, tuple[SteeringVector, float]],
    *,
    scope: Scope,
    batch_size: int = 32,
) -> list[Arm]:
    """Run `problems` unsteered (arm `base`, first) and with each vector at its multiplier; same seeds in every arm.

    Use problems that the vectors were not made from. Raises InputError where a vector touched no token.
    """
    base = rollouts(model, problems, sampling, batch_size=batch_size)
    arms = [_arm("base", 0.0, base, base, 0)]
    for name, (vector, multiplier) in vectors.items():
        steering = Steering(vector, multiplier, scope)
        steered = rollouts(
            model, problems, sampling, batch_size=batch_size, write=steering.edits, on_step=steering.on_step
        )
        if steering.touched == 0:
            raise InputError(f"{name} touched no token: nothing that was given or generated lies in its scope")
        arms.append(_arm(name, multiplier, base, steered, steering.touched))
    return arms


def _arm(name: str, multiplier: float, base: Sequence[Trace], steered: Sequence[Trace], touched: int) -> Arm:
    before, after = _tokens(base), _tokens(steered)
    right = np.array([bool(trace.correct) for trace in steered], dtype=np.float64)
    groups = [trace.problem.group for trace in base]
    return Arm(
        name=name,
        multiplier=multiplier,
        n_problems=len(set(groups)),
        tokens=cluster_bootstrap(lambda _, tokens: float(tokens.mean()), before, after, groups),
        accuracy=cluster_bootstrap(lambda _, share: float(share.mean()), right, right, groups),
        change=cluster_bootstrap(lambda a, b: float(b.mean() / a.mean() - 1), before, after, groups),
        touched=touched,
    )


def _tokens(traces: Sequence[Trace]) -> Values:
    return np.array([trace.n_thinking_tokens for trace in traces], dtype=np.float64)
