"""The sweep finds the cell with the signal, chooses inside the fold, agrees with scikit-learn, and finds nothing in noise."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reasonscope.data.errors import InputError
from reasonscope.data.ranks import auroc, spearman
from reasonscope.probes.evaluation.grouped_folds import grouped_folds, grouped_predictions
from reasonscope.probes.fitting import sweep as module
from reasonscope.probes.fitting.sweep import sweep

PENALTIES = (0.1, 10.0, 1000.0)


@pytest.fixture
def data():
    """60 problems of two rows; only layer 1 at position 2 knows the target."""
    rng = np.random.default_rng(0)
    targets = rng.standard_normal(120)
    features = rng.standard_normal((120, 2, 3, 6)).astype(np.float32)
    features[:, 1, 2, 4] = 3 * targets + 5
    return features, targets, [f"problem {i // 2}" for i in range(120)]


@pytest.mark.parametrize("task", ["regression", "binary"])
def test_it_finds_the_cell_that_knows(task, data):
    features, targets, groups = data
    targets = targets if task == "regression" else (targets > 0).astype(float)
    found = sweep(features, targets, groups, task=task, penalties=PENALTIES, folds=3)
    assert {(choice.layer, choice.position) for choice in (*found.chosen, found.final)} == {(1, 2)}
    assert found.scores.shape == (3, 2, 3)
    assert found.scores[:, 1, 2].min() > 0.9 > 0.8 > np.delete(found.scores.mean(axis=0).ravel(), 5).max()
    assert found.cosines[1, 2] > 0.9
    assert (spearman if task == "regression" else auroc)(targets, found.predictions) > 0.95
    values = features[:, 1, 2] @ found.coef + found.intercept
    assert (
        (values > 0).astype(float) == pytest.approx(targets, abs=1)
        if task == "binary"
        else spearman(targets, values) > 0.99
    )


@pytest.mark.parametrize("task", ["regression", "binary"])
def test_one_cell_equals_scikit_learn(task, data):
    """The same folds, the same penalties chosen, the same predictions."""
    features, targets, groups = data
    targets = features[:, 0, 0, 0] + np.random.default_rng(1).standard_normal(120)
    targets = targets.astype(float) if task == "regression" else (targets > 0).astype(float)
    found = sweep(features[:, :1, :1], targets, groups, task=task, penalties=PENALTIES, folds=3)
    if task == "regression":
        estimator, grid = make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": list(PENALTIES)}
    else:
        estimator = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=1000))
        grid = {"logisticregression__C": [1 / penalty for penalty in PENALTIES]}
    rows = features[:, 0, 0].astype(np.float64)
    expected = grouped_predictions(estimator, rows, targets, groups, grid=grid, task=task, folds=3)
    assert found.predictions == pytest.approx(expected, abs=1e-5)


def test_predictions_of_noise_are_worth_nothing_though_its_best_cell_looks_like_something(data):
    """The maximum over cells is biased upwards; the nested predictions are not."""
    features, _, groups = data
    noise = np.random.default_rng(3).standard_normal(120)
    found = sweep(features, noise, groups, task="regression", penalties=PENALTIES, folds=3)
    assert abs(spearman(noise, found.predictions)) < 0.25
    assert found.scores.mean(axis=0).max() > spearman(noise, found.predictions)


def test_it_does_not_matter_how_many_cells_are_solved_at_a_time(data, monkeypatch):
    features, targets, groups = data
    whole = sweep(features, targets, groups, task="regression", penalties=PENALTIES, folds=3)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    parts = sweep(features, targets, groups, task="regression", penalties=PENALTIES, folds=3)
    assert parts.chosen == whole.chosen
    assert parts.predictions == pytest.approx(whole.predictions)
    assert parts.coef == pytest.approx(whole.coef)


def test_rows_are_judged_by_the_folds_of_their_groups(data):
    features, targets, groups = data
    found = sweep(features, targets, groups, task="regression", penalties=PENALTIES, folds=3, seed=4)
    expected = grouped_folds(targets, groups, folds=3, seed=4)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(found.folds, expected, strict=True))


def test_bad_input_is_one_clear_error(data):
    features, targets, groups = data
    with pytest.raises(InputError, match=r"\(row, layer, position, d_model\)"):
        sweep(features[:, 0], targets, groups, task="regression")
    with pytest.raises(InputError, match="NaN or infinite"):
        sweep(np.full_like(features, np.inf), targets, groups, task="regression")
    with pytest.raises(InputError, match="all 120 rows are of class 1"):
        sweep(features, np.ones(120), groups, task="binary")
    with pytest.raises(InputError, match="class 1 is in 2 groups of problems for 5 folds"):
        sweep(features, (np.arange(120) < 4).astype(float), groups, task="binary")
    with pytest.raises(InputError, match="1 groups of problems for 5 folds"):
        sweep(features, targets, ["one"] * 120, task="regression")
