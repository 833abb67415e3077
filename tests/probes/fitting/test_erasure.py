"""LEACE's theorems: idempotent, nothing left to correlate, rare classes too; and what a fresh probe still finds, which is not nothing."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest

from reasonscope.data.errors import InputError, MissingExtraError
from reasonscope.probes.fitting import erasure
from reasonscope.probes.fitting.erasure import fit_eraser, guardedness

pytestmark = pytest.mark.skipif(find_spec("concept_erasure") is None, reason="the extra erasure is not installed")


def labelled(n, d=8, gap=3.0, share=0.5, seed=0):
    """States with correlated dimensions, and a class whose mean lies `gap` away along dimension 2."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < share
    states = rng.standard_normal((n, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)))
    states[:, 2] += gap * labels
    return states, labels


def gap(states, labels):
    return np.abs(states[labels].mean(axis=0) - states[~labels].mean(axis=0)).max()


def test_the_projection_is_idempotent_and_of_rank_one_less():
    states, labels = labelled(500)
    erase = fit_eraser(states, labels)
    assert erase.projection @ erase.projection == pytest.approx(erase.projection, abs=1e-9)
    assert np.linalg.matrix_rank(erase.projection) == 7
    assert erase(erase(states)) == pytest.approx(erase(states))


@pytest.mark.parametrize("share", [0.5, 0.002])
def test_nothing_correlates_with_the_label_any_more(share):
    """With a class of two in a thousand the library alone erases nothing."""
    states, labels = labelled(5000, gap=5.0, share=share)
    erased = fit_eraser(states, labels)(states)
    assert gap(states, labels) > 2
    assert gap(erased, labels) < 1e-6
    assert erased.mean(axis=0) == pytest.approx(states.mean(axis=0))


def test_three_classes_are_erased_at_once():
    rng = np.random.default_rng(0)
    classes = rng.integers(3, size=900)
    states = rng.standard_normal((900, 6)) + 2 * np.eye(6)[classes]
    erased = fit_eraser(states, classes)(states)
    means = np.stack([erased[classes == k].mean(axis=0) for k in range(3)])
    assert means == pytest.approx(np.broadcast_to(means[0], means.shape))


def test_a_fresh_probe_finds_the_concept_before_and_not_after():
    states, labels = labelled(1000)
    found = guardedness(states, labels, [str(i // 2) for i in range(1000)], folds=3)
    assert found.before.low > 0.9
    assert found.after.high < 0.62


def test_with_few_rows_to_a_dimension_much_is_left():
    states, labels = labelled(200, d=64, gap=4.0)
    found = guardedness(states, labels, [str(i) for i in range(200)], folds=3)
    assert found.before.value > found.after.value
    assert fit_eraser(states, labels)(states).shape == states.shape


def test_bad_input_is_named():
    states, labels = labelled(50)
    with pytest.raises(InputError, match="nothing to erase"):
        fit_eraser(states, np.ones(50, dtype=bool))
    with pytest.raises(InputError, match="NaN"):
        fit_eraser(np.full((50, 8), np.nan), labels)
    with pytest.raises(InputError, match="one label per row"):
        fit_eraser(states[:20], labels)
    with pytest.raises(InputError, match="of width 8"):
        fit_eraser(states, labels)(states[:, :4])


def test_the_missing_library_has_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    with pytest.raises(MissingExtraError, match="pip install 'reasonscope\\[erasure\\]'"):
        erasure._leace()
