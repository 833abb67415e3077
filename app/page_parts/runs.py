"""A run that is open, and the runs that may be opened: those below one folder."""

from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.run_folder import RunFolder, run_folder
from reasonscope.data.storage.store import TraceStore

_DEPTH = 2  # folders below the root in which runs are looked for
_MANY_RUNS = 200


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that is open. `stamp` changes when a trace is added."""

    path: Path
    where: RunFolder
    store: TraceStore
    stamp: str = field(compare=False)

    @property
    def name(self) -> str:
        return self.path.name

    def __hash__(self) -> int:
        return hash((self.path, self.stamp))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpenRun) and (self.path, self.stamp) == (other.path, other.stamp)


def confined(root: Path, name: str) -> Path:
    """The folder `name` below `root`. Raises InputError where it leads elsewhere: by `..`, as an absolute path or by a link."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InputError(f"run {name!r} lies outside of {root}; start the app with --root for another folder of runs")
    return path


def find_runs(root: Path) -> list[str]:
    """The runs below `root`, as paths from there; a link that leads out is not followed."""
    found = []
    for pattern in ("/".join(["*"] * depth) for depth in range(1, _DEPTH + 1)):
        for folder in sorted(root.glob(pattern)):
            name = folder.relative_to(root).as_posix()
            if folder.name != "store" and _is_run(folder) and folder.resolve().is_relative_to(root.resolve()):
                found.append(name)
    return found[:_MANY_RUNS]


def open_run(path: Path) -> OpenRun:
    """The run in `path`. Raises StoreError where there is none, or it is damaged."""
    where = run_folder(path)
    try:
        stamp = sha256((where.store / NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise StoreError(
            f"{path} holds no run ({error.strerror}); record one: reasonscope record --out {path}"
        ) from error
    return _open(path, stamp)


def _is_run(folder: Path) -> bool:
    return (folder / NAME).is_file() or (folder / "store" / NAME).is_file()


@lru_cache(maxsize=16)
def _open(path: Path, stamp: str) -> OpenRun:
    where = run_folder(path)
    return OpenRun(path=path, where=where, store=TraceStore.open(where.store), stamp=stamp)
