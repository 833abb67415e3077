"""Held-out predictions never see their own group; intervals resample groups."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from reasonscope.data.errors import InputError
from reasonscope.probes.evaluate import cluster_bootstrap, grouped_predictions, spearman


def test_a_label_that_only_the_group_knows_cannot_be_predicted():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)
    features = np.eye(60)[groups]  # the group itself: with its rows in the training part the label would be known
    targets = rng.standard_normal(60)[groups]
    predictions = grouped_predictions(Ridge(alpha=1e-3), features, targets, groups.astype(str).tolist())
    assert np.isfinite(predictions).all()
    assert abs(spearman(targets, predictions)) < 0.35
    assert spearman(targets, Ridge(alpha=1e-3).fit(features, targets).predict(features)) > 0.99


def test_the_penalty_is_chosen_inside_the_fold():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((80, 60))
    targets = features[:, 0] + 2 * rng.standard_normal(80)
    groups = [str(i) for i in range(80)]
    chosen = grouped_predictions(Ridge(), features, targets, groups, grid={"alpha": [1e-6, 100.0]})
    loose = grouped_predictions(Ridge(alpha=1e-6), features, targets, groups)
    assert np.mean((chosen - targets) ** 2) < np.mean((loose - targets) ** 2)


def test_the_interval_widens_where_rows_share_a_group():
    rng = np.random.default_rng(2)
    common = np.repeat(rng.standard_normal(30), 10)

    def mean(_, values):
        return float(values.mean())

    apart = cluster_bootstrap(mean, common, common, [str(i) for i in range(300)])
    together = cluster_bootstrap(mean, common, common, np.repeat(np.arange(30), 10).astype(str).tolist())
    assert apart.value == together.value == pytest.approx(common.mean())
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert together.low < together.value < together.high


def test_a_constant_orders_nothing():
    assert spearman(np.arange(5.0), np.ones(5)) == 0.0


def test_too_few_groups_and_nan_are_refused():
    with pytest.raises(InputError, match="3 groups for 5 folds"):
        grouped_predictions(Ridge(), np.zeros((6, 1)), np.zeros(6), ["a", "b", "c"] * 2)
    with pytest.raises(InputError, match="NaN"):
        grouped_predictions(Ridge(), np.full((6, 1), np.nan), np.zeros(6), list("abcdef"))
