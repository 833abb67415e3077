"""Intervals are as wide as what is known of few values, and p-values count the draws that do as well."""

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest, norm, t

from reasonscope.data.errors import InputError
from reasonscope.data.intervals import (
    Resamples,
    difference_estimate,
    mean_estimate,
    permutation_p,
    resample_groups,
    shares_difference,
    tails,
    wilson_half_width,
    wilson_interval,
)


def test_an_interval_from_few_groups_is_as_wide_as_students():
    assert tails(10) == pytest.approx((0.0085506, 0.9914494), abs=1e-6)  # of a normal distribution at 2.2622 √(10/9)
    assert tails(10**6) == pytest.approx((0.025, 0.975), abs=1e-6)
    assert tails(10**6, 0.5) == pytest.approx((0.25, 0.75), abs=1e-6)


def test_resamples_drawn_once_are_those_of_each_bootstrap():
    rng = np.random.default_rng(0)
    groups, values, weights = [f"{i % 7}" for i in range(30)], rng.standard_normal(30), rng.random(30)
    values[[3, 9]] = np.nan

    def mean(rows):
        given = rows[np.isfinite(values[rows])]
        return float(np.average(values[given], weights=weights[given]))

    resamples = Resamples(groups)
    one_by_one, at_once = resample_groups(mean, groups), resamples.estimate(resamples.means(values, weights))
    assert (at_once.value, *at_once.interval) == pytest.approx((one_by_one.value, *one_by_one.interval))
    assert resamples.estimate(resamples.means(np.full(30, np.nan))) is None
    with pytest.raises(InputError, match="one group"):
        Resamples(["a", "a"])


def test_permutation_p_counts_the_draws_that_do_as_well():
    null = np.arange(9.0)[:, None] * np.ones(2)
    np.testing.assert_allclose(permutation_p([9.0, 4.0], null), [0.1, 0.6])
    np.testing.assert_allclose(permutation_p([-1.0, 4.0], null, "less"), [0.1, 0.6])
    np.testing.assert_allclose(permutation_p([9.0, 4.0], null, "two-sided"), [0.1, 1.0])
    np.testing.assert_allclose(permutation_p([1.0, 6.0], null, "two-sided"), [0.5, 0.7])
    assert permutation_p(1.0, [0.0]) == 0.5
    assert np.isnan(permutation_p(np.nan, np.arange(9.0)))


def test_nan_draws_do_not_count():
    null = np.array([[1.0, np.nan, 1.0], [np.nan, np.nan, 2.0], [3.0, np.nan, 3.0]])
    np.testing.assert_allclose(permutation_p([2.0, 2.0, 2.0], null), [2 / 3, np.nan, 3 / 4])
    np.testing.assert_allclose(permutation_p([0.0, 2.0, 2.0], null, "two-sided"), [1 / 3, np.nan, 1.0])
    assert permutation_p(2.5, null[:, 0]) == 2 / 3


def test_the_interval_of_a_mean_is_students_without_skewness():
    values = np.array([-3.0, -1.0, -0.5, 0.5, 1.0, 3.0]) + 7
    found = mean_estimate(values)
    np.testing.assert_allclose(found.interval, t.interval(0.95, 5, loc=7, scale=values.std(ddof=1) / np.sqrt(6)))
    means = [values[[0, 1]].mean(), values[[2, 3]].mean(), values[[4, 5]].mean()]
    together = mean_estimate(values, groups=["a", "a", "b", "b", "c", "c"])
    np.testing.assert_allclose([together.value, *together.interval], [7, *mean_estimate(means).interval])


def test_the_interval_of_skewed_values_is_longer_on_their_side():
    """By hand: of 0, 0, 0, 4 the mean is 1, the population's spread √3, its skewness 2/√3; n = 4, γ = 1/√3, t = 3.182."""
    found = mean_estimate([0.0, 0.0, 0.0, 4.0])
    gamma, error, quantile = 1 / 3**0.5, 1.0, t.ppf(0.975, 3)
    ends = [3 / gamma * (np.cbrt(1 + gamma * (u - gamma / 6)) - 1) for u in (quantile, -quantile)]
    np.testing.assert_allclose(found.interval, [1 - error * end for end in ends])
    assert found.high - 1 > 3 * (1 - found.low)


