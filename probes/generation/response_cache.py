"""Lines of JSON by key, kept as they come: what was asked of somebody slow, so that a process that is killed does not ask again."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from reasonscope.data.errors import StoreError
from reasonscope.data.storage.durable import make_folder


class ResponseCache:
    """What is in the JSONL files of `folder`; each process adds a file of its own, so that several can keep at a time.

    A line that was being written by a process that was killed is none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Any:
        """What was kept under `key`, None where nothing was."""
        return self._found.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep `value` (JSON). Raises StoreError where it cannot be written."""
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
        except ValueError:  # the end of a file is empty, or a line that was cut off
            continue
    return rows
