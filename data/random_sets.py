"""Random sets of things to compare a chosen set with: all different, so that a p-value counts each of them once."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Pool(Generic[T]):
    """`size` members are drawn from `members`, without replacement."""

    members: Sequence[T]
    size: int


def distinct_sets(pools: Sequence[Pool[T]], n: int, *, seed: int | np.random.Generator = 0) -> list[tuple[T, ...]]:
    """At most `n` different sets, each with as many members of each pool as the pool says; every set is equally likely.

    Args:
        pools: The members to draw from; no member is in two pools.
        n: How many sets to draw.
        seed: Seed or generator of the draw.

    Returns:
        `n` different sets in random order; all sets there are, if that is not more than `n`; none if a pool has too few members.
    """
    if (count := n_sets(pools)) <= n:
        return [sum(parts, ()) for parts in product(*(combinations(pool.members, pool.size) for pool in pools))]
    assert count > 0
    rng = np.random.default_rng(seed)
    found: dict[frozenset[T], tuple[T, ...]] = {}
    while len(found) < n:
        drawn = tuple(pool.members[i] for pool in pools for i in rng.permutation(len(pool.members))[: pool.size])
        found.setdefault(frozenset(drawn), drawn)
    return [*found.values()]


def n_sets(pools: Sequence[Pool[T]]) -> int:
    """How many different sets `distinct_sets` could draw."""
    return prod(comb(len(pool.members), pool.size) for pool in pools)


def smallest_p(n_controls: int) -> float:
    """The smallest p-value that so many different controls can give: 1 / (1 + n)."""
    return 1 / (1 + n_controls)
