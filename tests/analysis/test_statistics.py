"""Chance is reported as it is: known p-values, corrections, and agreement that shuffling destroys."""

import inspect
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from scipy.stats import t as student

from reasonscope.analysis.statistics import (
    _bootstrap,
    agreement_numbers,
    benjamini_hochberg,
    bootstrap_band,
    chance_above,
    dependency_agreement,
    holm,
    mean_band,
    mean_number,
    null_band,
    result_of_estimates,
    serial_correlation,
)
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, mean_estimate


def test_estimates_make_a_result_with_their_intervals_beside_chance():
    found = {
        name: {"auroc": Estimate(value=at, low=at - 0.1, high=at + 0.2), "n": Estimate(value=3, low=2, high=4)}
        for name, at in {"a": 0.5, "b": 0.7}.items()
    }
    chance = {"a": {"auroc": (0.4, 0.6)}}
    result = result_of_estimates(found, chance, method="signals", quantity="how well", null="shuffled", unit="share")
    assert [(axis.name, axis.labels) for axis in result.axes] == [("row", ("a", "b")), ("metric", ("auroc", "n"))]
    assert (result.method, result.quantity, result.unit) == ("signals", "how well", "share")
    assert result.values.tolist() == [[0.5, 3], [0.7, 3]]
    assert np.allclose(result.interval.low, [[0.4, 2], [0.6, 2]]) and np.allclose(
        result.interval.high, [[0.7, 4], [0.9, 4]]
    )
    assert np.array_equal(result.null.low, [[0.4, np.nan], [np.nan, np.nan]], equal_nan=True)
    assert np.array_equal(result.null.high, [[0.6, np.nan], [np.nan, np.nan]], equal_nan=True)


@pytest.mark.parametrize("call", [_bootstrap, bootstrap_band])
def test_every_interval_is_of_1000_resamples_and_one_seed(call):
    defaults = inspect.signature(call).parameters
    assert (defaults["n_resamples"].default, defaults["seed"].default) == (1000, 0)


