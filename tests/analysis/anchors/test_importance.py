"""Importances equal the golden ones in both conventions, and the null of rollouts that do not differ holds their values."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_reference.importance import correctness_kl, match_rate

from reasonscope.analysis.anchors.importance import (
    METRICS,
    SMOOTHING,
    Convention,
    Rollout,
    _answer_kl,
    _importances,
    importance_ends,
    importance_table,
    null_values,
    sentence_effects,
)
from reasonscope.data.errors import InputError

CASES = json.loads((Path(__file__).parents[2] / "golden" / "answer_kl.json").read_text())["cases"]


def cases(kind):
    return [case for case in CASES if case["inputs"]["kind"] == kind]


def rollout(row):
    return Rollout(
        answer=row["answer"],
        correct=row["is_correct"],
        resampled=row.get("resampled", ""),
        similarity=row.get("similarity", 0.0),
    )


@pytest.mark.parametrize("case", cases("kl"), ids=lambda case: case["name"])
def test_golden_kl(case):
    p, q = ([rollout(row) for row in case["inputs"][side]] for side in ("p", "q"))
    expected = case["expected"]
    assert _answer_kl(p, q, smoothing=1e-9) == pytest.approx(expected["answers"], abs=1e-9)
    assert _answer_kl(p, q, smoothing=SMOOTHING) == pytest.approx(expected["answers_laplace"], abs=1e-9)
    assert correctness_kl(p, q, smoothing=1e-9) == pytest.approx(expected["p_correct"], abs=1e-9)
    assert correctness_kl(p, q, smoothing=1.0) == pytest.approx(expected["p_correct_laplace"], abs=1e-9)


@pytest.mark.parametrize("case", cases("importance"), ids=lambda case: case["name"])
def test_golden_importance(case):
    threshold = case["inputs"]["similarity_threshold"]
    chunks = {int(i): [rollout(row) for row in rows] for i, rows in case["inputs"]["chunks"].items()}
    published = _importances(chunks, Convention(variant="published", similarity_threshold=threshold))
    ours = _importances(chunks, Convention(similarity_threshold=threshold, smoothing=1e-9))
    for name, expected in case["expected"].items():
        signs = expected.pop("counterfactual_accuracy")
        assert published[int(name)]["counterfactual_accuracy"] == pytest.approx(signs["reference"], abs=1e-9)
        if np.isfinite(ours[int(name)]["counterfactual_accuracy"]):
            assert ours[int(name)]["counterfactual_accuracy"] == pytest.approx(signs["corrected"], abs=1e-9)
        else:
            assert signs["corrected"] == 0  # what the published code calls zero was never measured
        for metric, value in expected.items():
            assert published[int(name)][metric] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("case", cases("match_rate"))
def test_golden_match_rate(case):
    rates = [
        match_rate(case["inputs"][f"similarity_{side}_sentence"], case["inputs"]["threshold"])
        for side in ("with", "without")
    ]
    assert [*rates, rates[0] - rates[1]] == pytest.approx(list(case["expected"].values()), abs=1e-12)
    with pytest.raises(InputError, match="no rollout"):
        match_rate([], 0.8)


def test_what_was_not_measured_is_nan_and_not_zero():
    silent = {0: [Rollout(answer="", correct=None)] * 3, 1: [Rollout(answer="7", correct=True)] * 3}
    found = _importances(silent)
    assert all(np.isnan(found[0][metric]) for metric in METRICS)
    assert found[1]["accuracy"] == 1 and np.isnan(found[1]["resampling_accuracy"])
    assert _importances(silent, Convention(variant="published"))[0]["resampling_kl"] == 0


def test_the_null_and_the_interval_tell_an_anchor_from_a_filler():
    rng = np.random.default_rng(0)

    def draw(share, n=40):
        right = rng.random(n) < share
        return [Rollout(answer="7" if r else "8", correct=bool(r), resampled=str(i)) for i, r in enumerate(right)]

    rollouts = {0: draw(0.2), 1: draw(0.9), 2: draw(0.9)}
    how = Convention()
    values = importance_table(rollouts, how)
    null = null_values(rollouts, how, n_permutations=100, seed=0)
    assert null.shape == (100, len(METRICS), 3)
    at = METRICS.index("resampling_accuracy")
    low, high = importance_ends(rollouts, how)
    assert values[at, 0] > np.quantile(null[:, at, 0], 0.975) and low[at, 0] > 0 and low[at, 1] < 0 < high[at, 1]
    known = np.isfinite(low)
    assert (low[known] <= values[known]).all() and (values[known] <= high[known]).all() and (low < high)[known].all()
    assert not known[
        [METRICS.index(name) for name in ("resampling_kl", "counterfactual_kl", "overdeterminedness")]
    ].any()
    assert abs(values[at, 1]) < np.quantile(np.abs(null[:, at, 1]), 0.99)


def test_keeping_a_sentence_brings_those_that_hang_on_it():
    unit = np.eye(3)
    with_it, without = [unit[[0, 1]], unit[[1]]], [unit[[2]], np.zeros((0, 3))]
    effects = sentence_effects(unit, {0: without, 1: with_it, 2: [unit[[2]]]}, 0.8)
    np.testing.assert_allclose(effects[1:, 0], [1.0, -0.5])
    assert np.isnan(effects[0]).all() and effects[2, 1] == 1.0
