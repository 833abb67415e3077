"""Linear probes: coefficients as scikit-learn's, laws that hold for any data, and the probe that is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sklearn.base import clone
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting import solvers
from reasonscope.probes.fitting.linear_probes import (
    LassoProbe,
    LinearProbe,
    LogisticProbe,
    MassMeanProbe,
    MeanDifferenceProbe,
    RidgeProbe,
)
from reasonscope.probes.fitting.solvers import logistic_path, ridge_path

SITE = Site("resid_post", 2)
MODEL = {"name": "toy", "weights": "abc", "tokenizer": "def"}
PENALTIES = [1e-3, 10.0, 1.0]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def drawn(rows, width, problems=2, share=0.5, seed=0):
    """Features (problem, row, d) with a mean and unequal scales, a quantity and a class of which `share` are 1."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((problems, rows, width)) * np.linspace(0.1, 5, width) + 3
    quantity = features[0, :, 1] + features[0, :, 0] + rng.standard_normal(rows)
    return features, quantity, (quantity > np.quantile(quantity, 1 - share)).astype(float)


def folds(rows, n=3):
    """Training sets (fold, row), not all of one size."""
    masks = np.stack([np.arange(rows) % n != k for k in range(n)])
    masks[0, : rows // 8] = False
    return masks


def reference(estimator, features, targets, standardise):
    """scikit-learn's coefficients and intercept, in the units of the features."""
    scaler = StandardScaler(with_std=standardise).fit(features)
    fitted = estimator.fit(scaler.transform(features), targets)
    coef = np.ravel(fitted.coef_) / (scaler.scale_ if standardise else 1.0)
    return coef, np.ravel(fitted.intercept_)[0] - coef @ scaler.mean_


def ridge(penalty):
    return Ridge(alpha=penalty)


def logistic(penalty):
    return LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-13, max_iter=50)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(("rows", "width", "share"), [(40, 12, 0.5), (32, 50, 0.5), (72, 20, 0.15), (30, 24, 0.3)])
@pytest.mark.parametrize(("path", "estimator"), [(ridge_path, ridge), (logistic_path, logistic)])
def test_coefficients_are_those_of_scikit_learn(path, estimator, rows, width, share, standardise, device):
    features, quantity, label = drawn(rows, width, share=share)
    targets = quantity if path is ridge_path else label
    masks = folds(rows)
    found = path(
        torch.from_numpy(features),
        torch.from_numpy(targets),
        PENALTIES,
        torch.from_numpy(masks).expand(len(features), -1, -1),
        standardise=standardise,
        device=device,
    )
    assert found.coef.shape == (len(features), len(masks), len(PENALTIES), width)
    for problem, states in enumerate(features):
        for fold, mask in enumerate(masks):
            for i, penalty in enumerate(PENALTIES):
                coef, intercept = reference(estimator(penalty), states[mask], targets[mask], standardise)
                np.testing.assert_allclose(found.coef[problem, fold, i].cpu(), coef, rtol=1e-6, atol=1e-6)
                assert found.intercept[problem, fold, i].item() == pytest.approx(intercept, rel=1e-6, abs=1e-6)


def test_separable_data_converge_at_a_weak_penalty():
    features, _, _ = drawn(40, 6, problems=1)
    targets = (features[0, :, 0] > features[0, :, 0].mean()).astype(float)
    path = logistic_path(torch.from_numpy(features), torch.from_numpy(targets), [1e-6, 1e-2])
    for i, penalty in enumerate([1e-6, 1e-2]):
        logits = features[0] @ path.coef[0, i].numpy() + path.intercept[0, i].item()
        errors = targets - 1 / (1 + np.exp(-logits))
        assert penalty > 1e-6 or ((logits > 0) == (targets == 1)).all()
        # Where the loss is least, its gradient is 0: penalty · w = Σ error · x and Σ error = 0.
        np.testing.assert_allclose(errors.sum(), 0, atol=1e-9)
        np.testing.assert_allclose(penalty * path.coef[0, i].numpy(), errors @ features[0], atol=1e-8)


def test_folds_of_one_problem_are_as_problems_of_their_own():
    features, quantity, _ = drawn(30, 8, problems=1)
    masks = torch.from_numpy(folds(30))
    states, targets = torch.from_numpy(features), torch.from_numpy(quantity)
    together = ridge_path(states, targets, PENALTIES, masks[None])
    apart = ridge_path(states.expand(3, -1, -1), targets, PENALTIES, masks)
    torch.testing.assert_close(together.coef[0], apart.coef, rtol=0, atol=1e-12)


