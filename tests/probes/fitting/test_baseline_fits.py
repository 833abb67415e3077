"""What baselines predict: as scikit-learn's pipelines do, which fit everything again in each fold."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline

from reasonscope.probes.evaluation.grouped_folds import grouped_folds, grouped_predictions
from reasonscope.probes.fitting import baseline_fits
from reasonscope.probes.fitting.baseline_fits import baseline_predictions, rank_predictions

CASES = {
    "regression": (Ridge(tol=1e-12), {"ridge__alpha": [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]}),
    "binary": (
        LogisticRegression(solver="newton-cholesky", tol=1e-12),
        {"logisticregression__C": [0.01, 0.1, 1.0, 10.0, 100.0]},
    ),
}


@pytest.mark.parametrize("block", [1, 2**28])
@pytest.mark.parametrize("task", CASES)
def test_texts_predict_what_a_pipeline_of_tf_idf_predicts(task, block, monkeypatch):
    monkeypatch.setattr(baseline_fits, "BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(60)]  # some of them are in few texts, so folds differ in what they know
    texts = np.array([" ".join(rng.choice(words, size=rng.integers(4, 12))) for _ in range(40)], dtype=object)
    groups = [str(row // 2) for row in range(40)]
    targets = np.array([text.count("word1") for text in texts]) + rng.normal(size=40)
    targets = (targets > np.median(targets)).astype(float) if task == "binary" else targets
    linear, grid = CASES[task]
    pipeline = make_pipeline(TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True), linear)
    expected = grouped_predictions(pipeline, texts, targets, groups, grid=grid, task=task)
    np.testing.assert_allclose(baseline_predictions(texts, targets, groups, task=task), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("task", [None, "binary"])
def test_only_what_varies_can_order_rows(task):
    """A constant predicts the mean of each training part, which would order the folds; by rank it predicts one number."""
    rng = np.random.default_rng(0)
    groups = [str(row // 2) for row in range(40)]
    targets = rng.normal(size=40)
    targets = (targets > 0).astype(float) if task else targets
    how = {"task": task} if task else {}
    varying = (targets + rng.normal(size=40))[:, None]
    given = {"same": np.ones((40, 2)), "one varies": np.hstack([np.ones((40, 1)), varying]), "varying": varying}
    found = rank_predictions(given, targets, groups, **how)
    assert list(found) == list(given)
    np.testing.assert_array_equal(found["same"], np.full(40, targets.mean()))
    np.testing.assert_array_equal(found["varying"], baseline_predictions(varying, targets, groups, **how))
    np.testing.assert_allclose(found["one varies"], found["varying"], atol=1e-12)
    means = baseline_predictions(given["same"], targets, groups, **how)
    for fold in grouped_folds(targets, groups, task=task or "regression"):
        np.testing.assert_allclose(means[fold.test], targets[fold.train].mean())
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(
            found["varying"], rank_predictions(given, targets, groups, folds=4, **how)["varying"]
        )
