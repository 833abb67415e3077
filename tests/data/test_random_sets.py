"""Random sets are all different, all there are if that is few, and evenly drawn."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from reasonscope.data.random_sets import Pool, _n_sets, distinct_sets, n_disjoint, smallest_p


def test_all_sets_are_listed_if_there_are_few():
    pools = [Pool(members="abc", size=1), Pool(members="xyz", size=2)]
    assert _n_sets(pools) == 9
    found = {frozenset(one) for one in distinct_sets(pools, 20)}
    assert found == {frozenset(a + pair) for a in "abc" for pair in ("xy", "xz", "yz")}
    assert distinct_sets(pools, 9) == distinct_sets(pools, 20)
    assert distinct_sets([Pool(members="a", size=1)], 0) == []
    assert distinct_sets([Pool(members="ab", size=3)], 5) == []


@pytest.mark.parametrize(("members", "size", "n"), [(4, 2, 5), (8, 3, 20), (16, 1, 10)])
def test_sets_are_different_and_every_member_is_as_likely(members, size, n):
    drawn = [distinct_sets([Pool(members=range(members), size=size)], n, seed=seed) for seed in range(500)]
    assert all(len({frozenset(one) for one in sets}) == n for sets in drawn)
    first = Counter(member for sets in drawn for member in sets[0])
    assert chisquare([first[i] for i in range(members)]).pvalue > 0.001
    counts = np.array([[sum(i in one for one in sets) for i in range(members)] for sets in drawn])
    assert np.allclose(counts.mean(axis=0), n * size / members, rtol=0.1)


def test_the_seed_decides_the_draw():
    pool = [Pool(members=range(30), size=4)]
    assert distinct_sets(pool, 6, seed=1) == distinct_sets(pool, 6, seed=1) != distinct_sets(pool, 6, seed=2)
    assert distinct_sets(pool, 6) == distinct_sets(pool, 6, seed=0)


def test_few_controls_bound_the_p_value():
    assert (smallest_p(3), smallest_p(19)) == (1 / 4, 1 / 20)


def test_the_first_sets_share_no_member_and_are_as_many_as_fit():
    for pools, fit in (
        ([Pool(members=range(12), size=4)], 3),
        ([Pool(members=range(5), size=2)], 2),
        ([Pool(members="abcd", size=2), Pool(members=range(3), size=1)], 2),
    ):
        for n in (20, 1000):
            sets = distinct_sets(pools, n, seed=3)
            assert n_disjoint(sets) == fit
            assert len(sets) == min(n, _n_sets(pools)) == len({frozenset(one) for one in sets})
    assert n_disjoint([]) == 0
    assert n_disjoint([(1,), (2,), (1, 3), (4,)]) == 2