def test_corrections_of_a_published_example():
    p = np.array([0.01, 0.04, 0.03, np.nan, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, np.nan, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, 0.04, np.nan, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_corrected_values_are_never_smaller_and_holm_is_the_stricter(values):
    p = np.array(values)
    assert (holm(p) >= benjamini_hochberg(p) - 1e-12).all()
    assert (benjamini_hochberg(p) >= p - 1e-12).all()
    assert (holm(p) <= 1).all()


def test_where_nothing_was_tested_nothing_is_corrected():
    assert np.isnan(holm([np.nan])).all() and np.isnan(benjamini_hochberg([np.nan])).all()


def test_bands_hold_what_they_should():
    rng = np.random.default_rng(0)
    band = null_band(rng.standard_normal((4000, 3)), "noise")
    assert np.abs(band.high - 1.96).max() < 0.15 and np.abs(band.low + 1.96).max() < 0.15
    assert band.what == "noise, 4000 draws; chance lies above in 2.5%, below in as many"
    few = null_band([[0.0], [1.0], [2.0], [np.nan], [3.0], [4.0]], "five")
    assert (few.low.item(), few.high.item()) == (0.0, 4.0)
    rows = rng.normal([0.0, 5.0], 1.0, (400, 2))
    found = bootstrap_band(lambda chosen: rows[chosen].mean(axis=0), 400, n_resamples=300)
    assert (found.low < rows.mean(axis=0)).all() and (found.high > rows.mean(axis=0)).all()
    assert np.ptp([found.low, found.high], axis=0).max() < 0.3
    estimate = _bootstrap(lambda chosen: float(rows[chosen, 1].mean()), 400, n_resamples=300)
    assert 4.8 < estimate.low < estimate.value < estimate.high < 5.2
    none = bootstrap_band(lambda chosen: rows[chosen].mean(axis=0), 1)
    assert np.isnan([none.low, none.high]).all() and none.what == "no interval: fewer than two rows"


@pytest.mark.parametrize(
    ("n", "chance"), [(5, 1 / 6), (20, 1 / 21), (38, 1 / 39), (79, 2 / 80), (199, 0.025), (1000, 25 / 1001)]
)
def test_chance_leaves_a_band_as_often_as_it_says(n, chance):
    assert chance_above(n) == pytest.approx(chance)
    drawn = np.random.default_rng(n).exponential(
        size=(n + 1, 20_000)
    )  # skewed: the share does not depend on the distribution
    band = null_band(drawn[1:], "exponential")
    error = 4 * np.sqrt(chance / 20_000)
    assert (drawn[0] > band.high).mean() == pytest.approx(chance, abs=error)
    assert (drawn[0] < band.low).mean() == pytest.approx(chance, abs=error)


def test_a_band_has_the_width_of_students_interval_and_says_what_it_is():
    rows = np.random.default_rng(1).standard_normal((40, 2))

    def means(chosen):
        return rows[chosen].mean(axis=0)

    band, narrow = bootstrap_band(means, 40), bootstrap_band(means, 40, level=0.5)
    assert band.what == "bootstrap over 40 rows, 95% of 1000 draws"
    error = rows.std(axis=0, ddof=1) / np.sqrt(40)
    np.testing.assert_allclose((band.high - band.low) / error, 2 * 2.02, rtol=0.12)
    np.testing.assert_allclose((narrow.high - narrow.low) / error, 2 * 0.68, rtol=0.12)
    np.testing.assert_array_equal(band.low, bootstrap_band(means, 40, seed=0).low)
    assert (band.low != bootstrap_band(means, 40, seed=1).low).all()
    assert np.isfinite(bootstrap_band(means, 2, n_resamples=20).low).all()


def test_the_band_of_means_by_their_groups_is_that_of_the_bootstrap():
    values, groups = np.random.default_rng(2).standard_normal((2, 60)), np.repeat(np.arange(12), [3, 7] * 6)
    plain = bootstrap_band(lambda at: values[:, at].mean(axis=-1), 60, groups=groups, unit="sentences")
    found, number = mean_band(values, groups), mean_number(values[0], groups)
    np.testing.assert_allclose([found.low, found.high], [plain.low, plain.high], atol=1e-12)
    assert found.what == plain.what and number["value"] == values[0].mean()
    np.testing.assert_allclose(number["ci"], [found.low[0], found.high[0]], atol=1e-12)


def test_a_value_that_is_mostly_no_number_has_no_interval():
    """Row 0 is left out of a resample of 3 rows about .3 of the time, of 2 rows .25 of the time: what needs it is known mostly."""
    band = bootstrap_band(lambda chosen: np.where([0 in chosen, 0 not in chosen], chosen.mean() + 1, np.nan), 3)
    assert band.low[0] >= 1 and band.high[0] <= 3 and np.isnan([band.low[1], band.high[1]]).all()
    every_other = itertools.cycle([np.array([1.0]), np.array([np.nan])])
    assert bootstrap_band(lambda chosen: next(every_other), 3, n_resamples=10).high == 1


def test_rows_of_one_group_are_drawn_together():
    values = np.repeat([0.0, 1.0, 2.0, 3.0], 10) + np.tile(np.linspace(-0.01, 0.01, 10), 4)
    alone, together = mean_estimate(values), mean_estimate(values, groups=[str(i // 10) for i in range(40)])
    assert alone.value == together.value == pytest.approx(1.5)
    assert together.high - together.low > 3 * (alone.high - alone.low) > 0
    band = bootstrap_band(lambda at: values[at].mean(), 40, groups=np.repeat(range(4), 10), unit="sentences")
    groups = [str(i // 10) for i in range(40)]
    assert (band.low, band.high) == _bootstrap(lambda at: float(values[at].mean()), 40, groups=groups).interval
    assert band.what.startswith("bootstrap over 4 sentences")
    assert np.isnan(bootstrap_band(lambda at: values[at].mean(), 40, groups=np.zeros(40), unit="sentences").low)


def test_two_lines_that_rise_along_a_thinking_do_not_agree_for_that():
    place, rng = np.arange(30.0), np.random.default_rng(0)
    wave = rng.normal(size=30)
    rho, p = serial_correlation(wave + place / 10, wave - place / 5)
    assert rho > 0.8 and p < 0.01
    rho, p = serial_correlation(rng.normal(size=30) + place, rng.normal(size=30) + place)
    assert abs(rho) < 0.5 and p > 0.01
    assert (
        np.isnan(serial_correlation(place, place**2)).all() and np.isnan(serial_correlation(wave[:4], wave[:4])).all()
    )
    slow, other = np.repeat(rng.normal(size=(2, 6)), 5, axis=1)
    mixed = rng.permutation(30)
    like = slow + other  # blocks of five alike say less than thirty places of their own would
    assert serial_correlation(slow, like)[1] > 2 * serial_correlation(slow[mixed], like[mixed])[1]


def test_the_p_value_of_two_lines_by_hand():
    """Student's t with three degrees of freedom fewer than there are independent places."""
    place, rng = np.arange(12.0), np.random.default_rng(2)
    seen = set()
    drawn = rng.normal(size=(8, 2, 12))
    for line, other in (*drawn, *drawn.cumsum(axis=2)):  # the latter are like their neighbours
        x, y = (np.polyval(np.polyfit(place, ranks, 1), place) - ranks for ranks in map(rankdata, (line, other)))
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        shared = sum(12 / (12 - k) * (x[:-k] @ x[k:]) * (y[:-k] @ y[k:]) for k in (1, 2, 3))
        freedom = max((12 / (1 + 2 * shared) if shared > 0 else 12) - 3, 0.5)
        p = 2 * student.sf(abs(x @ y) * np.sqrt(freedom / (1 - (x @ y) ** 2)), freedom)
        assert serial_correlation(line, other) == pytest.approx((x @ y, p))
        seen.add(shared > 0)
    assert seen == {True, False}


def test_a_score_that_knows_the_dependencies_beats_one_that_does_not():
    rng = np.random.default_rng(1)
    truths, oracle, noise = [], [], []
    for _ in range(6):
        truth = [[] if j == 0 else sorted({int(rng.integers(j)), int(rng.integers(j))}) for j in range(12)]
        matrix = rng.standard_normal((12, 12)) * 0.1
        noise.append(rng.standard_normal((12, 12)))
        for target, sources in enumerate(truth):
            matrix[target, sources] += 1
        truths.append(truth)
        oracle.append(matrix)
    good, bad = dependency_agreement(oracle, truths), dependency_agreement(noise, truths)
    assert good.auroc > 0.85 and good.precision > 0.95 and good.above_null and good.p_value < 0.01
    assert not bad.above_null and bad.p_value > 0.05
    assert abs(good.null_auroc.mean() - 0.5) < 0.03 and abs(good.distance_auroc - 0.5) < 0.15
    one = dependency_agreement(oracle[0], truths[0])
    assert one.n_pairs == 65 and one.n_true < good.n_true


HAND = np.array([[9.0, 9, 9, 9], [9, 9, 9, 9], [0.9, 0.1, 9, 9], [0.2, 0.8, 0.5, 9]])
HAND_TRUTH = [[], [0], [0], [0, 1]]


def test_agreement_by_hand():
    """Targets 2 and 3 have more than one source; ranks are 1, 1/2 (of them 1 true) and 1/3, 1, 2/3 (of them 1/3 and 1 true)."""
    found = dependency_agreement(HAND, HAND_TRUTH)
    assert (found.n_pairs, found.n_true) == (5, 3)
    assert found.auroc == pytest.approx(4 / 6) and found.precision == pytest.approx((1 + 1 / 2) / 2)
    assert found.distance_auroc == 0  # the true sources are the far ones
    assert found.null_auroc.shape == found.null_precision.shape == (200,)
    assert found.p_value == (1 + (found.null_auroc >= found.auroc).sum()) / 201
    assert found.null_precision.mean() == pytest.approx((1 / 2 + 2 / 3) / 2, abs=0.05) and not found.above_null
    np.testing.assert_array_equal(found.null_auroc, dependency_agreement(HAND, HAND_TRUTH, seed=0).null_auroc)
    assert (found.null_auroc != dependency_agreement(HAND, HAND_TRUTH, seed=1).null_auroc).any()
    unknown = HAND.copy()
    unknown[3, 2] = np.nan
    assert dependency_agreement(unknown, HAND_TRUTH).n_pairs == 4
    ties = HAND.copy()
    ties[3, :3] = 0.5
    assert dependency_agreement(ties, HAND_TRUTH).auroc == pytest.approx((1 + 1 + 2 * 1 + 2 * 0.5) / 6, abs=1 / 6)


def test_agreement_in_numbers_has_its_null_beside_it():
    found = dependency_agreement(HAND, HAND_TRUTH)
    numbers = agreement_numbers(found)
    low, high = numbers.pop("auroc_null")
    assert low == np.quantile(found.null_auroc, 0.025) and high == np.quantile(found.null_auroc, 0.975) and low < high
    assert numbers == {
        "auroc": found.auroc,
        "p_value": found.p_value,
        "precision_at_k": found.precision,
        "precision_at_k_null": found.null_precision.mean(),
        "distance_auroc": 0.0,
        "pairs": 5,
        "true": 3,
        "above_null": False,
    }


def test_every_trace_needs_its_dependencies():
    with pytest.raises(InputError, match="1 score matrices for the dependencies of 2 traces"):
        dependency_agreement([HAND], [HAND_TRUTH, HAND_TRUTH])
    with pytest.raises(InputError, match="5 of 5 pairs"):
        dependency_agreement(HAND, [[], [0], [0, 1], [0, 1, 2]])
    with pytest.raises(InputError, match="0 of 0 pairs"):
        dependency_agreement(np.ones((1, 1)), [[]])


def test_agreement_needs_both_kinds_of_pairs():
    with pytest.raises(InputError, match="0 of 2 pairs"):
        dependency_agreement(np.ones((3, 3)), [[], [], []])
