"""Metrics give what is known by hand, at their edges too."""

import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr
from sklearn import metrics
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from reasonscope.data.errors import InputError
from reasonscope.data.ranks import _ranks, auroc, spearman
from reasonscope.probes.evaluation.metrics import (
    BINARY,
    TOKENS,
    _balanced_accuracy,
    _calibration_error,
    _log_loss,
    _pr_auc,
    _tpr_at_fpr,
    r2,
    r2_log,
    spearman_within,
)
from reasonscope.probes.fitting.censoring import aft_predictions, concordance_index
from reasonscope.probes.fitting.sweep import sweep

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "concordance.json").read_text(encoding="utf-8"))


def test_a_perfect_probe_and_a_useless_one():
    targets = np.tile([0.0, 1.0], 100)
    best = {name: metric(targets, targets) for name, metric in BINARY.items()}
    assert best == pytest.approx(
        {**dict.fromkeys(BINARY, 1.0), "log_loss": 0, "brier": 0, "calibration_error": 0}, abs=1e-9
    )
    even = {name: metric(targets, np.full(200, 0.5)) for name, metric in BINARY.items()}
    assert even == pytest.approx(
        {"auroc": 0.5, "pr_auc": 0.5, "balanced_accuracy": 0.5, "log_loss": np.log(2), "brier": 0.25,
         "calibration_error": 0, "tpr_at_1_fpr": 0}
    )  # fmt: skip


def test_a_probability_of_one_is_counted_in_the_top_bin():
    """The published code leaves the top bin open at 1, and so never sees the surest mistakes."""
    assert _calibration_error(np.zeros(10), np.ones(10)) == 1.0


def test_bins_have_equal_mass():
    rng = np.random.default_rng(0)
    probabilities = rng.random(1000)
    targets = (rng.random(1000) < probabilities**2).astype(float)
    true, said = calibration_curve(targets, probabilities, n_bins=10, strategy="quantile")
    assert _calibration_error(targets, probabilities) == pytest.approx(np.abs(true - said).mean(), abs=2e-3)


@given(st.lists(st.one_of(st.integers(-3, 3), st.floats(allow_nan=True)), min_size=1, max_size=30))
def test_ranks_are_those_of_scipy(values):
    np.testing.assert_array_equal(_ranks(np.array(values, dtype=np.float64)), rankdata(values))


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        targets, probabilities = np.tile([0.0, 1.0], 15), rng.random(30)
        probabilities[:2] = 0.0, 1.0
        lengths, guessed = rng.integers(1, 9, size=30).astype(float), rng.random(30)
        assert _log_loss(targets, probabilities) == pytest.approx(metrics.log_loss(targets, probabilities))
        expected = metrics.balanced_accuracy_score(targets, probabilities >= 0.5)
        assert _balanced_accuracy(targets, probabilities) == pytest.approx(expected)
        assert r2(lengths, guessed) == pytest.approx(metrics.r2_score(lengths, guessed))
        assert spearman(lengths, guessed) == pytest.approx(spearmanr(lengths, guessed).statistic)


def test_auroc_of_ranks_is_that_of_the_curve_with_ties_and_with_any_scores():
    rng = np.random.default_rng(0)
    for n, values in product((2, 3, 40, 1000), (2, 5, 10**6)):
        targets = rng.permutation(np.arange(n) % 3 == 0)
        scores = rng.integers(values, size=n) - values / 2
        assert auroc(targets.astype(float), scores) == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
        assert auroc(targets, scores) == auroc(targets.astype(float), scores)


def test_curves_are_scikit_learns_with_ties_and_with_any_scores():
    rng = np.random.default_rng(0)
    for n, values in product((2, 3, 40, 1000), (2, 5, 10**6)):
        targets = rng.permutation(np.arange(n) % 3 == 0).astype(float)
        scores = rng.integers(values, size=n) - values / 2
        assert _pr_auc(targets, scores) == pytest.approx(metrics.average_precision_score(targets, scores), abs=1e-12)
        false, true, _ = metrics.roc_curve(targets, scores, drop_intermediate=False)
        assert _tpr_at_fpr(targets, scores, fpr=0.2) == true[false <= 0.2].max()


