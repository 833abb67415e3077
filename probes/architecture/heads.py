"""Attention heads, and random heads to compare them with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reasonscope.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head of a block, both counted from 0."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


def random_heads(
    heads: Sequence[Head], *, n_layers: int, n_heads: int, n_controls: int = 20, seed: int = 0
) -> list[tuple[Head, ...]]:
    """`n_controls` different sets of as many heads as `heads`, none of them among these: the control of an ablation.

    From the same layers, as many of each, where that gives enough different sets; else from all layers. Raises InputError where the
    model has too few heads for that many sets.
    """
    rng, chosen = np.random.default_rng(seed), set(heads)
    everywhere = [Head(layer=layer, index=i) for layer in range(n_layers) for i in range(n_heads)]
    free = [head for head in everywhere if head not in chosen]
    wanted = [head.layer for head in chosen]
    for matched in (True, False):
        found: set[tuple[Head, ...]] = set()
        for _ in range(50 * n_controls):
            if len(found) == n_controls:
                return sorted(found, key=str)
            picked = (
                _draw(free, wanted, rng) if matched else [free[i] for i in rng.permutation(len(free))[: len(chosen)]]
            )
            if picked is not None and len(picked) == len(chosen):
                found.add(tuple(sorted(picked, key=str)))
    raise InputError(
        f"{n_controls} different sets of {len(chosen)} heads are not to be had from {len(everywhere)}; ask for fewer heads or draws"
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
