"""Random sets of things to compare a chosen set with: all different, so that a p-value counts each of them once."""

from collections.abc import Hashable, Iterable, Sequence
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

    The first `n_disjoint` share no member, so a p-value over these is exact. Further sets overlap: if they hold none of a set that is above
    average, they are all below it together. All sets come in random order if there are no more than `n`; none if a pool is too small.
    """
    rng = np.random.default_rng(seed)
    found = {frozenset(one): one for one in _partition(pools, rng)[:n]}
    if _n_sets(pools) <= n:
        every = product(*(combinations(pool.members, pool.size) for pool in pools))
        return [*(found | {frozenset(one): one for parts in every if (one := sum(parts, ()))}).values()]
    while len(found) < n:
        drawn = tuple(pool.members[i] for pool in pools for i in rng.permutation(len(pool.members))[: pool.size])
        found.setdefault(frozenset(drawn), drawn)
    return [*found.values()]


def _partition(pools: Sequence[Pool[T]], rng: np.random.Generator) -> list[tuple[T, ...]]:
    """As many sets as fit into the pools without sharing a member, at random."""
    shuffled = [[pool.members[i] for i in rng.permutation(len(pool.members))] for pool in pools]
    n = min((len(pool.members) // pool.size for pool in pools if pool.size), default=0)
    parts = [
        [own[k * pool.size : (k + 1) * pool.size] for pool, own in zip(pools, shuffled, strict=True)] for k in range(n)
    ]
    return [tuple(member for part in one for member in part) for one in parts]


def n_disjoint(sets: Sequence[Iterable[Hashable]]) -> int:
    """How many of `sets`, from the first on, share no member with an earlier one."""
    seen: set[Hashable] = set()
    for n, one in enumerate(map(set, sets)):
        if seen & one:
            return n
        seen |= one
    return len(sets)


def _n_sets(pools: Sequence[Pool[T]]) -> int:
    """How many different sets `distinct_sets` could draw."""
    return prod(comb(len(pool.members), pool.size) for pool in pools)


def smallest_p(n_controls: int) -> float:
    """The smallest p-value that so many different controls can give: 1 / (1 + n)."""
    return 1 / (1 + n_controls)
