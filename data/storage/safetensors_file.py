"""Files of arrays: one object per file, with everything else as JSON in the header, under the name of its kind; and
large arrays, written piece by piece, so that the disk works while the rest is still prepared."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

# The types that rows may have: numpy's name, and that of safetensors.
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

_PIECE = 2**23  # bytes after which the disk is told to begin

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


def write_arrays(path: Path, arrays: Mapping[str, Sequence[NDArray[Any]]]) -> str:
    """Write under each name the concatenation of its arrays, which are alike, as safetensors does. Returns the SHA-256 of the file.

    The library itself needs each concatenation in memory, and its file would be read again for the checksum.
    """
    ordered = sorted(
        arrays, key=lambda name: (-arrays[name][0].dtype.itemsize, name)
    )  # so that all of them are aligned
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        hashed = []
        begun = 0
        for piece in (_header(arrays, ordered), *_pieces(arrays, ordered)):
            hashed.append(beside.submit(digest.update, piece))
            _write_whole(file.fileno(), piece)
            if (written := file.tell()) - begun >= _PIECE:
                _begin_writing(file.fileno(), begun, written - begun)
                begun = written
        for one in hashed:
            one.result()
    return digest.hexdigest()


def _header(arrays: Mapping[str, Sequence[NDArray[Any]]], ordered: Sequence[str]) -> memoryview:
    """The length of the header and the header, filled up with spaces to a multiple of 8 bytes."""
    told, start = {}, 0
    for name in ordered:
        parts = arrays[name]
        stop = start + sum(part.nbytes for part in parts)
        shape = [sum(map(len, parts)), *parts[0].shape[1:]]
        told[name] = {"dtype": DTYPES[parts[0].dtype.name], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _pieces(arrays: Mapping[str, Sequence[NDArray[Any]]], ordered: Sequence[str]) -> Iterator[memoryview]:
    for name in ordered:
        for part in arrays[name]:
            if part.size:
                yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def _write_whole(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _begin_writing(descriptor: int, offset: int, size: int) -> None:
    """Let the system begin to write these bytes to the disk; otherwise it waits for the flush at the end."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
