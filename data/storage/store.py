"""Traces and their activations on disk, in a form that a kill cannot corrupt and that opens without this package.

    run/
      manifest.json            the content, with a checksum of every file and of itself
      shards/
        000000.parquet         one row per trace (see `records.TRACE_SCHEMA`), with `row_start`, `row_stop` and `crc32`
        000000.safetensors     one tensor per site, (row, …): the rows of all traces of the shard, trace after trace
        000001.parquet …
      .lock                    held by the writer until its process ends

Row r of a trace is the activation at its token r. The last token is never fed back, so a trace of n tokens has n − 1
rows. Without this package: `pyarrow.parquet.read_table` and `safetensors.safe_open` (numpy reads bfloat16 after `import
ml_dtypes`).
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from reasonscope.data.errors import InputError, ReasonscopeError, SiteError, StoreError
from reasonscope.data.storage.durable import TEMPORARY, remove
from reasonscope.data.storage.manifest import LOCK, NAME, RECIPE, SHARDS, Manifest, Shard, SiteType, look_at, shard_name
from reasonscope.data.storage.records import problem_of_json, traces_of_table
from reasonscope.data.storage.safetensors_file import DTYPES
from reasonscope.data.storage.shards import (
    SHARD_SCHEMA,
    Activations,
    length_problem,
    link_shard,
    read_rows,
    read_table,
    remove_files,
    rows_of,
    write_shard,
)
from reasonscope.data.storage.soundness import check_store, link_problem, need_blank
from reasonscope.data.storage.untrusted import wrap_errors
from reasonscope.data.storage.writer_lock import WriterLock
from reasonscope.data.trace import Problem, Trace


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The place of a trace: row `index` of its shard's table, rows [start, stop) of its tensors, with a checksum per
    site."""

    shard: Shard
    index: int
    start: int
    stop: int
    crc32: Mapping[str, int]


