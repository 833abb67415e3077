"""The statistic of MI-Peaks equals its dense form on the golden cases, and behaves as a dependence should."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonscope.analysis.tokens.nocco import _kernel_factor, mutual_information, squared_correlation
from reasonscope.data.errors import InputError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "mi_nocco.json").read_text())


def dense(x, y, sigma=50.0, epsilon=1e-5):
    m = len(x)
    centre = np.eye(m) - 1 / m
    sides = []
    for values in (x, y):
        kernel = np.exp(-((values[:, None] - values) ** 2) / (2 * sigma**2)) @ centre
        sides.append(kernel @ np.linalg.inv(kernel + epsilon * m * np.eye(m)))
    return float((sides[0] * sides[1].T).sum())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden(case):
    given_ = case["inputs"]
    x, y = np.array([given_["x"]]), np.array(given_["y"])
    (value,) = mutual_information(x, y, sigma=given_["sigma"], epsilon=given_["epsilon"])
    assert value == pytest.approx(case["expected"], abs=1e-9 * max(1, abs(case["expected"])), rel=0)


def test_all_rows_and_targets_at_once_equal_one_by_one():
    rng = np.random.default_rng(0)
    rows, targets = (
        rng.standard_normal((7, 40)) * np.array([[0.1], [1], [3], [50], [1], [1], [1]]),
        rng.standard_normal((3, 40)),
    )
    together = mutual_information(rows, targets)
    assert together.shape == (7, 3)
    for i, row in enumerate(rows):
        for j, target in enumerate(targets):
            assert together[i, j] == pytest.approx(dense(row, target), abs=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_symmetric_bounded_by_rank_and_invariant_to_a_shift(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 24)) * rng.uniform(0.1, 40, (2, 1))
    value = mutual_information(x[None], y)[0]
    assert value == pytest.approx(mutual_information(y[None], x)[0], abs=1e-8)
    assert value == pytest.approx(mutual_information(x[None] + 3, y)[0], abs=1e-8)
    ranks = [_kernel_factor(side[None], 50.0).shape[1] for side in (x, y)]
    assert -1e-12 <= value <= min(ranks)


def test_any_width_and_ridge_give_the_dense_value():
    x, y = np.random.default_rng(2).standard_normal((2, 40))
    for sigma, epsilon in ((0.5, 1e-5), (50.0, 1e-3), (3.0, 2.0)):
        value = mutual_information(x, y, sigma=sigma, epsilon=epsilon)
        assert value == pytest.approx([dense(x, y, sigma, epsilon)], abs=1e-9)


def test_a_kernel_of_few_distinct_values_needs_few_factors():
    rng = np.random.default_rng(3)
    rows = np.stack([rng.choice([0.0, 100.0, 300.0], 200), rng.uniform(-100, 100, 200)])
    factors = _kernel_factor(rows, 50.0)
    assert factors.shape[1] < 40
    kernel = np.exp(-((rows[:, :, None] - rows[:, None]) ** 2) / (2 * 50.0**2))
    np.testing.assert_allclose(factors.transpose(0, 2, 1) @ factors, kernel, atol=1e-12)
    assert (factors[0, 3:] == 0).all() and (factors[0, :3] != 0).any(axis=1).all()


def test_r2_of_a_constant_is_0_and_of_tiny_activations_the_same():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((2, 30))
    found = squared_correlation(np.stack([np.ones(30), 1e-3 * x]), 1e-3 * y)
    np.testing.assert_allclose(found, [0.0, np.corrcoef(x, y)[0, 1] ** 2], atol=1e-12)


def test_r2_sees_the_linear_part_and_bad_input_is_refused():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 400))
    np.testing.assert_allclose(squared_correlation(np.stack([2 * x[0] + 1, x[1]]), x[0]), [1.0, 0.0], atol=0.02)
    with pytest.raises(InputError, match="same last axis"):
        mutual_information(np.ones((2, 4)), np.ones(5))
    for x, y in ((np.ones((2, 2, 4)), np.ones(4)), (np.ones(4), np.ones((2, 2, 4))), (np.ones(1), np.ones(1))):
        with pytest.raises(InputError, match="same last axis"):
            mutual_information(x, y)
    for x, y in ((np.full(4, np.nan), np.ones(4)), (np.ones(4), np.full(4, np.inf))):
        with pytest.raises(InputError, match="NaN"):
            mutual_information(x, y)
    with pytest.raises(InputError, match="epsilon 0"):
        mutual_information(np.ones(4), np.ones(4), epsilon=0)
    with pytest.raises(InputError, match="NaN"):
        mutual_information(np.full((1, 4), np.nan), np.ones(4))
    with pytest.raises(InputError, match="above 0"):
        mutual_information(np.ones((1, 4)), np.ones(4), sigma=0)