def test_rows_outside_the_training_set_change_nothing():
    features, _, label = drawn(30, 40, problems=1)
    mask = torch.arange(30)[None] < 20
    other = features.copy()
    other[0, 20:] *= 1e3
    for standardise in (False, True):
        paths = [
            logistic_path(torch.from_numpy(states), torch.from_numpy(label), [1.0], mask, standardise=standardise)
            for states in (features, other)
        ]
        torch.testing.assert_close(paths[0].coef, paths[1].coef, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("at_a_time", [1, 4])
def test_how_many_are_solved_at_a_time_changes_nothing(at_a_time, monkeypatch):
    features, quantity, _ = drawn(20, 30, problems=3)
    whole = ridge_path(torch.from_numpy(features), torch.from_numpy(quantity), PENALTIES)
    monkeypatch.setattr(solvers, "PROBLEMS_AT_A_TIME", at_a_time)
    torch.testing.assert_close(whole, ridge_path(torch.from_numpy(features), torch.from_numpy(quantity), PENALTIES))


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("width", [9, 50])
def test_a_batch_finds_what_each_training_set_finds_alone(width, standardise, monkeypatch):
    """Training sets of different sizes, some of them separable, which need more steps and shorter ones than the others."""
    features, _, label = drawn(40, width)
    label = np.where(np.arange(len(features))[:, None] == 0, features[0, :, 0] > features[0, :, 0].mean(), label)
    masks = torch.stack([torch.arange(40) % 7 < kept for kept in (7, 5, 3)]).expand(len(features), -1, -1)
    states, targets = torch.from_numpy(features), torch.from_numpy(label.astype(float))
    monkeypatch.setattr(solvers, "BATCH_BYTES", {"cpu": 1})
    alone = logistic_path(states, targets, [1e-4, 1.0], masks, standardise=standardise)
    monkeypatch.setattr(solvers, "BATCH_BYTES", {"cpu": 2**30})
    together = logistic_path(states, targets, [1e-4, 1.0], masks, standardise=standardise)
    torch.testing.assert_close(together, alone, rtol=1e-7, atol=1e-9)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(1e-2, 1e2), rows=st.sampled_from([12, 25]))
