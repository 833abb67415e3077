"""Steering vectors: round trip, algebra, the random control, and invalid files."""

import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError, MissingExtraError, SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering import SteeringVector, cosine_table
from reasonscope.steering.vectors.vector import covariance_matched

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


def test_a_vector_turned_round_says_so(vector):
    levels = {"towards": {str(SITE): 5.0}, "away": {str(SITE): -1.0}}
    told = replace(vector, sign="towards execution", provenance={**vector.provenance, **levels})
    assert (2 * told).sign == "towards execution" and (2 * told).provenance == told.provenance
    turned = -told
    assert turned.sign == "" and turned.provenance["steps"] == {"execution": 2}
    assert (turned.provenance["towards"], turned.provenance["away"]) == ({str(SITE): -5.0}, {str(SITE): 1.0})
    assert not {"towards", "away"} & (told + told).provenance.keys()


def test_the_random_control_has_the_norm_and_not_the_direction(vector):
    drawn = [vector.random_like(seed) for seed in range(2)]
    assert all(control.norms[SITE] == pytest.approx(5.0) for control in drawn)
    assert not np.allclose(drawn[0].directions[SITE], drawn[1].directions[SITE])
    np.testing.assert_array_equal(vector.random_like(0).directions[SITE], drawn[0].directions[SITE])
    states = {SITE: np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)}
    told = [vector.random_like(0, states=one).provenance["matched"] for one in (None, states)]
    assert told == ["norm and cosines", "norm and covariance"]


def test_a_sum_knows_what_all_of_its_parts_were_learned_from(vector):
    first, second = (replace(vector, provenance={"groups": groups}) for groups in (["b", "a"], ["c"]))
    assert (first + second).provenance["groups"] == ["a", "b", "c"]
    assert "groups_incomplete" not in (first + second).provenance
    partly = first + vector  # which does not say
    assert partly.provenance["groups"] == ["a", "b"] and partly.provenance["groups_incomplete"]
    assert (partly + second).provenance["groups_incomplete"] and (partly + second).provenance["groups"][-1] == "c"
    assert partly.random_like(0).provenance["groups_incomplete"]
    assert not {"groups", "groups_incomplete"} & (vector + vector).provenance.keys()


def test_a_vector_is_read_whatever_the_length_of_its_header(vector, tmp_path):
    first = set()
    for n in range(0, 256, 8):
        path = tmp_path / "v.safetensors"
        replace(vector, provenance={"x": "x" * n}).save(path)
        first.add(path.read_bytes()[0])
        assert SteeringVector.load(path).provenance["x"] == "x" * n
    assert 0x80 in first  # where a pickle begins


def test_files_that_are_not_vectors_are_refused(vector, tmp_path):
    path = tmp_path / "v.safetensors"
    torch.save({"direction.2": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="a pickle"):
        SteeringVector.load(path)
    save_file({"weight": np.zeros(3, dtype=np.float32)}, path)
    with pytest.raises(InputError, match="not a steering vector that reasonscope saved"):
        SteeringVector.load(path)
    vector.save(path)
    path.write_bytes(path.read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(InputError, match="newer"):
        SteeringVector.load(path)
    with pytest.raises(InputError, match="cannot read the steering vector"):
        SteeringVector.load(tmp_path / "missing")


@pytest.mark.parametrize("directions", [{}, {SITE: np.array([1.0, np.nan])}, {SITE: np.zeros((2, 2))}])
def test_invalid_directions_are_refused(directions):
    with pytest.raises(InputError):
        SteeringVector(directions=directions, method="x")


def test_sums_need_the_same_sites_and_width(vector):
    other = SteeringVector(directions={SITE: np.array([0.0, 1.0, 0.0], dtype=np.float32)}, method="asc")
    np.testing.assert_array_equal((vector + other).directions[SITE], [3, 1, 4])
    np.testing.assert_array_equal((vector - other).directions[SITE], [3, -1, 4])
    assert (vector - other).provenance["sum_of"] == ["seal", "asc"]
    with pytest.raises(InputError, match="width 3 and 2"):
        vector + SteeringVector(directions={SITE: np.zeros(2, dtype=np.float32)}, method="x")
    with pytest.raises(SiteError, match=r"at resid_post\.2 and at resid_pre\.3"):
        vector + SteeringVector(directions={Site("resid_pre", 3): np.zeros(3, dtype=np.float32)}, method="x")


def test_the_norm_is_what_the_vector_says(vector):
    unit = vector.normalised()
    assert unit.norm == "unit" and unit.norms[SITE] == pytest.approx(1)
    assert (unit * 2).norm == "raw" and (-unit).norm == "unit"
    with pytest.raises(InputError, match="norm='unit'"):
        SteeringVector(directions=vector.directions, method="x", norm="unit")
    with pytest.raises(SiteError, match="not as wide"):
        SteeringVector(directions={Site("z", 0): np.zeros(3, dtype=np.float32)}, method="x")


def test_the_covariance_matched_control_varies_as_the_states_do(vector):
    states = np.random.default_rng(0).standard_normal((400, 3)) * [10, 1, 0]
    drawn = [vector.random_like(seed, states={SITE: states}).directions[SITE] for seed in range(200)]
    assert all(np.linalg.norm(d) == pytest.approx(5) and d[2] == 0 for d in drawn)
    assert np.abs(drawn)[:, 0].mean() > 4 > 2 > np.abs(drawn)[:, 1].mean()
    assert (
        np.abs([vector.random_like(seed).directions[SITE][2] for seed in range(200)]).mean() > 2
    )  # the round one does not
    with pytest.raises(SiteError, match="no states"):
        vector.random_like(0, states={})
    with pytest.raises(InputError, match="do not vary"):
        vector.random_like(0, states={SITE: np.ones((3, 3))})


def test_cosines_are_compared_with_chance(vector):
    rows = dict(zip("ab", np.eye(2, 64, dtype=np.float32), strict=True))
    wide = {name: SteeringVector(directions={SITE: row}, method=name) for name, row in rows.items()}
    early = SteeringVector(directions={Site("resid_pre", 0): np.ones(64)}, method="x")
    table = cosine_table({**wide, "-a": -wide["a"], "elsewhere": early})
    assert table.sites == (Site("resid_pre", 0), SITE)
    np.testing.assert_allclose(table.cosines[1, :3, :3], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]])
    assert np.isnan(table.cosines[1, 3]).all()
    rng = np.random.default_rng(0)
    pairs = rng.standard_normal((4000, 2, 64))
    cosines = np.abs((pairs[:, 0] * pairs[:, 1]).sum(-1) / np.linalg.norm(pairs, axis=-1).prod(-1))
    assert (cosines > table.chance).mean() == pytest.approx(0.05, abs=0.015)


