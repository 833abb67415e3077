"""Chance is reported as it is: known p-values, corrections, and agreement that shuffling destroys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonscope.analysis.statistics import (
    benjamini_hochberg,
    bootstrap,
    bootstrap_band,
    dependency_agreement,
    holm,
    null_band,
    permutation_p,
)
from reasonscope.data.errors import InputError


def test_permutation_p_counts_the_draws_that_do_as_well():
    null = np.arange(9.0)[:, None] * np.ones(2)
    np.testing.assert_allclose(permutation_p([9.0, 4.0], null), [0.1, 0.6])
    np.testing.assert_allclose(permutation_p([-1.0, 4.0], null, "less"), [0.1, 0.6])
    np.testing.assert_allclose(permutation_p([9.0, 4.0], null, "two-sided"), [0.1, 1.0])
    assert np.isnan(permutation_p(np.nan, np.arange(9.0)))


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


def test_bands_hold_what_they_should():
    rng = np.random.default_rng(0)
    band = null_band(rng.standard_normal((4000, 3)), "noise")
    assert np.abs(band.high - 1.96).max() < 0.15 and "4000 draws" in band.what
    rows = rng.normal([0.0, 5.0], 1.0, (400, 2))
    found = bootstrap_band(lambda chosen: rows[chosen].mean(axis=0), 400, draws=300)
    assert (found.low < rows.mean(axis=0)).all() and (found.high > rows.mean(axis=0)).all()
    assert np.ptp([found.low, found.high], axis=0).max() < 0.3
    estimate = bootstrap(lambda chosen: float(rows[chosen, 1].mean()), 400, draws=300)
    assert 4.8 < estimate.low < estimate.value < estimate.high < 5.2
    assert np.isnan(bootstrap_band(lambda chosen: rows[chosen].mean(axis=0), 1).low).all()


def test_a_score_that_knows_the_dependencies_is_told_from_one_that_does_not():
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


def test_agreement_needs_both_kinds_of_pairs():
    with pytest.raises(InputError, match="0 of 2 pairs"):
        dependency_agreement(np.ones((3, 3)), [[], [], []])
