"""The null of a searched score searches again: uniform p-values on noise however many layers there are, and the sweep's own score."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reasonscope.data.errors import InputError
from reasonscope.data.ranks import auroc, spearman
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS, _predicted, permuted_sweep
from reasonscope.probes.fitting.sweep import sweep

GROUPS = [f"g{i}" for i in range(40)]


def noise(seed, layers, rows=40, width=6):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, layers, 1, width)).astype(np.float32), rng.standard_normal(rows)


def test_the_observed_score_is_that_of_the_sweep():
    features, targets = noise(0, 3)
    targets = targets + 2 * features[:, 1, 0, 0]
    found = permuted_sweep(features, targets, GROUPS, task="regression", n_permutations=9, seed=3)
    swept = sweep(features, targets, GROUPS, task="regression", seed=3)
    assert found.observed == pytest.approx(spearman(targets, swept.predictions), abs=0.02)
    assert found.p_value == pytest.approx(0.1)


@pytest.mark.parametrize("task", ["regression", "binary"])
@pytest.mark.parametrize("layers", [1, 8])
def test_p_is_uniform_on_noise(layers, task):
    """The slow self-test has 500 runs and 28 layers; 60 here would see the old null, which called 30 % of runs significant at .05."""
    p = []
    for seed in range(60):
        features, targets = noise(seed, layers)
        labels = targets if task == "regression" else (targets > 0).astype(np.float64)
        p.append(permuted_sweep(features, labels, GROUPS, task=task, n_permutations=19, folds=3, seed=seed).p_value)
    jittered = np.array(p) - np.random.default_rng(0).random(60) / 20  # p has steps of 1/20
    assert kstest(jittered, "uniform").pvalue > 0.01
    assert (np.array(p) <= 0.05).mean() < 0.15


def test_a_binary_property_is_found():
    features, targets = noise(1, 4)
    labels = (features[:, 2, 0, 1] + 0.3 * targets > 0).astype(np.float64)
    found = permuted_sweep(features, labels, GROUPS, task="binary", n_permutations=39)
    assert found.observed > 0.85 and found.p_value == pytest.approx(1 / 40)
    swept = sweep(features, labels, GROUPS, task="binary")
    assert found.observed == pytest.approx(auroc(labels, swept.predictions), abs=0.1)


def test_rows_of_a_group_move_together():
    features, _ = noise(2, 2)
    groups = [f"g{i // 4}" for i in range(40)]
    targets = np.repeat(np.arange(10.0), 4)
    found = permuted_sweep(features, targets, groups, task="regression", n_permutations=20)
    assert len(found.null) == 20
    with pytest.raises(InputError, match="no shuffle within groups"):
        permuted_sweep(features, targets, groups, task="regression", within=True, n_permutations=5)


@pytest.mark.parametrize("width", [6, 80])
def test_predictions_are_those_of_ridge_on_standardised_states(width):
    rng = np.random.default_rng(3)
    states = rng.standard_normal((40, width)) * rng.uniform(0.01, 3, size=width) + rng.normal(scale=5, size=width)
    states[:, 2] = 7.0  # tells nothing, and has no spread to divide by
    states[:, 3] = states[:, 4] + 0.05 * rng.standard_normal(40)  # nearly the same, so that one direction varies little
    targets = rng.standard_normal((40, 3))
    train, test = np.arange(30), np.arange(30, 40)
    tensors = torch.from_numpy(states), torch.from_numpy(targets)
    found = _predicted(*tensors, train, test, torch.tensor([0.1, 10.0], dtype=torch.float64))
    for alpha, own in zip((0.1, 10.0), found, strict=True):
        model = make_pipeline(StandardScaler(), Ridge(alpha=alpha)).fit(states[train], targets[train])
        np.testing.assert_allclose(own, model.predict(states[test]), rtol=1e-6, atol=1e-8)


def test_two_hundred_fits_make_the_smallest_p_one_in_two_hundred():
    features, targets = noise(4, 1)
    found = permuted_sweep(features, targets, GROUPS, task="regression", folds=2)
    assert len(found.null) == N_PERMUTATIONS == 199


def test_p_values_are_uniform_on_noise_if_groups_differ_in_size():
    """A label that all rows of a trace share, in traces of very different lengths."""

    def p_of(seed):
        rng = np.random.default_rng(seed)
        sizes = np.maximum(1, np.exp(rng.normal(1, 1, size=30))).astype(int)
        labels = np.repeat(rng.permutation(np.arange(30) % 2).astype(float), sizes)
        groups = np.repeat([str(i) for i in range(30)], sizes).tolist()
        states = np.repeat(rng.standard_normal((30, 1, 1, 3)), sizes, axis=0)  # a trace's states are alike, too
        return permuted_sweep(
            states, labels, groups, task="binary", n_permutations=19, penalties=[1.0], folds=3
        ).p_value

    found = np.array([p_of(seed) for seed in range(300)])
    assert np.mean(found <= 0.05) == pytest.approx(0.05, abs=0.038)  # three standard errors
    assert np.mean(found) == pytest.approx(0.525, abs=0.05)
