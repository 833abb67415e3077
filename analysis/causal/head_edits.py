"""Heads taken away by the ablation of `steering.ablation`, and the random others that they are compared with."""

from collections.abc import Sequence

from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.ablation import (
    Ablation,
    AblationIntervention,
    How,
    ReferenceStates,
    reference_states,
)
from reasonscope.steering.vectors.scope import Scope


def head_states(model: Model, traces: Sequence[Trace]) -> ReferenceStates:
    """What every head hands on at the tokens of `traces`, by site `z.L`: (token, head, d_head); to take means of, or draw from."""
    return reference_states(model, traces, [Site("z", layer) for layer in range(model.n_layers)])


def without_heads(
    model: Model,
    heads: Sequence[Head],
    *,
    how: How = "zero",
    bank: ReferenceStates | None = None,
    scope: Scope | None = None,
    seed: int = 0,
) -> AblationIntervention:
    """The intervention that puts zeros, the mean of `bank`, or its states at random tokens in place of `heads`, at the tokens of `scope`
    (all where not given).

    Raises InputError for another `how`, a missing `bank`, and a head that the model does not have.
    """
    name = " ".join(map(str, heads))
    ablation = Ablation(name=name, heads=tuple(heads), how=how, scope=scope or Scope())
    return AblationIntervention(model, ablation, bank, seed=seed)
