"""Heads taken away by the ablation of `steering.ablation`, and the random others that they are compared with."""

from collections.abc import Sequence

import numpy as np

from reasonscope.analysis.attention.vertical_scores import Head
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.ablation import Ablation, Bank, How, Replacing, reference_states
from reasonscope.steering.vectors.scope import Scope


def head_states(model: Model, traces: Sequence[Trace]) -> Bank:
    """What every head hands on at the tokens of `traces`, by site `z.L`: (token, head, d_head); to take means of, or draw from."""
    return reference_states(model, traces, [Site("z", layer) for layer in range(model.n_layers)])


def without_heads(
    model: Model,
    heads: Sequence[Head],
    *,
    how: How = "zero",
    bank: Bank | None = None,
    scope: Scope | None = None,
    seed: int = 0,
) -> Replacing:
    """The intervention that puts zeros, the mean of `bank`, or its states at random tokens in place of `heads`, at the tokens of `scope`
    (all where not given).

    Raises InputError for another `how`, a missing `bank`, and a head that the model does not have.
    """
    taken = tuple((head.layer, head.index) for head in heads)
    return Replacing(
        model, Ablation(name=" ".join(map(str, heads)), heads=taken, how=how, scope=scope or Scope()), bank, seed=seed
    )


def random_heads(model: Model, heads: Sequence[Head], *, draws: int = 20, seed: int = 0) -> list[tuple[Head, ...]]:
    """`draws` different sets of as many heads as `heads`, none of them among these: the control of an ablation.

    From the same layers, as many of each, where that gives enough different sets; else from all layers. Raises InputError where the
    model has too few heads for that many sets.
    """
    rng, chosen = np.random.default_rng(seed), set(heads)
    everywhere = [Head(layer=layer, index=i) for layer in range(model.n_layers) for i in range(model.n_heads)]
    free = [head for head in everywhere if head not in chosen]
    wanted = [head.layer for head in chosen]
    for matched in (True, False):
        found: set[tuple[Head, ...]] = set()
        for _ in range(50 * draws):
            if len(found) == draws:
                return sorted(found, key=str)
            picked = (
                _draw(free, wanted, rng) if matched else [free[i] for i in rng.permutation(len(free))[: len(chosen)]]
            )
            if picked is not None and len(picked) == len(chosen):
                found.add(tuple(sorted(picked, key=str)))
    raise InputError(
        f"{draws} different sets of {len(chosen)} heads are not to be had from {len(everywhere)}; ask for fewer heads or draws"
    )


def _draw(free: Sequence[Head], wanted: Sequence[int], rng: np.random.Generator) -> list[Head] | None:
    """As many heads of each layer as wanted, or None where a layer has too few left."""
    picked: list[Head] = []
    for layer in sorted(set(wanted)):
        own, n = [head for head in free if head.layer == layer], wanted.count(layer)
        if len(own) < n:
            return None
        picked += [own[i] for i in rng.permutation(len(own))[:n]]
    return picked
