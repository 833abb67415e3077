"""Answers of a slow server, stored as lines of JSON as they arrive, so that a process that was killed does not ask again."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from reasonscope.data.errors import StoreError
from reasonscope.data.storage.durable import make_folder


class ResponseCache:
    """The answers in the JSONL files of `folder`. Each process writes a file of its own, so that several can write at the same time.

    A truncated last line (the writer was killed) is ignored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Any:
        """The value of `key`, or None."""
        return self._found.get(key)

    def put(self, key: str, value: Any) -> None:
        """Store `value` (JSON). Raises StoreError if it cannot be written."""
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
        except OSError as error:
            raise StoreError(f"cannot write {self._file}: {error}; make room and run it again") from error
        self._found[key] = value

    @cached_property
    def _file(self) -> Path:
        make_folder(self._folder)
        return self._folder / f"{uuid4().hex}.jsonl"

    @cached_property
    def _found(self) -> dict[str, Any]:
        rows = (row for path in sorted(self._folder.glob("*.jsonl")) for row in _rows(path))
        return {row["key"]: row["value"] for row in rows}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:  # the end of a file is an empty or a truncated line
            continue
    return rows
