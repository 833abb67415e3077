"""Arrays with a header: what is written is read, and nothing else is."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.data.headed import Kind

KIND = Kind(key="reasonscope.thing", noun="thing", version=2)


def test_what_is_written_is_read(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    KIND.write(tmp_path / "x", {"name": "é"}, arrays)
    header, again = KIND.read(tmp_path / "x")
    assert header == {"version": 2, "name": "é"}
    np.testing.assert_array_equal(again["a"], arrays["a"])


def test_other_files_are_refused(tmp_path):
    def refused(match):
        with pytest.raises(InputError, match=match):
            KIND.read(tmp_path / "x")

    refused("is no thing: .*give a file that reasonscope saved")
    for metadata, match in (
        (None, "but no thing"),
        ({"reasonscope.other": "{}"}, "but no thing"),
        ({KIND.key: "[1]"}, "but no thing"),
        ({KIND.key: "{"}, "the header of .*x: no JSON"),
        ({KIND.key: json.dumps({"version": 3})}, "newer than 2"),
    ):
        save_file({"a": np.zeros(1)}, tmp_path / "x", metadata=metadata)
        refused(match)
    with pytest.raises(ValueError, match="JSON"):
        KIND.write(tmp_path / "y", {"score": float("nan")}, {})