def test_the_interval_of_a_share_is_that_of_as_many_tries_as_its_spread_is_worth():
    shares = np.array([1.0] * 7 + [0.0] * 3)
    low, high = mean_estimate(shares).interval
    for share, seen in ((low, 7), (1 - high, 3)):  # mid-P: what was seen counts half
        assert binom.sf(seen, 10, share) + binom.pmf(seen, 10, share) / 2 == pytest.approx(0.025)
    # Four rows of each problem that always agree say no more than one, which never does so much as forty.
    groups = [str(i) for i in range(10) for _ in range(4)]
    fewer = (
        9 * (norm.ppf(0.975) / t.ppf(0.975, 9)) ** 2
    )  # tries: their spread is known from ten, and Student's t is wider
    expected = beta.ppf([0.025, 0.975], 0.7 * fewer + 0.5, 0.3 * fewer + 0.5)
    np.testing.assert_allclose(mean_estimate(np.repeat(shares, 4), groups=groups).interval, expected, rtol=1e-6)
    assert np.subtract(*mean_estimate(np.repeat(shares, 4)).interval) > -0.7 * (expected[1] - expected[0])


def test_verdicts_that_agree_do_not_prove_that_all_do():
    same = difference_estimate([1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1], verdicts=True)
    assert same.value == 0 and same.low == pytest.approx(-same.high) == pytest.approx(-0.196, abs=1e-3)
    # Agresti and Min's own numbers for 24 pairs of which 6 changed one way and 1 the other.
    ours, theirs = [1] * 6 + [0] + [1] * 17, [0] * 6 + [1] + [1] * 17
    n, change = 26, (6.5 - 1.5) / 26
    half = 1.959964 * np.sqrt(6.5 + 1.5 - n * change**2) / n
    found = difference_estimate(ours, theirs, verdicts=True)
    np.testing.assert_allclose([found.value, found.low, found.high], [5 / 24, change - half, change + half])
    lengths, others = np.array([3.0, 5.0, 4.0, 9.0]), np.array([1.0, 2.0, 4.0, 3.0])
    assert difference_estimate(lengths, others, verdicts=False).interval == mean_estimate(lengths - others).interval
    assert shares_difference(8, 8, 8, 8) == pytest.approx((-0.2632, 0.2632), abs=2e-3)


def test_the_interval_of_shares_stays_within_them():
    none, all_ = mean_estimate([0.0] * 10), mean_estimate([1.0] * 10)
    assert none.low == 0 and all_.high == 1 and none.high == pytest.approx(1 - all_.low) and 0.2 < none.high < 0.4
    mostly = mean_estimate([1.0] * 28 + [0.5, 0.0])
    assert 0.75 < mostly.low < 0.95 < mostly.high < 1
    assert mean_estimate([2.0, 2.0, 2.0]).interval == (2, 2) and mean_estimate([0.5, 0.5]).interval == (0.5, 0.5)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng: rng.exponential(size=10), 1.0),
        (lambda rng: 1 + rng.lognormal(sigma=0.6, size=10), 1 + np.exp(0.18)),
        (lambda rng: rng.normal(size=10), 0.0),
        (lambda rng: (rng.random(10) < 0.7).astype(float), 0.7),
        (lambda rng: rng.binomial(4, rng.beta(8, 1, size=20)) / 4, 8 / 9),
    ],
)
def test_an_interval_of_few_values_holds_their_mean_as_often_as_it_says(draw, truth):
    rng = np.random.default_rng(0)
    held = [(found := mean_estimate(draw(rng))).low <= truth <= found.high for _ in range(2000)]
    assert 0.93 <= np.mean(held) <= 0.975


def test_a_mean_without_an_interval_is_refused():
    with pytest.raises(InputError, match="one group"):
        mean_estimate([1.0, 2.0], groups=["a", "a"])
    with pytest.raises(InputError, match="needs finite values"):
        mean_estimate([1.0, np.nan])


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (1, 8), (5, 8), (8, 8), (83, 100)])
def test_wilsons_interval_is_scipys(hits, n):
    ends = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((ends.low, ends.high), abs=1e-6)
    assert (wilson_interval(0, n)[0], wilson_interval(n, n)[1]) == (0, 1)
    assert wilson_half_width(hits, n) == pytest.approx((ends.high - ends.low) / 2, abs=1e-6)


def test_many_samples_of_few_problems_say_more_than_the_problems():
    rng = np.random.default_rng(0)
    problem = np.repeat(np.arange(10), 16)
    theirs = (rng.random(160) < 0.5).astype(float)
    ours = np.where(rng.random(160) < 0.2, 1.0, theirs)
    found = difference_estimate(ours, theirs, verdicts=True, groups=problem)
    by_spread = difference_estimate(ours, theirs, verdicts=False, groups=problem)
    assert 0 < found.low < found.value < found.high
    assert 0.8 < (found.high - found.low) / (by_spread.high - by_spread.low) < 1.5
    for values in (theirs, np.tile([0.0, 1.0], 5)):  # shares that are equal in all problems are no proof that all are
        equal = mean_estimate(np.tile(values[:10], 2), groups=np.repeat([0, 1], 10))
        assert equal.low < equal.value < equal.high
    assert 0.2 < mean_estimate([1, 1, 1, 1 - 1e-16]).low < 0.5, "what is off by rounding has no spread"
