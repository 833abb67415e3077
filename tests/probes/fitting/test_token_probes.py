"""Probes of all tokens find a planted token that the mean hides, are the same each time, and mean nothing on labels that mean nothing."""

from itertools import pairwise

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.ranks import auroc
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.sweep import sweep
from reasonscope.probes.fitting.token_probes import TokenProbe, held_out_token_probes, load_probe

SITES = [Site("resid_post", 0), Site("resid_post", 1)]
GROUPS = [f"{i}" for i in range(80)]


@pytest.fixture(scope="module")
def planted():
    """80 spans of 20 to 40 tokens. In class 1 one token points along dimension 2; in class 0 ten tokens a tenth as far: the means agree."""
    rng = np.random.default_rng(0)
    labels = (rng.permutation(80) < 40).astype(np.float64)
    noise = [[rng.standard_normal((int(n), 6)).astype(np.float32) for n in rng.integers(20, 40, 80)] for _ in SITES]
    for span, label in zip(noise[1], labels, strict=True):
        at = rng.permutation(len(span))[: 1 if label else 10]
        span[at, 2] += 10 / len(at)
    return noise, labels


@pytest.fixture(scope="module", params=["attention", "multi-max"])
def found(request, planted):
    return fitted(request.param, *planted)


def fitted(kind, layers, labels, task="binary", n_permutations=19):
    return held_out_token_probes(
        layers, labels, GROUPS, SITES, kind=kind, task=task, model={}, provenance={"a": 1}, n_permutations=n_permutations, folds=4
    )  # fmt: skip


def test_they_find_the_token_that_the_mean_hides(planted, found):
    layers, labels = planted
    assert auroc(labels, found.scores) > 0.9
    means = np.stack([np.stack([span.mean(axis=0) for span in spans]) for spans in layers], axis=1)[:, :, None]
    assert auroc(labels, sweep(means, labels, GROUPS, task="binary", folds=4).predictions) < 0.7
    assert found.final.site == SITES[1]
    assert found.by_layer[1] > 0.9 > found.by_layer[0]
    assert (found.shuffled.p_value, found.shuffled.observed) == (1 / 20, pytest.approx(auroc(labels, found.scores)))
    assert abs(found.shuffled.null.mean() - 0.5) < 0.1


def test_the_weights_are_on_that_token(planted, found):
    layers, labels = planted
    spans = [span for span, label in zip(layers[1], labels, strict=True) if label]
    hits = [found.final.weights(span).argmax() == span[:, 2].argmax() for span in spans]
    assert np.mean(hits) > 0.9
    assert found.final.weights(spans[0]).sum() == pytest.approx(1)


def test_scores_run_along_the_span(planted, found):
    layers, _ = planted
    span = layers[1][0]
    whole = found.final.scores(span)
    assert whole.shape == (len(span),)
    assert [found.final.scores(span[:n])[-1] for n in (1, 5, len(span))] == pytest.approx(whole[[0, 4, -1]].tolist())
    if found.final.method == "multi-max":
        assert all(before <= after + 1e-12 for before, after in pairwise(whole))


def test_the_same_seed_gives_the_same_probe(planted):
    layers, labels = planted
    one, other = (fitted("attention", layers[1:], labels, n_permutations=1) for _ in range(2))
    assert np.array_equal(one.final.values, other.final.values)
    assert np.array_equal(one.scores, other.scores)


def test_numbers_are_predicted_in_their_own_units(planted):
    layers, _ = planted
    highest = np.array([span[:, 2].max() for span in layers[1]]) * 7 + 100
    found = fitted("multi-max", layers[1:], highest, task="regression", n_permutations=1)
    assert np.corrcoef(found.scores, highest)[0, 1] > 0.9
    assert np.abs(found.scores - highest).mean() < highest.std() / 2
    assert found.final.task == "regression"


def test_a_probe_survives_its_file(planted, found, tmp_path):
    path = tmp_path / "probe.safetensors"
    found.final.save(path)
    read, span = load_probe(path), planted[0][1][3]
    assert isinstance(read, TokenProbe)
    assert read.provenance["learned_from"] == sorted(GROUPS)
    assert np.array_equal(read.scores(span), found.final.scores(span))
    with pytest.raises(InputError, match="this probe reads"):
        read.scores(span[:, :4])
    with pytest.raises(InputError, match="do not fit"):
        TokenProbe(
            values=np.ones((2, 3)),
            queries=np.ones((1, 3)),
            intercept=0.0,
            site=SITES[0],
            task="binary",
            method=read.method,
            model={},
        )
