"""Steering vectors: round trip, algebra, the random control, and files that are none."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.probes.sites import Site
from reasonscope.steering import SteeringVector

SITE = Site("resid_post", 2)


@pytest.fixture
def vector():
    direction = np.array([3.0, 0.0, 4.0], dtype=np.float32)
    return SteeringVector(directions={SITE: direction}, method="seal", provenance={"steps": {"execution": 2}})


def test_round_trip(vector, tmp_path):
    vector.save(tmp_path / "v.safetensors")
    again = SteeringVector.load(tmp_path / "v.safetensors")
    assert (again.method, again.provenance) == (vector.method, vector.provenance)
    np.testing.assert_array_equal(again.directions[SITE], vector.directions[SITE])


def test_algebra_and_norm(vector):
    assert vector.norms == {SITE: 5.0}
    np.testing.assert_array_equal((-vector).directions[SITE], [-3, 0, -4])
    assert (2 * vector).norms[SITE] == 10.0


def test_the_random_control_has_the_norm_and_not_the_direction(vector):
    drawn = [vector.random_like(seed) for seed in range(2)]
    assert all(control.norms[SITE] == pytest.approx(5.0) for control in drawn)
    assert not np.allclose(drawn[0].directions[SITE], drawn[1].directions[SITE])
    np.testing.assert_array_equal(vector.random_like(0).directions[SITE], drawn[0].directions[SITE])


def test_files_that_are_no_vector_are_refused(vector, tmp_path):
    path = tmp_path / "v.safetensors"
    torch.save({"direction.2": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="no steering vector"):
        SteeringVector.load(path)
    save_file({"weight": np.zeros(3, dtype=np.float32)}, path)
    with pytest.raises(InputError, match="no steering vector of reasonscope"):
        SteeringVector.load(path)
    vector.save(path)
    path.write_bytes(path.read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(InputError, match="newer"):
        SteeringVector.load(path)
    with pytest.raises(InputError, match="no steering vector"):
        SteeringVector.load(tmp_path / "missing")


@pytest.mark.parametrize("directions", [{}, {SITE: np.array([1.0, np.nan])}, {SITE: np.zeros((2, 2))}])
def test_directions_that_are_none_are_refused(directions):
    with pytest.raises(InputError):
        SteeringVector(directions=directions, method="x")
