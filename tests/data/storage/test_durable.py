"""Files are written whole or not at all, and what a killed writer left is removed."""

import hashlib
import os
from pathlib import Path

import pytest

from reasonscope.data.errors import StoreError
from reasonscope.data.storage.durable import make_folder, remove, sha256_of, write_durably, write_text_durably


def test_what_a_killed_writer_left_goes_at_the_next_write(tmp_path):
    (tmp_path / "a.txt.tmp").mkdir()
    (tmp_path / "a.txt.tmp" / ".tmpXYZ").write_text("half")
    write_text_durably(tmp_path / "a.txt", "whole é")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a.txt": "whole é"}
    (tmp_path / "a.txt.tmp").write_text("of an older version")
    write_text_durably(tmp_path / "a.txt", "new")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a.txt": "new"}


@pytest.mark.parametrize("error", [OSError("no room"), ZeroDivisionError()])
def test_what_fails_changes_nothing(error, tmp_path):
    write_text_durably(tmp_path / "a.txt", "before")

    def fail(path):
        path.write_text("half")
        raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else ZeroDivisionError):
        write_durably(tmp_path / "a.txt", fail)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "before"}


def test_what_is_written_has_its_checksum(tmp_path):
    digest = write_durably(tmp_path / "a", lambda path: path.write_bytes(b"abc"))
    assert digest == hashlib.sha256(b"abc").hexdigest() == sha256_of(tmp_path / "a")


def test_what_is_not_a_file_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    for path in ("pipe", "folder", ".", ".."):
        with pytest.raises(StoreError, match="not a regular file"):
            write_text_durably(Path(path), "new")
    assert Path("pipe").is_fifo() and sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in ("file", "file/in", "a/" + "x" * 300):
        with pytest.raises(StoreError, match="cannot make the folder"):
            make_folder(tmp_path / path)


def test_links_are_removed_and_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert (tmp_path / "folder" / "kept").exists() and not (tmp_path / "link").exists()
