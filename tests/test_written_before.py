"""What an earlier version wrote still opens: a store, a probe, scores, vectors, results and numbers from before the folders got rooms."""

from pathlib import Path

import numpy as np
import pytest

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.saved_numbers import read_numbers
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.steering.vectors.vector import SteeringVector

WRITTEN = Path(__file__).parent / "fixtures" / "written-before-the-move"
SITE = Site("resid_post", 4)


def test_a_store_opens_and_every_byte_is_as_it_was():
    store = TraceStore.open(WRITTEN / "store")
    assert [len(trace.token_ids) for trace in store] == [213, 197]
    states = store.activations(store.ids[0], str(SITE))
    assert states.shape == (212, 128)
    assert np.abs(states.astype(np.float64)).sum() == pytest.approx(1896948.5867652893)
    assert check_store(WRITTEN / "store") == []


def test_a_probe_and_its_scores_open():
    probe = LinearProbe.load(WRITTEN / "probes" / "length.safetensors")
    assert (probe.site, probe.method, probe.intercept) == (SITE, "ridge", pytest.approx(5.252402141236477))
    store = TraceStore.open(WRITTEN / "store")
    scores = read_scores(WRITTEN / "scores" / "length.safetensors", store.ids)
    found = probe.scores(store.activations(store.ids[0], str(SITE)))
    assert np.allclose(scores.scores[store.ids[0]], found, atol=1e-4)


@pytest.mark.parametrize("name", ["seal.safetensors", "seal.gguf"])
def test_a_vector_opens(name):
    vector = SteeringVector.load(WRITTEN / "steering" / name)
    assert vector.method == "seal"
    assert np.linalg.norm(vector.directions[SITE]) == pytest.approx(662.8709, rel=1e-6)


def test_results_and_numbers_open():
    files = sorted((WRITTEN / "results" / "entropy").iterdir())
    results = [Result.load(file) for file in files]
    assert [(result.method, len(result.axes[-1].labels)) for result in results] == [("entropy", 150), ("entropy", 118)]
    assert np.nanmean(results[0].values) == pytest.approx(0.03941091230965388)
    numbers = read_numbers(WRITTEN / "numbers" / "length.json")
    assert numbers["numbers"]["spearman"]["value"] == pytest.approx(0.9193212899281853)