def test_scaled_features_scale_the_direction_back(seed, scale, rows):
    features, quantity, label = drawn(rows, 16, problems=1, seed=seed)
    for path, targets in ((ridge_path, quantity), (logistic_path, label)):
        plain = path(torch.from_numpy(features), torch.from_numpy(targets), [1.0])
        scaled = path(torch.from_numpy(features * scale), torch.from_numpy(targets), [scale**2])
        torch.testing.assert_close(scaled.coef * scale, plain.coef, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(scaled.intercept, plain.intercept, rtol=1e-5, atol=1e-7)
    mean = MeanDifferenceProbe().fit(features[0], label)
    np.testing.assert_allclose(MeanDifferenceProbe().fit(features[0] * scale, label).coef_, mean.coef_ * scale)


CLASSIFIERS = [LogisticProbe(0.5), MeanDifferenceProbe(), MassMeanProbe(True), MassMeanProbe(False)]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
@pytest.mark.parametrize("probe", CLASSIFIERS, ids=str)
def test_flipped_labels_negate_the_probe_and_row_order_does_not_matter(probe, seed):
    features, _, label = drawn(24, 8, problems=1, seed=seed)
    fitted = clone(probe).fit(features[0], label)
    flipped = clone(probe).fit(features[0], 1 - label)
    np.testing.assert_allclose(flipped.coef_, -fitted.coef_, rtol=1e-6, atol=1e-8)
    assert flipped.intercept_ == pytest.approx(-fitted.intercept_, rel=1e-6, abs=1e-7)
    order = np.random.default_rng(seed).permutation(24)
    np.testing.assert_allclose(clone(probe).fit(features[0][order], label[order]).coef_, fitted.coef_, rtol=1e-6)


def test_the_mass_mean_probe_is_the_pseudo_inverse_times_the_difference():
    """As `MMProbe` of Geometry of Truth computes it, with fewer rows than features too."""
    for rows, width in ((40, 6), (20, 30)):
        features, _, label = drawn(rows, width, problems=1)
        positive, negative = features[0][label == 1], features[0][label == 0]
        centred = torch.from_numpy(np.concatenate([positive - positive.mean(0), negative - negative.mean(0)]))
        inverse = torch.linalg.pinv(centred.T @ centred / rows, hermitian=True, atol=1e-3)
        expected = inverse.numpy() @ (positive.mean(0) - negative.mean(0))
        probe = MassMeanProbe().fit(features[0], label)
        np.testing.assert_allclose(probe.coef_, expected, rtol=1e-6, atol=1e-8)
        halfway = (positive.mean(0) + negative.mean(0)) / 2
        assert probe.decision_function(halfway[None])[0] == pytest.approx(0, abs=1e-8)


def test_the_mean_difference_probe_by_hand():
    states, labels = np.array([[0.0, 0], [2, 0], [1, 4], [5, 4]]), np.array(["a", "a", "b", "b"])
    for probe in (MeanDifferenceProbe(), MassMeanProbe(covariance=False)):
        probe.fit(states, labels)
        np.testing.assert_array_equal(probe.coef_, [2.0, 4.0])  # of the means (1, 0) and (3, 4)
        assert probe.intercept_ == -(2 * 2 + 4 * 2)
        assert list(probe.predict([[2.0, 2.0], [2.0, 2.1]])) == ["a", "b"]  # half-way is not yet the positive class
    weak = MassMeanProbe(atol=0.5).fit(states, labels)  # of the variances 2.5 and 0 within the classes one is kept
    np.testing.assert_allclose(weak.coef_, [2 / 2.5, 0], atol=1e-12)
    with pytest.raises(InputError, match="above atol = 3 "):
        MassMeanProbe(atol=3).fit(states, labels)


@pytest.mark.parametrize("standardise", [False, True])
def test_probes_scale_the_rows_if_asked_to(standardise):
    features, quantity, label = drawn(40, 6, problems=1)
    fitted = RidgeProbe(7.0, standardise=standardise).fit(features[0], quantity)
    coef, intercept = reference(ridge(7.0), features[0], quantity, standardise)
    np.testing.assert_allclose([*fitted.coef_, fitted.intercept_], [*coef, intercept], rtol=1e-6)
    sure = LogisticProbe(0.1, standardise=standardise).fit(features[0], label)
    coef, intercept = reference(logistic(10.0), features[0], label, standardise)
    np.testing.assert_allclose([*sure.coef_, sure.intercept_], [*coef, intercept], rtol=1e-6)
    assert not RidgeProbe().standardise and not LogisticProbe().standardise
    assert RidgeProbe().alpha == LogisticProbe().C == LassoProbe().alpha == 1 and MassMeanProbe().covariance


def test_estimators_are_scikit_learns():
    features, quantity, label = drawn(60, 5, problems=1)
    names = np.where(label == 1, "yes", "no")
    probe = make_pipeline(StandardScaler(), LogisticProbe(C=2.0)).fit(features[0], names)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=2.0, tol=1e-10)).fit(features[0], names)
    np.testing.assert_array_equal(probe.predict(features[0]), theirs.predict(features[0]))
    np.testing.assert_allclose(probe.predict_proba(features[0]), theirs.predict_proba(features[0]), atol=1e-6)
    assert probe.score(features[0], names) == theirs.score(features[0], names)
    ours = clone(RidgeProbe(alpha=3.0)).fit(features[0], quantity)
    assert ours.score(features[0], quantity) == pytest.approx(
        Ridge(3.0).fit(features[0], quantity).score(features[0], quantity)
    )
    lasso = LassoProbe(alpha=0.3).fit(features[0], quantity)
    np.testing.assert_allclose(lasso.coef_, Lasso(alpha=0.3, max_iter=10_000).fit(features[0], quantity).coef_)
    assert (lasso.coef_ == 0).any()


@pytest.mark.parametrize("estimator", [RidgeProbe(), LassoProbe(), *CLASSIFIERS], ids=str)
def test_estimators_refuse_what_they_cannot_fit(estimator):
    features, _, label = drawn(12, 4, problems=1)
    for spoilt in (np.nan, np.inf):
        broken = features[0].copy()
        broken[3, 2] = spoilt
        with pytest.raises(InputError, match="NaN or infinite"):
            clone(estimator).fit(broken, label)
    with pytest.raises(InputError, match="shape"):
        clone(estimator).fit(features[0], label[:-1])
    with pytest.raises(InputError, match="this probe needs"):
        clone(estimator).fit(features[0], label).predict(features[0][:, :2])
    with pytest.raises(InputError, match="2 rows at least"):
        clone(estimator).fit(features[0][:1], label[:1])
    with pytest.raises(InputError, match="a target is NaN"):
        clone(estimator).fit(features[0], np.where(label == 1, np.nan, 0))
    with pytest.raises(InputError, match="shape"):
        clone(estimator).fit(features, label)
    with pytest.raises(InputError, match="C is 0"):
        LogisticProbe(C=0).fit(features[0], label)


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=str)
def test_one_class_is_refused(estimator):
    features, _, _ = drawn(12, 4, problems=1)
    with pytest.raises(InputError, match="1 classes among 12 rows"):
        clone(estimator).fit(features[0], np.ones(12))


