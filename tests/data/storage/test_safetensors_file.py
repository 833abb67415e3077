"""Arrays with a header: what is written is read, and nothing else is."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.data.storage import safetensors_file
from reasonscope.data.storage.durable import sha256_of
from reasonscope.data.storage.safetensors_file import DTYPES, SafetensorsFormat, write_arrays

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


def test_safetensors_reads_what_was_concatenated(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_PIECE", 64)  # bytes: the disk is told many times
    rng = np.random.default_rng(0)
    arrays = {
        name: [(9 * rng.standard_normal((n, 3, 2))).astype(name) for n in (4, 0, 7)]
        for name in DTYPES
        if name != "bfloat16"
    }
    arrays["bfloat16"] = [rng.standard_normal((n, 5)).astype(ml_dtypes.bfloat16) for n in (1, 2)]
    arrays["turned"] = [np.arange(6.0).reshape(2, 3).T]
    arrays["numbers"] = [np.arange(3), np.arange(2)]
    arrays["no rows"] = [np.zeros((0, 4), dtype=np.float32)]
    digest = write_arrays(tmp_path / "x", arrays)
    assert digest == sha256_of(tmp_path / "x")
    with safe_open(tmp_path / "x", framework="np") as file:
        assert set(file.keys()) == set(arrays)
        for name, parts in arrays.items():
            found = file.get_tensor(name)
            assert found.dtype == parts[0].dtype
            np.testing.assert_array_equal(found, np.concatenate(parts))


def test_a_disk_that_takes_few_bytes_at_a_time_gets_all(tmp_path, monkeypatch):
    write = safetensors_file.os.write
    monkeypatch.setattr(safetensors_file.os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    digest = write_arrays(tmp_path / "x", {"a": [np.arange(200)]})
    assert digest == sha256_of(tmp_path / "x")
    monkeypatch.setattr(safetensors_file.os, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_arrays(tmp_path / "y", {"a": [np.arange(200)]})
