"""A few of the inputs of `make fuzz` at each run of the suite; what they once broke is tested by name."""

import runpy
from pathlib import Path

import pytest

from reasonscope.analysis.results import Axis, Result
from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import parse_json, wrap_errors

FUZZ = runpy.run_path(str(Path(__file__).with_name("fuzz.py")))


@pytest.mark.parametrize("target", FUZZ["TARGETS"], ids=lambda target: target.name)
def test_no_reader_lets_an_exception_out_hangs_or_writes_elsewhere(target):
    found = FUZZ["fuzz"](target, max(5, int(40 * target.share)), 1)
    assert [finding.what for finding in found] == []


def test_the_fuzzer_finds_what_is_there_to_find():
    def careless(raw, folder):
        if len(raw) > 30:
            (folder.parent / "elsewhere").touch()
        return {}[raw[:1]] if raw[:1] != b"{" else None

    target = FUZZ["Target"](name="careless", corpus=lambda: [b'{"a": 1}'], mutate=FUZZ["bytewise"], read=careless)
    found = FUZZ["fuzz"](target, 300, 0)
    assert any("KeyError" in finding.what for finding in found)
    assert any("outside" in finding.what for finding in found)


@pytest.mark.parametrize("raw", [b"{", b"[" * 100_000, b'"\\ud800"', b"1" * 5000, b"\xff", b""])
def test_invalid_json_is_one_error_that_names_the_place(raw):
    with pytest.raises(InputError, match="line 3"):
        parse_json(raw, "line 3")


def test_our_own_errors_pass_and_mistakes_of_other_kinds_too():
    with pytest.raises(InputError, match=r"^mine$"), wrap_errors("file"):
        raise InputError("mine")
    with pytest.raises(AssertionError), wrap_errors("file"):
        raise AssertionError
    with pytest.raises(InputError, match="file is damaged"), wrap_errors("file"):
        {}["missing"]


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
    written = Result(method="m", quantity="q", unit="1", axes=(Axis.of("token", 1),), values=[0.0], null_missing="none")
    for n in range(256):
        path = written.with_provenance(pad="x" * n).save(tmp_path / "r.safetensors")
        if path.read_bytes()[0] == 0x80:
            assert Result.load(path).provenance["pad"] == "x" * n
            return
    raise AssertionError("one of 256 lengths begins so")