def test_gguf_round_trip_keeps_what_we_know_and_names_what_others_read(tmp_path):
    sites = {
        Site("resid_pre", 3): np.array([1.0, 2.0], dtype=np.float32),
        Site("resid_post", 5): np.array([3.0, 4.0], dtype=np.float32),
    }
    vector = SteeringVector(
        directions=sites, method="seal", sign="shorter", provenance={"model": {"architecture": "qwen3"}}
    )
    vector.save(tmp_path / "v.gguf")
    again = SteeringVector.load(tmp_path / "v.gguf")
    assert (again.method, again.sign, again.provenance) == ("seal", "shorter", vector.provenance)
    for site, direction in sites.items():
        np.testing.assert_array_equal(again.directions[site], direction)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    text = {
        name: bytes(reader.get_field(name).parts[-1]).decode()
        for name in ("general.architecture", "controlvector.model_hint")
    }
    assert text == {"general.architecture": "controlvector", "controlvector.model_hint": "qwen3"}
    # the input of block 3 is the output of block 2
    assert {t.name: t.data.tolist() for t in reader.tensors} == {"direction.2": [1, 2], "direction.5": [3, 4]}
    assert all(t.tensor_type.name == "F32" and t.data.ndim == 1 for t in reader.tensors)  # llama.cpp takes nothing else


def foreign_gguf(path, architecture="controlvector", tensors=("direction.1", "direction.2"), dtype=np.float32):
    """As repeng and EasySteer write it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for i, name in enumerate(tensors):
        writer.add_tensor(name, np.full(4, i + 1, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_control_vectors_of_others_are_read(tmp_path):
    vector = SteeringVector.load(foreign_gguf(tmp_path / "v.gguf"))
    assert {str(site): direction.tolist() for site, direction in vector.directions.items()} == {
        "resid_post.1": [1] * 4,
        "resid_post.2": [2] * 4,
    }
    assert vector.provenance["model"] == {"architecture": "qwen2"}
    half = SteeringVector.load(foreign_gguf(tmp_path / "h.gguf", dtype=np.float16))
    assert half.directions[SITE].dtype == np.float32


def test_invalid_gguf_files_are_refused(vector, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="of 'llama', not a control vector"):
        SteeringVector.load(foreign_gguf(tmp_path / "m.gguf", architecture="llama"))
    with pytest.raises(InputError, match=r"'output\.weight'"):
        SteeringVector.load(foreign_gguf(tmp_path / "t.gguf", tensors=("output.weight",)))
    with pytest.raises(InputError, match="at least one direction"):
        SteeringVector.load(foreign_gguf(tmp_path / "e.gguf", tensors=()))
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match="damaged or of another format"):
        SteeringVector.load(tmp_path / "b.gguf")
    for site in (Site("resid_post", 0), Site("attn_out", 2)):
        with pytest.raises(InputError, match="output of block 1 or later"):
            SteeringVector(directions={site: np.ones(3, dtype=np.float32)}, method="x").save(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"reasonscope\[gguf\]"):
        vector.save(tmp_path / "v.gguf")


def test_states_too_large_for_a_length_are_refused():
    huge = np.array([[1e300, -1e300], [-1e300, 1e300], [1e300, 1e300]])
    with np.errstate(over="ignore"), pytest.raises(InputError, match="finite numbers"):
        covariance_matched(huge, norm=1.0, seed=0)
