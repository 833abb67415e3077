"""The manifest of a store: its content, with a checksum of every file and of the manifest itself."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.storage.durable import write_durably
from reasonscope.data.storage.untrusted import check_fields, parse_json, wrap_errors

_FORMAT = "reasonscope-store"
_VERSION = 1
NAME = "manifest.json"
SHARDS = "shards"
LOCK = ".lock"
RECIPE = "recipe.safetensors"  # beside the manifest of a store whose traces were steered


@dataclass(frozen=True, kw_only=True)
class SiteType:
    """The type of every row of a site: numpy's name of its dtype, and its shape without the row axis."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A piece of a store: `traces` traces with `rows` rows of activations, in `files` (by name, in the folder
    `shards`)."""

    name: str
    traces: int
    rows: int
    files: Mapping[str, StoredFile]

    @property
    def table(self) -> str:
        return f"{self.name}.parquet"

    @property
    def arrays(self) -> str:
        return f"{self.name}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a store. `meta` is the caller's JSON; `sites` maps each site to its type, None until the first
    traces are stored."""

    meta: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, SiteType | None] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder` in one step. Raises StoreError, or InputError if `meta` is not JSON."""
        raw = _seal({"format": _FORMAT, "version": _VERSION, **asdict(self)})
        write_durably(folder / NAME, lambda path: path.write_bytes(raw))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in `folder`. Raises StoreError if it is missing, if any of its bytes changed, or if its version
        is newer than ours."""
        values = _unseal(folder / NAME)
        with wrap_errors(folder / NAME, StoreError):
            check_fields(values, {"meta": dict, "sites": dict, "shards": list}, str(folder / NAME))
            return cls(
                meta=values["meta"],
                sites={name: None if site is None else _site_type(site) for name, site in values["sites"].items()},
                shards=tuple(_shard(shard, number) for number, shard in enumerate(values["shards"])),
            )


def _site_type(values: Mapping[str, Any]) -> SiteType:
    check_fields(values, {"dtype": str, "shape": list}, "the type of a site")
    return SiteType(dtype=values["dtype"], shape=tuple(int(size) for size in values["shape"]))


def _shard(values: Mapping[str, Any], number: int) -> Shard:
    """A shard as JSON gives it. Raises InputError for unexpected file names, which could lead out of the store."""
    check_fields(values, {"name": str, "traces": int, "rows": int, "files": dict}, "a shard")
    files = {name: StoredFile(**file) for name, file in values["files"].items()}
    for file in files.values():
        check_fields(vars(file), {"size": int, "sha256": str}, "a file")
    shard = Shard(name=values["name"], traces=values["traces"], rows=values["rows"], files=files)
    if not (0 < shard.traces < 2**40 and 0 <= shard.rows < 2**50):
        raise InputError(f"shard {number} claims {shard.traces} traces with {shard.rows} rows, which cannot be")
    if shard.name != shard_name(number) or not {shard.table} <= files.keys() <= {shard.table, shard.arrays}:
        raise InputError(
            f"shard {number} is called {shard.name!r}, with the files {', '.join(files)}; expected {shard_name(number)!r}"
        )
    return shard


def shard_name(number: int) -> str:
    """The name of the files of shard `number`, counted from 0, without their endings."""
    return f"{number:06d}"


def look_at(path: Path) -> os.stat_result | None:
    """The status of a file of a store; None if it does not exist. Raises StoreError if it cannot be inspected, and for
    anything but a regular file: a link could lead out of the store."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; change its permissions, or give another folder") from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{path} is a link, a folder or the like; a store needs the file itself there")
    return found


def _text(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"the meta of a store must be JSON values (without NaN): {error}") from error


def _seal(values: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_text(values).encode()).hexdigest()
    return _text({**values, "checksum": digest}).encode()


def _unseal(path: Path) -> dict[str, Any]:
    """The values of a manifest, whose checksum holds."""
    raw, values = _read(path)
    values.pop("checksum", None)
    with wrap_errors(path, StoreError):
        sealed = _seal(values)
    if sealed != raw:  # compared byte by byte: not even white space may differ
        raise StoreError(f"{path} is damaged: its checksum does not match its content; restore it from a copy")
    return values


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a manifest, and what they say; in a format and a version that can be read."""
    if look_at(path) is None:
        raise StoreError(
            f"{path.parent} is not a trace store: it has no {NAME}; give the folder that `record` or `import` wrote"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    try:
        values = parse_json(raw, str(path))
    except InputError as error:
        raise StoreError(f"{path} is damaged: {error}; restore it from a copy") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise StoreError(f"{path} is damaged, or not the manifest of a trace store: its format must be {_FORMAT!r}")
    version = values.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise StoreError(f"{path} has version {version}; this reasonscope reads up to {_VERSION}: upgrade reasonscope")
    return raw, values
