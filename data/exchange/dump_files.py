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
_ZSTANDARD = 93  # its number among the compressions of zip archives
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
        rows = (_of_task(sample, whole["eval"]) for sample in samples)
        yield from ((f"{path}, sample {number}", value) for number, value in enumerate(rows, start=1))
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
            about = _inspect_header(archive, source)
            for name in sorted(archive.namelist()):
                if not re.fullmatch(r"samples/.+\.json", name) or ".." in name.split("/"):
                    continue
                raw = _member(archive, name, min(_LARGEST_SAMPLE, left))
                if len(raw) > min(_LARGEST_SAMPLE, left):
                    raise InputError(
                        f"{source}, {name}: more than {_LARGEST_SAMPLE // 2**20} MiB unpacked, or {_LARGEST_LOG // 2**20} MiB with "
                        "the samples before it; split the log"
                    )
                left -= len(raw)
                yield f"{source}, {name}", _of_task(_line(raw, f"{source}, {name}"), about)
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


def _inspect_header(archive: zipfile.ZipFile, source: Path) -> Any:
    """What the log says about itself; None if it was never finished or is damaged."""
    names = [name for name in ("header.json", "_journal/start.json") if name in archive.namelist()]
    found = _line(_member(archive, names[0], _LARGEST_SAMPLE), str(source)) if names else None
    return found.get("eval") if isinstance(found, Mapping) else None


def _of_task(sample: Any, about: Any) -> Any:
    """The sample with the name of its task, since two tasks number their samples alike."""
    task = about.get("task") if isinstance(about, Mapping) else None
    return {**sample, "task": task} if isinstance(sample, Mapping) and isinstance(task, str) else sample


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """The bytes of a member, up to one more than `limit`, whatever size the archive states, for that may be false."""
    about = archive.getinfo(name)
    if about.compress_type != _ZSTANDARD:
        with archive.open(name) as file:
            return file.read(limit + 1)
    # Inspect packs its logs so, and zipfile cannot read it before Python 3.14.
    assert archive.fp is not None
    archive.fp.seek(about.header_offset)
    header = archive.fp.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("a member is not where the archive says")
    archive.fp.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
    packed = archive.fp.read(about.compress_size)
    with pa.input_stream(pa.py_buffer(packed), compression="zstd") as stream:
        raw = bytes(stream.read(limit + 1))
    if len(raw) <= limit and zlib.crc32(raw) != about.CRC:
        raise zipfile.BadZipFile(f"the checksum of {name} is wrong")
    return raw
