"""One object per file: its arrays as safetensors, and everything else as JSON in the header, under the name of its
kind."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import write_durably
from reasonscope.data.storage.untrusted import check_fields, parse_json, wrap_errors

# The first bytes of a zip archive (which torch writes) and of a plain pickle.
_PICKLES = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True, kw_only=True)
class SafetensorsFormat:
    """A kind of file: the `key` of the header's metadata, a `noun` for messages, the newest `version` that can be read,
    and the `fields` that the header must have, with their types."""

    key: str
    noun: str
    version: int
    fields: Mapping[str, type] = field(default_factory=dict)

    def write(self, path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write the file whole or not at all. Raises StoreError; ValueError if the header is not JSON or holds NaN."""
        text = json.dumps({"version": self.version, **header}, allow_nan=False)
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_durably(path, lambda file: save_file(tensors, file, metadata={self.key: text}))

    def read(self, path: Path) -> tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]:
        """(header, arrays). Raises InputError for any other file, and for one of a newer version.

        A pickle is never opened. The library itself refuses headers of more than 100 MB and tensors that reach past the
        end of the file.
        """
        self._check_start(path)
        with wrap_errors(f"{path} is not a {self.noun}: it"), safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(self.key, "null")
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = parse_json(text, f"the header of {path}")
        if not isinstance(header, dict):
            raise InputError(f"{path} is a safetensors file, but not a {self.noun} that reasonscope saved")
        self.check(path, header)
        return header, arrays

    def check(self, path: Path, header: Mapping[str, Any]) -> None:
        """Raise InputError for a header of a newer version, or one that lacks a field or has it with another type."""
        if (
            not isinstance(header.get("version", self.version), int)
            or header.get("version", self.version) > self.version
        ):
            raise InputError(
                f"{path} has version {header['version']!r:.60}, newer than {self.version}; upgrade reasonscope"
            )
        check_fields(header, self.fields, f"{self.noun} {path}")

    def _check_start(self, path: Path) -> None:
        if not path.exists():
            raise InputError(f"{path} does not exist; give the file of a {self.noun}")
        if not path.is_file():  # opening a pipe would wait
            raise InputError(
                f"{path} is not a {self.noun}: it is not a regular file; give a file that reasonscope saved"
            )
        try:
            with path.open("rb") as opened:
                start = opened.read(9)
        except OSError as error:
            raise InputError(f"{path} is not a {self.noun}: {error}; give a file that reasonscope saved") from error
        # The length of a safetensors header may begin with the same byte, but then an object follows it.
        if start.startswith(_PICKLES) and start[8:] != b"{":
            raise InputError(
                f"{path} is not a {self.noun} but a pickle, which can run code and is not opened; save it as safetensors"
            )
