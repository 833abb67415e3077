"""The rows of a dump, whatever file they are in: JSON, JSON lines, server-sent events, Parquet, an Inspect log, or a folder of these."""

import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.streams import join_streams
from reasonscope.data.storage.untrusted import parse_json

_LARGEST_SAMPLE = 64 * 2**20  # bytes of one unpacked sample of an Inspect log; a larger one is a bomb, not a transcript
_LARGEST_LOG = 512 * 2**20  # bytes of all its samples together; one at a time is in memory as JSON
_SUFFIXES = frozenset((".json", ".jsonl", ".ndjson", ".eval", ".parquet", ".sse"))

# The place of a row to name in an error, and its value or the error that it could not be read for.
Row = tuple[str, Any]


def dump_rows(path: Path) -> Iterator[Row]:
    """Every row of a file, or of the files below a folder. A row or a file that cannot be read is an InputError in its place.

    Raises InputError if `path` cannot be read at all, or holds no file of a known kind.
    """
    for file in _files(path):
        try:
            if file != path and file.suffix.lower() not in _SUFFIXES:
                raise InputError(f"a file that ends in {file.suffix or 'nothing'} is not read")
            yield from join_streams(_file_rows(file))
        except InputError as error:
            if file == path:
                raise
            yield str(file), error


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    below = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    found = sorted(path / file for file in below if not any(part.startswith(".") for part in file.parts))
    if not any(file.suffix.lower() in _SUFFIXES for file in found):
        raise InputError(
            f"{path} has no file that ends in {', '.join(sorted(_SUFFIXES))}; give a dump, or a folder of dumps"
        )
    return found


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    try:
        with path.open("rb") as file:
            packed = file.read(4) == b"PK\x03\x04"
        if packed or path.suffix.lower() == ".eval":
            return inspect_samples(path)
        return _text_rows(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file or a folder") from error


def _text_rows(path: Path, raw: bytes) -> Iterator[Row]:
    """The elements of one JSON value if the file is one, else its lines."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] in (b"{", b"["):
        try:
            whole = parse_json(raw, str(path))
        except InputError as error:
            if path.suffix.lower() == ".json" and not isinstance(_line(raw.lstrip().split(b"\n", 1)[0], ""), Mapping):
                raise InputError(f"{error}; if it is cut off, its first part can be saved as JSON lines") from error
        else:
            yield from _value_rows(path, whole, one_line=b"\n" not in raw.strip())
            return
    for number, line in enumerate(raw.splitlines(), start=1):
        text = re.sub(rb"^data:\s*", b"", line.strip())
        if text and not re.match(rb"(?:event|id|retry)?:|\[DONE\]$", text):
            where = f"{path}, line {number}"
            yield where, _line(text, where)


def _value_rows(path: Path, whole: Any, *, one_line: bool) -> Iterator[Row]:
    samples = whole.get("samples") if isinstance(whole, Mapping) and "eval" in whole else None
    if isinstance(samples, list):  # an Inspect log as JSON
        yield from ((f"{path}, sample {number}", value) for number, value in enumerate(samples, start=1))
    elif isinstance(whole, list):
        yield from ((f"{path}, element {number}", value) for number, value in enumerate(whole, start=1))
    else:
        yield f"{path}, line 1" if one_line else str(path), whole


def _line(raw: bytes, where: str) -> Any:
    try:
        return parse_json(raw, where)
    except InputError as error:
        return error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", value
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error


def inspect_samples(source: Path) -> Iterator[Row]:
    """The samples of an Inspect log (`.eval`: a zip archive with `samples/*.json`). Nothing is unpacked to disk.

    Raises InputError if the archive cannot be read or is too large unpacked; a sample that is not JSON is an error in its place.
    """
    name, left = "the archive", _LARGEST_LOG
    try:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if not re.fullmatch(r"samples/[^/]+\.json", name):
                    continue
                with archive.open(name) as file:
                    raw = file.read(min(_LARGEST_SAMPLE, left) + 1)  # the size that the archive states may be false
                if len(raw) > min(_LARGEST_SAMPLE, left):
                    raise InputError(
                        f"{source}, {name}: more than {_LARGEST_SAMPLE // 2**20} MiB unpacked, or {_LARGEST_LOG // 2**20} MiB with "
                        "the samples before it; split the log"
                    )
                left -= len(raw)
                yield f"{source}, {name}", _line(raw, f"{source}, {name}")
    # zipfile raises these for a damaged member (the first five), an unknown compression, an encrypted member, and a name
    # that is not text.
    except (
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        UnicodeDecodeError,
    ) as error:
        raise InputError(f"{source}, {name}: not a readable Inspect log: {error}") from error
