"""One shard of a store: a Parquet table of traces, and a safetensors file with the rows of their activations."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from reasonscope.data.errors import StoreError
from reasonscope.data.storage.durable import sha256_of, write_durably
from reasonscope.data.storage.manifest import Shard, SiteType, StoredFile, look_at
from reasonscope.data.storage.records import TRACE_SCHEMA, traces_to_table
from reasonscope.data.storage.safetensors_file import DTYPES, write_arrays
from reasonscope.data.trace import Trace

# The rows of a trace in every tensor of the shard, and their checksum per site, in the order of the manifest's sites.
SHARD_SCHEMA = pa.unify_schemas(
    [TRACE_SCHEMA, pa.schema([("row_start", pa.int64()), ("row_stop", pa.int64()), ("crc32", pa.list_(pa.uint32()))])]
)

_HEAD = 2**16  # bytes; more than most headers of shards have
_HARMLESS = 2**28  # bytes of an unpacked table that are always accepted
_PACKED = 1000  # the compression ratio that a larger table may have; text has 3 to 10

Activations = Mapping[str, Sequence[NDArray[Any]]]


def rows_of(trace: Trace) -> int:
    """How many rows a trace has: one per token except the last, which was never fed back."""
    return max(0, len(trace.token_ids) - 1)


def write_shard(folder: Path, name: str, traces: Sequence[Trace], activations: Activations) -> Shard:
    """Write `traces` with one array per trace for each site. If that fails, raises StoreError and leaves no file."""
    arrays, table = f"{name}.safetensors", f"{name}.parquet"
    files = {}
    try:
        with ThreadPoolExecutor(1) as beside:  # while the disk writes the arrays
            told = beside.submit(_write_traces, folder / table, traces, activations)
            if activations:
                files[arrays] = _stored(folder / arrays, partial(write_arrays, arrays=activations))
            files[table] = told.result()
    except StoreError:
        remove_files(folder, (arrays, table))
        raise
    rows = sum(map(rows_of, traces))
    return Shard(name=name, traces=len(traces), rows=rows, files=dict(sorted(files.items())))


def _write_traces(path: Path, traces: Sequence[Trace], activations: Activations) -> StoredFile:
    return _stored(path, partial(_write_table, _table(traces, _checksums(activations, len(traces)))))


def _table(traces: Sequence[Trace], checksums: Sequence[Sequence[int]]) -> pa.Table:
    table = traces_to_table(traces)
    stops = np.cumsum([rows_of(trace) for trace in traces])
    for column, values in (("row_start", [0, *stops[:-1]]), ("row_stop", stops), ("crc32", checksums)):
        table = table.append_column(SHARD_SCHEMA.field(column), pa.array(values, type=SHARD_SCHEMA.field(column).type))
    return table


def _checksums(activations: Activations, n: int) -> list[list[int]]:
    """The checksums of the rows of each of `n` traces, by site."""
    return [[_crc32(arrays[i]) for arrays in activations.values()] for i in range(n)]


def _stored(path: Path, write: Callable[[Path], object]) -> StoredFile:
    digest = write_durably(path, write)
    return StoredFile(size=path.stat().st_size, sha256=digest)


def link_shard(source: Path, shard: Shard, folder: Path, name: str) -> Shard:
    """`shard` of the folder `source` as shard `name` of `folder`, by hard links or else by copies.

    If that fails, raises StoreError and leaves no file.
    """
    files = {name + Path(old).suffix: file for old, file in shard.files.items()}
    try:
        for old in shard.files:
            write_durably(folder / (name + Path(old).suffix), partial(_link_or_copy, source / old))
    except StoreError:
        remove_files(folder, files)
        raise
    return replace(shard, name=name, files=files)


def _link_or_copy(source: Path, path: Path) -> None:
    look_at(source)
    try:
        path.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, path)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        with suppress(OSError):  # a file that cannot be removed does no harm: a writer replaces it
            (folder / name).unlink(missing_ok=True)


def read_table(folder: Path, shard: Shard, columns: list[str] | None = None) -> pa.Table:
    """The table of a shard, parsed from the same bytes that were compared with their checksum. Raises StoreError."""
    path = folder / shard.table
    look_at(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} is missing or damaged: {error}; restore it from a copy") from error
    if hashlib.sha256(raw).hexdigest() != shard.files[shard.table].sha256:
        raise StoreError(f"{path} is damaged: its bytes changed since they were stored; restore it from a copy")
    table = _parsed(path, raw, columns)
    wanted = SHARD_SCHEMA if columns is None else pa.schema([SHARD_SCHEMA.field(name) for name in columns])
    if not table.schema.equals(wanted) or len(table) != shard.traces:
        raise StoreError(
            f"{path} is not a table of {shard.traces} traces with the columns of this version; restore it from a copy"
        )
    return table


def _parsed(path: Path, raw: bytes, columns: list[str] | None) -> pa.Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        size = _unpacked(file.metadata)
        if size <= max(_HARMLESS, _PACKED * len(raw)):
            return file.read(columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"{path} is not a Parquet file that Arrow can read: {error}; restore it from a copy"
        ) from error
    raise StoreError(f"{path} would unpack {len(raw)} bytes to {size}, too much for a table of traces; make it again")


def _unpacked(told: pq.FileMetaData) -> int:
    """How many bytes a Parquet file claims to hold once unpacked. Counted by row group, because Arrow ends the process
    when asked for a column with damaged statistics."""
    return sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))


def read_rows(
    folder: Path, shard: Shard, site: str, kind: SiteType | None, start: int, stop: int, crc32: int
) -> NDArray[Any]:
    """Rows [start, stop) of a site, by memory map, so that only their bytes are read. Raises StoreError if they, or the
    type and shape that the file states, changed since they were stored."""
    path = folder / shard.arrays
    look_at(path)
    try:
        _announce(path, 0, _HEAD)
        with safe_open(path, framework="np") as file:
            part = file.get_slice(site)
            if not _fits(part.get_dtype(), part.get_shape(), kind, start, stop):
                raise StoreError(
                    f"{path} is damaged: {site} is {part.get_dtype()} {part.get_shape()}, which differs from what was "
                    f"stored; restore it from a copy"
                )
            if start < stop:
                offset, size = _place(path, site, start, stop)
                _announce(path, offset, 2 * size)  # twice as much, which helps if rows are read in order
                rows: NDArray[Any] = part[start:stop]
            else:  # the library refuses an empty slice at the end
                rows = file.get_tensor(site)[:0]
    except StoreError:
        raise
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} is missing or damaged: {error}; restore it from a copy") from error
    if _crc32(rows) != crc32:
        raise StoreError(
            f"{path} is damaged: rows {start} to {stop} of {site} changed since they were stored; restore it from a copy"
        )
    return rows


def _fits(dtype: str, shape: list[int], kind: SiteType | None, start: int, stop: int) -> bool:
    """Whether an array of a file has the type `kind` and rows [start, stop)."""
    typed = kind is not None and (dtype, shape[1:]) == (DTYPES.get(kind.dtype), list(kind.shape))
    return typed and 0 <= start <= stop and [stop] <= shape[:1]


def _announce(path: Path, offset: int, size: int) -> None:
    """Tell the system which bytes come next; otherwise a missing page of a memory map brings megabytes around it."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def _place(path: Path, site: str, start: int, stop: int) -> tuple[int, int]:
    """Offset and size in bytes of rows [start, stop) of a site, in a file whose header safetensors has checked."""
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(head))[site]
    first, end = told["data_offsets"]
    row = (end - first) // told["shape"][0]
    return 8 + head + first + start * row, (stop - start) * row


def length_problem(path: Path, file: StoredFile) -> str | None:
    """What is wrong with a file by its length, or None."""
    try:
        found = look_at(path)
    except StoreError as error:
        return str(error)
    if found is None:
        return f"{path} is missing; restore it from a copy"
    size = found.st_size
    return (
        None if size == file.size else f"{path} is damaged: {size} bytes instead of {file.size}; restore it from a copy"
    )


def content_problem(path: Path, file: StoredFile) -> str | None:
    """What is wrong with a file when every byte of it is read, or None."""
    try:
        problem = length_problem(path, file)
        if problem is None and sha256_of(path) != file.sha256:
            return f"{path} is damaged: its bytes changed since they were stored; restore it from a copy"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return problem


def _crc32(array: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) if array.size else 0


def _write_table(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")
