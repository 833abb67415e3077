"""A file that a reader uploads: how much of it is accepted, and that it is removed completely."""

import json
import tempfile
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from reasonscope.app.server import main

LINE = json.dumps({"prompt": "a?", "completion": "<think>\nOne. Two.\n</think>\n\n2"}).encode() + b"\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where uploads go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def app(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "", str(folder / "runs")])
    test = AppTest.from_file(main.__file__, default_timeout=60).run()
    yield test
    if main._UPLOADED in test.session_state:
        test.session_state[main._UPLOADED].cleanup()


def given(app, content: bytes) -> AppTest:
    return app.file_uploader[0].set_value(("mine.jsonl", content, "application/jsonl")).run()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("reasonscope-upload-*/*"))


def test_an_upload_is_opened_and_the_one_before_goes(app, folder):
    assert given(app, LINE).header[0].value == "Run uploaded"
    (first,) = folder.glob("reasonscope-upload-*")
    given(app, LINE * 3)
    (second,) = folder.glob("reasonscope-upload-*")
    assert first != second and left(folder) == ["uploaded"]
    assert not app.error and not app.exception


@pytest.mark.parametrize("content", [b"", b"{", LINE + b'{"prompt": 1}', b'{"completion":""}\n' * 60_000])
def test_a_bad_upload_says_what_is_wrong_and_leaves_nothing(content, app, folder):
    assert len(given(app, content).error) == 1
    assert left(folder) == [] == [*folder.glob("reasonscope-upload-*")]
    assert given(app, LINE).header[0].value == "Run uploaded" and not app.error


def test_too_many_lines_are_refused_before_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("reasonscope.data.exchange.importers.import_jsonl", lambda path: pytest.fail("read"))
    with pytest.raises(main.InputError, match="reasonscope import"):
        main._import(LINE * (main._MOST_LINES + 1), tmp_path)


def test_as_many_lines_as_may_be_are_taken(tmp_path):
    main._import(LINE * main._MOST_LINES + b"\n\n", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["uploaded"]
