"""Head ablation, and the random heads for comparison."""

from collections.abc import Sequence

from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.interventions import AblationIntervention, ReferenceStates, reference_states
from reasonscope.steering.ablation.targets import Ablation, How
from reasonscope.steering.vectors.scope import Scope


def head_states(model: Model, traces: Sequence[Trace]) -> ReferenceStates:
    """The output of every head at the tokens of `traces`, by site `z.L`: (token, head, d_head), to average or draw
    from."""
    return reference_states(model, traces, [Site("z", layer) for layer in model.layers_with_heads])


def without_heads(
    model: Model,
    heads: Sequence[Head],
    *,
    how: How = "zero",
    bank: ReferenceStates | None = None,
    scope: Scope | None = None,
    seed: int = 0,
) -> AblationIntervention:
    """The intervention that replaces `heads`, at the tokens of `scope` (by default all), by zeros, the mean of `bank`,
    or its states at random tokens.

    Raises InputError for another `how`, a missing `bank`, and a head that the model does not have.
    """
    name = " ".join(map(str, heads))
    ablation = Ablation(name=name, heads=tuple(heads), how=how, scope=scope or Scope())
    return AblationIntervention(model, ablation, bank, seed=seed)