class TraceStore:
    """A folder of traces with their activations; append-only. Make one with `create`, `open` or `open_or_create`.

    Many processes may read while one writes. The first `append` takes the writer's lock; `close`, leaving the `with`
    block, or the end of the process (even by a kill) releases it. Iterating gives the traces, one shard in memory at a
    time.

    Attributes:
        path: The folder of the store.
        meta: JSON that says how the run was made.
        sites: The sites whose activations are stored.
        ids: Ids of the traces, in the order in which they were stored.

    Example:
        store = rs.TraceStore.open("runs/mine/store")
        trace = store.trace(store.ids[0])
        states = store.activations(trace.id, "resid_post.2")  # (token − 1, d_model)
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._folder = path / SHARDS
        self._manifest = manifest
        self._places: dict[str, _Place] | None = None
        self._recent: tuple[str, pa.Table] | None = (
            None  # the last table that was read, as traces are mostly read in order
        )
        self._lock = WriterLock(path)

    @classmethod
    def create(
        cls, path: str | Path, *, meta: Mapping[str, Any] | None = None, sites: Sequence[str] = ()
    ) -> "TraceStore":
        """An empty store for activations at `sites`.

        Args:
            path: The folder: new, empty, or with a store without traces, whose recording failed before the first one.
            meta: JSON that says how the run was made.
            sites: Names of the sites, such as "resid_post.2".

        Returns:
            The store, with the writer's lock held.

        Raises:
            StoreError: If the folder is not empty or cannot be made.
            InputError: If a site is named twice or `meta` is not JSON.
        """
        folder = Path(path)
        if len(set(sites)) != len(sites):
            raise InputError(f"sites {list(sites)} contain a duplicate; name each site once")
        need_blank(folder)
        try:
            (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {folder}: {error}") from error
        manifest = Manifest(meta=dict(meta or {}), sites=dict.fromkeys(sites))
        store = cls(folder, manifest)
        store._take_lock()
        try:
            need_blank(folder)  # again, since another writer may have come before we held the lock
            for begun in store._folder.iterdir():  # a shard that was never finished
                remove(begun)
            store._write(manifest)
        except OSError as error:
            store.close()
            raise StoreError(f"cannot write in {folder}: {error}") from error
        except ReasonscopeError:
            store.close()
            raise
        return store

    @classmethod
    def open(cls, path: str | Path) -> "TraceStore":
        """The store in `path`.

        Args:
            path: Its folder.

        Returns:
            The store, for reading; the first `append` takes the writer's lock.

        Raises:
            StoreError: If the folder has no store; if its manifest was altered or has a newer version; or if one of its files
                is missing, unreadable, a link, or of another length than before.
        """
        store = cls(Path(path), Manifest.read(Path(path)))
        if problem := link_problem(store._folder):
            raise StoreError(problem)
        for shard in store._manifest.shards:
            for name, file in shard.files.items():
                if problem := length_problem(store._folder / name, file):
                    raise StoreError(problem)
        return store

    @classmethod
    def open_or_create(
        cls, path: str | Path, *, meta: Mapping[str, Any] | None = None, sites: Sequence[str] = ()
    ) -> "TraceStore":
        """The store in `path`, to continue it, or a new one if it has no traces.

        Args:
            path: Its folder.
            meta: JSON that says how the run was made.
            sites: Names of the sites.

        Returns:
            The store.

        Raises:
            StoreError: If the existing store has other sites or another `meta`: everything in one store was made in one
                way.
        """
        if look_at(Path(path) / NAME) is None:
            return cls.create(path, meta=meta, sites=sites)
        store = cls.open(path)
        if not len(store):
            return cls.create(path, meta=meta, sites=sites)
        if store.sites != tuple(sites):
            raise StoreError(
                f"{path} holds the sites {', '.join(store.sites) or '(none)'}, not {', '.join(sites) or '(none)'}"
            )
        wanted, there = dict(meta or {}), dict(store.meta)
        different = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        if different:
            raise StoreError(
                f"{path} was written with another {', '.join(different)}; give another folder to start a new run"
            )
        return store

    def __enter__(self) -> "TraceStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the writer's lock, if held. Reading still works."""
        self._lock.release()

    def discard(self) -> None:
        """Remove the store if it has no traces, and its folder if nothing else is in it. Raises StoreError if
        another process writes."""
        self._take_lock()
        if len(self):
            return
        try:
            for begun in self._folder.iterdir():
                remove(begun)
            # The manifest goes before the lock: a kill in between leaves a folder that `create` takes.
            for path in (self.path / NAME, self.path / RECIPE, self._folder, self.path / LOCK):
                remove(path)
        except OSError as error:
            raise StoreError(f"cannot write in {self.path}: {error}") from error
        finally:
            self.close()
        with suppress(OSError):  # it holds something else, too
            self.path.rmdir()

    @property
    def meta(self) -> Mapping[str, Any]:
        """JSON that says how the run was made."""
        return self._manifest.meta

    @property
    def recipe(self) -> Path | None:
        """The file of what the traces were steered by; None for traces of the plain model."""
        return self.path / RECIPE if "steered" in self.meta else None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose activations are stored."""
        return tuple(self._manifest.sites)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all traces, in the order in which they were stored."""
        return tuple(self._index())

    def __len__(self) -> int:
        return sum(shard.traces for shard in self._manifest.shards)

    def __contains__(self, id: object) -> bool:
        return id in self._index()

    def __iter__(self) -> Iterator[Trace]:
        """All traces, one shard in memory at a time."""
        for shard in self._manifest.shards:
            yield from traces_of_table(self._table(shard))

    def trace(self, id: str) -> Trace:
        """The trace with this id. Raises InputError if the store has none."""
        place = self._place(id)
        if self._recent is None or self._recent[0] != place.shard.name:
            self._recent = place.shard.name, self._table(place.shard)
        return next(traces_of_table(self._recent[1].slice(place.index, 1)))

    def table(self) -> pa.Table:
        """All traces as one Arrow table: the columns of `records.TRACE_SCHEMA`, and the place of their rows."""
        tables = [self._table(shard) for shard in self._manifest.shards]
        return pa.concat_tables(tables) if tables else SHARD_SCHEMA.empty_table()

    def problems(self) -> tuple[Problem, ...]:
        """The different problems of the traces, in the order in which they were stored; nothing else is read."""
        tables = [self._table(shard, columns=["problem"]) for shard in self._manifest.shards]
        texts = dict.fromkeys(text for table in tables for text in table["problem"].to_pylist())
        with wrap_errors(self._folder, StoreError):
            return tuple(problem_of_json(json.loads(text)) for text in texts)

    def activations(self, id: str, site: str) -> NDArray[Any]:
        """The activations of a trace at `site`; only these bytes are read.

        Args:
            id: Id of the trace.
            site: Name of a stored site.

        Returns:
            (token − 1, …): row r belongs to token r. bfloat16 is given as `ml_dtypes.bfloat16`.

        Raises:
            InputError: For an unknown id.
            SiteError: For a site that is not stored.
            StoreError: If the bytes were altered.
        """
        if site not in self._manifest.sites:
            raise SiteError(f"{self.path} has no activations at {site!r}; it has {', '.join(self.sites) or 'no sites'}")
        place = self._place(id)
        kind = self._manifest.sites[site]
        return read_rows(self._folder, place.shard, site, kind, place.start, place.stop, place.crc32[site])

    def append(self, traces: Sequence[Trace], activations: Activations | None = None) -> None:
        """Store `traces` as one shard.

        The traces are stored when this returns, and are not stored if it raises, unless the disk fails in the very last
        step: then the store may hold them, complete.

        Args:
            traces: Traces with new ids.
            activations: For every site of the store, one array (token − 1, …) per trace.

        Raises:
            InputError: If an id exists already, or arrays do not fit.
            StoreError: If another process writes, or the disk is full.
        """
        if not traces:
            return
        self._take_lock()
        types = self._fitting(traces, activations or {})
        ordered = {site: (activations or {})[site] for site in self.sites}
        shard = write_shard(self._folder, shard_name(len(self._manifest.shards)), traces, ordered)
        try:
            self._write(replace(self._manifest, sites=types, shards=(*self._manifest.shards, shard)))
        except StoreError:
            self._withdraw([shard])
            raise
        self._index().update(self._places_in(shard))

    def adopt(self, other: "TraceStore") -> None:
        """Take over the shards of `other`, a finished store with the same `meta` and sites, whose files do not change.

        The shards enter in one step: after a kill this store has none of them, and a second call takes them. Shards
        that are here already are skipped. Raises InputError if `other` was recorded differently or shares some traces,
        StoreError if another process writes or the disk is full.
        """
        self._take_lock()
        if (other.meta, other.sites) != (self.meta, self.sites):
            raise InputError(
                f"{other.path} was not recorded in the same way as {self.path}; only parts of one run can be joined"
            )
        new = [shard for shard in other._manifest.shards if not self._holds(other, shard)]
        if not new:
            return
        types = {site: self._manifest.sites[site] or other._manifest.sites[site] for site in self.sites}
        for site, kind in other._manifest.sites.items():
            if kind != types[site]:
                raise InputError(f"{other.path} has {site} as {kind}, {self.path} as {types[site]}; record both alike")
        taken: list[Shard] = []
        try:
            for number, shard in enumerate(new, start=len(self._manifest.shards)):
                taken.append(link_shard(other._folder, shard, self._folder, shard_name(number)))
            self._write(replace(self._manifest, sites=types, shards=(*self._manifest.shards, *taken)))
        except StoreError:
            self._withdraw(taken)
            raise
        for shard in taken:
            self._index().update(self._places_in(shard))

    def _write(self, manifest: Manifest) -> None:
        self._lock.need()
        manifest.write(self.path)
        self._manifest = manifest

    def _withdraw(self, shards: Sequence[Shard]) -> None:
        """Remove the files of `shards`, whose manifest could not be written, and return to the manifest on disk.

        The files stay if that manifest names them after all (its write failed at the very end), or if they may be
        another writer's.
        """
        if not self._lock.held:
            return
        with suppress(StoreError):
            self._lock.need()
            self._manifest, self._places = Manifest.read(self.path), None
            named = {name for shard in self._manifest.shards for name in shard.files}
            for shard in shards:
                remove_files(self._folder, shard.files.keys() - named)

    def _holds(self, other: "TraceStore", shard: Shard) -> bool:
        ids = other._places_in(shard).keys()
        here = [id for id in ids if id in self._index()]
        if here and len(here) < len(ids):
            raise InputError(f"{other.path} and {self.path} both have a trace {here[0]!r}; ids must be unique")
        return bool(here)

    def check(self) -> list[str]:
        """Everything that is wrong with the store after reading every byte; empty if it is sound."""
        return check_store(self.path)

    def _fitting(self, traces: Sequence[Trace], activations: Activations) -> dict[str, SiteType]:
        """The types of the sites once `traces` are stored. Raises InputError if something does not fit."""
        known = set(self._index())
        for trace in traces:
            if trace.id in known:
                raise InputError(f"{self.path} already has a trace {trace.id!r}; ids must be unique")
            known.add(trace.id)
        if set(activations) != set(self.sites):
            raise InputError(f"activations are at {sorted(activations)}; the store needs {sorted(self.sites)}")
        return {site: self._type_of(site, traces, activations[site]) for site in self.sites}

    def _type_of(self, site: str, traces: Sequence[Trace], arrays: Sequence[NDArray[Any]]) -> SiteType:
        if len(arrays) != len(traces):
            raise InputError(f"{site}: {len(arrays)} arrays for {len(traces)} traces; give one per trace")
        wanted = self._manifest.sites[site] or SiteType(dtype=arrays[0].dtype.name, shape=arrays[0].shape[1:])
        if wanted.dtype not in DTYPES:
            raise InputError(
                f"{site}: arrays of {wanted.dtype} cannot be stored; cast them to one of {', '.join(DTYPES)}"
            )
        for trace, array in zip(traces, arrays, strict=True):
            if array.shape != (rows_of(trace), *wanted.shape) or array.dtype.name != wanted.dtype:
                raise InputError(
                    f"{site} of {trace.id!r}: {array.dtype.name} {array.shape} does not fit; {len(trace.token_ids)} tokens "
                    f"need {rows_of(trace)} rows, each {wanted.dtype} {wanted.shape}"
                )
        return wanted

    def _take_lock(self) -> None:
        if self._lock.held:
            self._lock.need()
            return
        self._lock.take()
        try:
            self._start()
        except StoreError:
            self.close()
            raise

    def _start(self) -> None:
        """Remove what a killed writer left, and load what another one wrote since we read the manifest."""
        try:
            for leftover in (self.path / (NAME + TEMPORARY), *self._folder.glob(f"*{TEMPORARY}")):
                remove(leftover)
        except OSError as error:
            raise StoreError(f"cannot write in {self.path}: {error}") from error
        if look_at(self.path / NAME) is not None:
            self._manifest, self._places = Manifest.read(self.path), None

    def _index(self) -> dict[str, _Place]:
        if self._places is None:
            places: dict[str, _Place] = {}
            for shard in self._manifest.shards:
                places |= self._places_in(shard)
            self._places = places
        return self._places

    def _places_in(self, shard: Shard) -> dict[str, _Place]:
        table = self._table(shard, columns=["id", "row_start", "row_stop", "crc32"])
        with wrap_errors(self._folder / shard.table, StoreError):
            return {row["id"]: self._placed(shard, i, row) for i, row in enumerate(table.to_pylist())}

    def _placed(self, shard: Shard, index: int, row: Mapping[str, Any]) -> _Place:
        crc32 = dict(zip(self.sites, row["crc32"], strict=True))
        return _Place(shard=shard, index=index, start=int(row["row_start"]), stop=int(row["row_stop"]), crc32=crc32)

    def _place(self, id: str) -> _Place:
        place = self._index().get(id)
        if place is None:
            raise InputError(
                f"{self.path} has no trace {id!r}; it has {len(self)}, such as {self.ids[0]!r}"
                if self.ids
                else f"{self.path} has no traces yet"
            )
        return place

    def _table(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        return read_table(self._folder, shard, columns)


def merge_stores(parts: Sequence[str | Path], path: str | Path) -> TraceStore:
    """Copy the traces of all `parts` into the store at `path`, which is made if it does not exist; the parts do not
    change.

    Files are hard-linked if the file system allows it, so that nothing is stored twice. Traces that `path` already has
    are skipped, so a second merge completes one that was killed. Raises InputError if the parts were not recorded alike
    or share some traces, StoreError.
    """
    if not parts:
        raise InputError("nothing to merge; give the folder of at least one store")
    stores = [TraceStore.open(part) for part in parts]
    with TraceStore.open_or_create(path, meta=stores[0].meta, sites=stores[0].sites) as whole:
        for store in stores:
            whole.adopt(store)
        if whole.recipe is not None and not whole.recipe.exists():
            shutil.copyfile(stores[0].path / whole.recipe.name, whole.recipe)
    return whole
