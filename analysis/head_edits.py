"""Edits that take heads away at `z.L`, what they hand to the output projection: nothing else is rescaled."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from reasonscope.analysis.receiver import Head
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.capture import replay
from reasonscope.probes.model import Model
from reasonscope.probes.sites import Site

How = Literal["zero", "mean", "resample"]


def head_states(model: Model, traces: Sequence[Trace]) -> dict[Site, Tensor]:
    """What every head hands on at the tokens of `traces`, by site `z.L`: (token, head, d_head); to take means of, or draw from."""
    sites = [Site("z", layer) for layer in range(model.n_layers)]
    seen = [replay(model, [trace.token_ids.tolist()], sites)[0] for trace in traces]
    return {site: torch.cat([one[site] for one in seen]) for site in sites}


def without_heads(
    heads: Sequence[Head], *, how: How = "zero", bank: Mapping[Site, Tensor] | None = None, seed: int = 0
) -> dict[Site, Edit]:
    """Edits that put zeros, the mean of `bank`, or its states at random tokens in place of `heads`, at every token.

    Raises InputError for another `how`, or a missing `bank`.
    """
    if how not in get_args(How):
        raise InputError(f"how={how!r}; there are {', '.join(get_args(How))}")
    if how != "zero" and bank is None:
        raise InputError(f"{how} ablation needs states of other tokens; give bank=head_states(model, traces)")
    by_layer: dict[int, list[int]] = {}
    for head in heads:
        by_layer.setdefault(head.layer, []).append(head.index)
    generator = torch.Generator().manual_seed(seed)

    def edit_of(layer: int, own: list[int]) -> Edit:
        states = None if how == "zero" or bank is None else bank[Site("z", layer)][:, own]

        def edit(z: Tensor, where: Positions) -> Tensor:
            after = z.clone()
            if states is None:
                after[:, :, own] = 0.0
            elif how == "mean":
                after[:, :, own] = states.float().mean(dim=0).to(z)
            else:
                drawn = torch.randint(len(states), z.shape[:2], generator=generator)
                after[:, :, own] = states[drawn].to(z)
            return after

        return edit

    return {Site("z", layer): edit_of(layer, sorted(set(own))) for layer, own in by_layer.items()}


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
