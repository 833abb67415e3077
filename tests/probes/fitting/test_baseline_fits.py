"""What baselines predict: as scikit-learn's pipelines do, which fit everything again in each fold."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline

from reasonscope.probes.evaluation.grouped_folds import grouped_predictions
from reasonscope.probes.fitting import baseline_fits
from reasonscope.probes.fitting.baseline_fits import baseline_predictions

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