def test_tpr_is_read_at_the_allowed_false_positive_rate():
    targets = np.repeat([0.0, 1.0], [200, 4])
    scores = np.concatenate([np.linspace(0, 1, 200), [0.5, 0.992, 0.997, 2.0]])
    assert _tpr_at_fpr(targets, scores) == 0.75  # two of 200 may be caught, the third may not
    assert _tpr_at_fpr(targets, scores, fpr=0.0) == 0.25


def test_one_class_is_nan_and_a_score_is_not_a_probability():
    assert np.isnan([auroc(np.ones(3), np.arange(3.0)), _pr_auc(np.zeros(3), np.arange(3.0))]).all()
    with pytest.raises(InputError, match="instead of its scores"):
        BINARY["brier"](np.array([0.0, 1.0]), np.array([-3.0, 3.0]))


def test_tokens_are_judged_on_both_scales():
    tokens = np.array([10.0, 100.0, 1000.0])
    assert r2_log(tokens, tokens) == 1.0
    assert TOKENS["r2"](tokens, tokens * 1.1) < TOKENS["r2_log"](tokens, tokens * 1.1) + 0.05
    assert np.isnan(TOKENS["r2"](np.ones(3), np.arange(3.0)))


def test_order_between_strata_is_not_order_within_them():
    strata = np.repeat([0, 1, 2], 50)
    rng = np.random.default_rng(1)
    targets = strata * 10.0 + rng.random(150)
    assert TOKENS["spearman"](targets, strata * 1.0 + rng.random(150)) > 0.85
    assert abs(spearman_within(targets, strata + rng.random(150), strata.tolist())) < 0.2
    assert spearman_within(targets, targets - 100 * strata, strata.tolist()) == pytest.approx(1.0)
    assert np.isnan(spearman_within(targets[:2], targets[:2], [0, 1]))


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(1, 4)), min_size=2, max_size=12))
def test_concordance_counts_every_pair_whose_order_is_known(rows):
    known = right = 0.0
    for a, b in combinations(rows, 2):
        (t, cut, p), (u, longer_cut, q) = sorted([a, b], key=lambda row: (row[0], row[1]))
        if cut or (t == u and not longer_cut):
            continue
        known += 1
        right += 1.0 if p < q else 0.5 if p == q else 0.0
    tokens, truncated, predictions = (np.array(column) for column in zip(*rows, strict=True))
    found = concordance_index(tokens.astype(float), truncated.astype(bool), predictions.astype(float))
    assert (np.isnan(found) and not known) or found == pytest.approx(right / known)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_concordance_is_that_of_scikit_survival(case):
    found = concordance_index(np.array(case["tokens"]), np.array(case["truncated"]), np.array(case["predictions"]))
    assert found == pytest.approx(case["concordance"], abs=1e-12)


def test_a_model_of_censored_lengths_is_not_fooled_by_the_limit():
    pytest.importorskip("sksurv", reason="the extra survival is not installed")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 5))
    tokens = np.exp(5 + features[:, 0] + 0.2 * rng.standard_normal(300))
    counted, truncated = np.minimum(tokens, 200.0), tokens > 200
    groups = [str(i) for i in range(300)]
    predicted = aft_predictions(features[:, None], counted, truncated, groups, chosen=[0] * 5)
    slope = np.polyfit(features[:, 0], np.log(predicted), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.15)  # plain least squares on the counts finds 0.65
    assert concordance_index(counted, truncated, predicted) > 0.9


def test_sites_that_folds_chose_leave_nothing_to_find_in_noise():
    pytest.importorskip("sksurv", reason="the extra survival is not installed")
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        states, tokens = rng.standard_normal((60, 24, 1, 8)), rng.lognormal(5, 1, size=60)
        groups = [str(i) for i in range(60)]
        chosen = [one.layer for one in sweep(states, np.log1p(tokens), groups, task="regression").chosen]
        predicted = aft_predictions(states[:, :, 0], tokens, np.zeros(60, dtype=bool), groups, chosen=chosen)
        found.append(spearman(tokens, predicted))
    assert np.mean(found) < 0.08  # at the site that all rows choose: 0.2


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sksurv.svm", None)
    with pytest.raises(ImportError, match=r"reasonscope\[survival\]"):
        aft_predictions(np.zeros((4, 1, 1)), np.ones(4), np.zeros(4, dtype=bool), list("abcd"), chosen=[0, 0])