def test_mass_mean_needs_variance_within_the_classes():
    with pytest.raises(InputError, match="no variance within the classes"):
        MassMeanProbe().fit(np.array([[0.0, 1.0], [1.0, 1.0]]), [0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 2)}, "features of shape"),
        ({"features": torch.full((1, 4, 2), torch.nan)}, "activation is NaN"),
        ({"targets": torch.tensor([0.0, 1.0, torch.nan, 1.0])}, "target is NaN"),
        ({"targets": torch.zeros(3)}, "targets of shape"),
        ({"targets": torch.tensor([0.0, 1.0, 2.0, 1.0])}, "other than 0 and 1"),
        ({"penalties": [0.0]}, "penalties"),
        ({"penalties": []}, "penalties"),
        ({"mask": torch.ones(2, 4)}, "mask of shape"),
        ({"mask": torch.tensor([[1, 0, 0, 0]])}, "fewer than 2 rows"),
        ({"mask": torch.tensor([[1, 0, 1, 0]])}, "one class only"),
    ],
)
def test_the_solvers_refuse_bad_input(change, message):
    given_ = {"features": torch.eye(4)[None], "targets": torch.tensor([0.0, 1.0, 0.0, 1.0]), "penalties": [1.0]}
    with pytest.raises(InputError, match=message):
        logistic_path(**(given_ | change))


@pytest.fixture
def kept():
    return LinearProbe(
        coef=np.array([1.0, -2.0, 0.5]),
        intercept=0.25,
        site=SITE,
        task="binary",
        method="LogisticProbe",
        model=MODEL,
        provenance={"rows": 12},
    )


def test_a_kept_probe_comes_back_as_it_was(kept, tmp_path):
    kept.save(tmp_path / "p.safetensors")
    again = LinearProbe.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(again.coef, kept.coef)
    for name in ("intercept", "site", "task", "method", "model", "provenance"):
        assert getattr(again, name) == getattr(kept, name)
    states = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    np.testing.assert_array_equal(again.scores(states), states @ kept.coef + 0.25)
    np.testing.assert_allclose(again.probabilities(states), 1 / (1 + np.exp(-again.scores(states))))
    np.testing.assert_allclose(again.direction, np.array([1.0, -2.0, 0.5]) / np.sqrt(5.25))
    with pytest.raises(InputError, match="all 0"):
        _ = replace(kept, coef=np.zeros(3)).direction
    assert kept.scores(states[0, 0]) == states[0, 0] @ kept.coef + 0.25


def test_a_kept_pipeline_reads_raw_activations():
    features, quantity, label = drawn(40, 5, problems=1)
    for probe, targets, method in ((LogisticProbe(), label, "decision_function"), (RidgeProbe(), quantity, "predict")):
        pipeline = make_pipeline(StandardScaler(), probe).fit(features[0], targets)
        kept = LinearProbe.of(pipeline, site=SITE, model=MODEL)
        np.testing.assert_allclose(kept.scores(features[0]), getattr(pipeline, method)(features[0]))
        assert kept.task == ("binary" if targets is label else "regression")
        assert (kept.method, kept.site, kept.model) == (type(probe).__name__, SITE, MODEL)
        assert kept.provenance == {"parameters": probe.get_params()}
        again = LinearProbe.of(pipeline[-1], site=SITE, model=MODEL, provenance={"rows": 40})
        assert again.provenance == {"parameters": probe.get_params(), "rows": 40}
    for without in ({"with_mean": False}, {"with_std": False}, {"with_mean": False, "with_std": False}):
        pipeline = make_pipeline(StandardScaler(**without), RidgeProbe()).fit(features[0], quantity)
        kept = LinearProbe.of(pipeline, site=SITE, model=MODEL)
        np.testing.assert_allclose(kept.scores(features[0]), pipeline.predict(features[0]))
    with pytest.raises(InputError, match="no probabilities"):
        kept.probabilities(features[0])
    with pytest.raises(InputError, match="fit it first"):
        LinearProbe.of(RidgeProbe(), site=SITE, model=MODEL)
    with pytest.raises(InputError, match="more steps than a StandardScaler"):
        LinearProbe.of(make_pipeline(StandardScaler(), StandardScaler(), RidgeProbe()), site=SITE, model=MODEL)


