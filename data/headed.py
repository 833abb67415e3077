"""One object in one file: its arrays as safetensors, and all else as JSON in the header, under the name of its kind."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reasonscope.data.durable import write_durably
from reasonscope.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a file holds: `key` of the header's metadata, `noun` for messages, the newest `version` that is understood."""

    key: str
    noun: str
    version: int

    def write(self, path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Whole or not at all. Raises StoreError; ValueError for a header that is no JSON, NaN included."""
        text = json.dumps({"version": self.version, **header}, allow_nan=False)
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_durably(path, lambda file: save_file(tensors, file, metadata={self.key: text}))

    def read(self, path: Path) -> tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]:
        """(header, arrays). Raises InputError for any other file, and for one of a newer version."""
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(self.key, "null"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is no {self.noun}: {error}; give a file that reasonscope saved") from error
        if not isinstance(header, dict):
            raise InputError(f"{path} is a safetensors file, but no {self.noun} of reasonscope")
        self.check(path, header)
        return header, arrays

    def check(self, path: Path, header: Mapping[str, Any]) -> None:
        """Raise InputError for a header of a newer version."""
        if header.get("version", 0) > self.version:
            raise InputError(f"{path} has version {header['version']}, newer than {self.version}; upgrade reasonscope")
