"""An open run: its traces, and the probes, vectors, results and numbers that were made from them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from reasonscope.analysis.results import Result, load_results
from reasonscope.analysis.runs.saved_numbers import read_numbers
from reasonscope.data.errors import StoreError
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.run_folder import RunFolder, run_folder
from reasonscope.data.storage.store import TraceStore


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """An open run.

    Attributes:
        path: Its folder.
        where: The folders of its store and of what was made from it.
        store: Its traces.
        stamp: Changes when a trace is added.
    """

    path: Path
    where: RunFolder
    store: TraceStore
    stamp: str = field(compare=False)

    @property
    def name(self) -> str:
        return self.path.name

    def results(self, method: str = "*") -> Iterator[Result]:
        """Every saved result of `method`, or of all methods, ordered by method and trace."""
        return load_results(self.where.analyses, method)

    def numbers(self, name: str) -> Mapping[str, Any]:
        """What `reasonscope probe NAME`, `steer sweep` or the demo saved under `name`. Raises InputError if the file does not exist."""
        return read_numbers(self.where.numbers / f"{name}.json")

    def __hash__(self) -> int:
        return hash((self.path, self.stamp))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpenRun) and (self.path, self.stamp) == (other.path, other.stamp)


def open_run(path: str | Path) -> OpenRun:
    """Open the run in `path`.

    Args:
        path: A folder that holds `store`, or a store itself.

    Returns:
        The run, with its `store` open.

    Raises:
        StoreError: `path` does not hold a run, or its store is damaged.

    Example:
        run = open_run("runs/mine")
        for trace in run.store:
            print(trace.id, trace.n_thinking_tokens)
    """
    where = run_folder(Path(path))
    try:
        stamp = sha256((where.store / NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise StoreError(
            f"{path} holds no run ({error.strerror}); record one: reasonscope record --out {path}"
        ) from error
    return _open(Path(path), stamp)


@lru_cache(maxsize=16)
def _open(path: Path, stamp: str) -> OpenRun:
    where = run_folder(path)
    return OpenRun(path=path, where=where, store=TraceStore.open(where.store), stamp=stamp)