def test_another_site_model_width_or_nan_is_refused(kept):
    kept.check(SITE, {**MODEL, "name": "a copy of it elsewhere"})
    with pytest.raises(SiteError, match=r"resid_post\.3"):
        kept.check(Site("resid_post", 3), MODEL)
    with pytest.raises(InputError, match="differs in weights from"):
        kept.check(SITE, {**MODEL, "weights": "other"})
    with pytest.raises(InputError, match="differs in tokenizer from"):
        kept.check(SITE, {**MODEL, "tokenizer": "other"})
    with pytest.raises(InputError, match="differs in weights from"):
        kept.check(SITE, {"name": "a server's text, of which nothing is known"} | {"tokenizer": MODEL["tokenizer"]})
    with pytest.raises(InputError, match="last axis of this probe is 3"):
        kept.scores(np.zeros((2, 4)))
    with pytest.raises(InputError, match="last axis of this probe is 3"):
        kept.scores(1.0)
    with pytest.raises(InputError, match="NaN"):
        kept.scores([0.0, np.nan, 0.0])


@pytest.mark.parametrize(
    "change",
    [
        {"coef": np.array([np.nan])},
        {"coef": np.zeros((2, 2))},
        {"intercept": np.inf},
        {"task": "ordinal"},
        {"coef": np.zeros(0)},
        {"coef": np.zeros(3, dtype=np.float32)},
    ],
)
def test_an_invalid_probe_is_refused(kept, change):
    arguments = {name: getattr(kept, name) for name in kept.__dataclass_fields__}
    with pytest.raises(InputError):
        LinearProbe(**(arguments | change))


def test_a_probe_judges_only_problems_that_it_did_not_learn_from(kept):
    def trace(id, group):
        problem = Problem(id=id, prompt="q", group=group)
        return trace_from_text(id=f"{id}/0", problem=problem, prompt="q<think>\n", completion="a\n</think>\n\nb")

    old, twin, new = trace("old", ""), trace("twin", "old"), trace("new", "")
    knows = replace(kept, provenance={"learned_from": ["old"]})
    assert knows.unseen([old, new, twin]) == [new]
    with pytest.raises(InputError, match="all 2 traces"):
        knows.unseen([old, twin])
    with pytest.raises(InputError, match="does not say which problems"):
        kept.unseen([new])


def test_files_that_are_not_probes_are_refused(kept, tmp_path):
    path = tmp_path / "p.safetensors"

    def refused(match):
        with pytest.raises(InputError, match=match):
            LinearProbe.load(path)

    refused("does not exist; give the file of a probe")
    torch.save({"coef": torch.zeros(3)}, path)
    refused("is not a probe but a pickle")
    tensors = {"coef": np.zeros(3), "intercept": np.zeros(1)}
    save_file(tensors, path)
    refused("not a probe that reasonscope saved")
    save_file(tensors, path, metadata={"reasonscope.probe": json.dumps({"version": 2})})
    refused("newer than 1")
    save_file(tensors, path, metadata={"reasonscope.probe": json.dumps({"version": 1})})
    refused("damaged")
    kept.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + np.array([np.nan]).tobytes())
    refused("NaN")
    path.write_bytes(whole[:-8])
    refused("is not a probe")


def test_a_probe_reads_the_same_weights_in_another_dtype(kept):
    """Their bytes differ, and so does the hash; what else is known has to agree."""
    here = {**MODEL, "architecture": "qwen2"}
    probe = replace(kept, model={**here, "dtype": "float32"})
    probe.check(SITE, {**here, "dtype": "bfloat16", "weights": "the same in 16 bits"})
    with pytest.raises(InputError, match="differs in architecture from"):
        probe.check(SITE, {**here, "dtype": "bfloat16", "architecture": "llama"})
    with pytest.raises(InputError, match="differs in weights from"):
        probe.check(SITE, {**here, "dtype": "float32", "weights": "others"})
