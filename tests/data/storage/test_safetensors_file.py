"""Arrays with a header: what is written is read, and nothing else is."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.data.storage.safetensors_file import SafetensorsFormat

KIND = SafetensorsFormat(key="reasonscope.thing", noun="thing", version=2)


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

    refused("does not exist; give the file of a thing")
    for metadata, match in (
        (None, "but not a thing"),
        ({"reasonscope.other": "{}"}, "but not a thing"),
        ({KIND.key: "[1]"}, "but not a thing"),
        ({KIND.key: "{"}, "the header of .*x: not JSON"),
        ({KIND.key: json.dumps({"version": 3})}, "newer than 2"),
        ({KIND.key: json.dumps({"version": "2"})}, "version '2', newer than 2"),
    ):
        save_file({"a": np.zeros(1)}, tmp_path / "x", metadata=metadata)
        refused(match)
    with pytest.raises(ValueError, match="JSON"):
        KIND.write(tmp_path / "y", {"score": float("nan")}, {})


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(InputError, match="not a regular file"):
        KIND.read(tmp_path / "x")


@pytest.mark.parametrize("start", [b"PK\x03\x04" + bytes(20), b"\x80\x04\x95" + bytes(20)])
def test_a_pickle_is_called_one(start, tmp_path):
    (tmp_path / "x").write_bytes(start)
    with pytest.raises(InputError, match="is not a thing but a pickle"):
        KIND.read(tmp_path / "x")


def test_a_header_whose_length_begins_as_a_pickle_does_is_read(tmp_path):
    for length in range(128):
        KIND.write(tmp_path / "x", {"name": "n" * length}, {})
        if (tmp_path / "x").read_bytes().startswith(b"\x80"):
            break
    assert KIND.read(tmp_path / "x")[0]["name"] == "n" * length


def test_headers_lack_nothing_that_their_kind_has():
    kind = SafetensorsFormat(key="k", noun="thing", version=2, fields={"n": int})
    kind.check("x", {"n": 1})  # older than the version field
    kind.check("x", {"version": 2, "n": 1})
    for header in ({}, {"n": "1"}, {"n": True}):
        with pytest.raises(InputError, match="thing x is damaged: its n must be int"):
            kind.check("x", header)
