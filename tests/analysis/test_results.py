"""A result knows its axes, keeps its null, and comes back from disk as it went."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from reasonscope.analysis.results import Axis, Band, Result, load_results, result_path, undefined
from reasonscope.data.errors import InputError


def result(**changes):
    values = np.array([[0.1, np.nan, 0.3], [1.0, 2.0, 3.0]])
    given = {
        "method": "anchors",
        "quantity": "importance",
        "unit": "nats",
        "axes": (Axis.of("metric", ("accuracy", "kl")), Axis.of("sentence", 3)),
        "values": values,
        "null": Band.of(0.0, values.max(axis=1, keepdims=True, initial=9, where=False), (2, 3), "shuffled"),
        "interval": Band.of(-1, 1, (2, 3), "bootstrap"),
        "reason": "sentence 1: no rollout answered",
        "arrays": {"peaks": np.array([2])},
        "numbers": {"p": 0.5, "rates": [1, np.nan]},
        "provenance": {"trace": "a/0"},
    }
    return Result(**{**given, **changes})


def test_a_result_comes_back_as_it_was_saved(tmp_path):
    saved = result()
    path = saved.save(result_path(tmp_path, "anchors", "a/0"))
    assert path == tmp_path / "anchors" / "a%2F0.safetensors"
    (loaded,) = load_results(tmp_path)
    for name in ("method", "quantity", "unit", "axes", "reason", "provenance"):
        assert getattr(loaded, name) == getattr(saved, name)
    np.testing.assert_array_equal(loaded.values, saved.values)
    np.testing.assert_array_equal(loaded.null.high, saved.null.high)
    assert loaded.interval.what == "bootstrap"
    assert loaded.numbers == {"p": 0.5, "rates": [1, None]}
    np.testing.assert_array_equal(loaded.arrays["peaks"], [2])
    np.testing.assert_array_equal(loaded.at(metric="kl"), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.zeros((2, 2))}, "its axes are"),
        ({"reason": ""}, "without a reason"),
        ({"values": np.full((2, 3), np.inf)}, "infinite"),
        ({"values": np.zeros((2, 3)), "reason": "", "null": None}, "the null is missing"),
    ],
)
def test_a_result_that_hides_something_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        result(**changes)


def test_other_files_are_no_results(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x04pickle")
    save_file({"x": np.zeros(1)}, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        with pytest.raises(InputError, match="not a result"):
            Result.load(tmp_path / f"{name}.safetensors")


def test_an_undefined_result_says_why(tmp_path):
    nothing = undefined(method="trajectory", quantity="net change", unit="1", reason="one segment")
    assert not nothing.measured and nothing.reason == "one segment"
    assert np.isnan(Result.load(nothing.save(tmp_path / "x.safetensors")).values).all()
    with pytest.raises(InputError, match="no axis"):
        nothing.at(layer="1")


def test_the_file_of_a_long_name_is_short_and_its_own(tmp_path):
    one, other = (result_path(tmp_path, "mi", "€" * 300 + end) for end in "ab")
    assert len(one.name) < 255 and one != other and one == result_path(tmp_path, "mi", "€" * 300 + "a")
