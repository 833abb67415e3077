"""Work shared out to many machines or accelerators by Ray Data: any work in parts (`work_on`), and recording (`record_on`).

    run/                   the store, as `record` writes it
    run.parts/<part>/      a store a part while the run lasts, on a file system that all machines share

A part is named after the problems in it. A worker that dies leaves what it had stored; Ray starts another one, which opens the
part's store and goes on behind it. Where the whole run was killed, the next one first takes over what the parts hold.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from reasonscope.data import errors
from reasonscope.data.errors import InputError, MissingExtraError, ReasonscopeError, StoreError
from reasonscope.data.progress import counted, working
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.merge import merge_stores
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.sites import expand_sites
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model

_QUIET = MappingProxyType(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
)
_PART = TypeVar("_PART")
_BATCHES = 4  # of a part: enough for the padding to stay small, few enough for the last workers to end together


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker does with its problems: `load` are the arguments of `load_model`, the others those of `record`."""

    load: Mapping[str, Any]
    sampling: Sampling
    sites: str = ""
    samples: int = 1
    batch_size: int = 16
    think: bool = True
    open_tag: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the workers run.

    `address`: "local" starts a Ray of this process alone, "auto" joins the one that this machine belongs to, else its address.
    `workers`: None takes as many as it has accelerators (where `gpus` are asked for) or CPUs. `cpus` and `gpus` are those of a
    worker.
    """

    address: str = "local"
    workers: int | None = None
    cpus: float = 1
    gpus: float = 0


def record_on(cluster: Cluster, job: Job, problems: Sequence[Problem], path: str | Path) -> TraceStore:
    """As `record` into `path`, by the workers of `cluster`; the same traces whatever their number, activations up to rounding.

    Batches differ from those of one process, and so does the last digit of what is captured. Raises what `record` raises,
    MissingExtraError where Ray is not installed, InputError where no such cluster is found.
    """
    path = Path(path).absolute()
    parts = path.with_name(path.name + ".parts")
    _merge(parts, path)
    done = set(TraceStore.open(path).ids) if (path / NAME).exists() else set()
    left = [p for p in problems if any(f"{p.id}/{sample}" not in done for sample in range(job.samples))]
    todo = list(_parts(left, max(1, _BATCHES * job.batch_size // job.samples)))
    if not problems:
        raise InputError("there is no problem to record; give at least one")
    work_on(cluster, partial(_Recorder, job, parts, frozenset(done)), todo)
    _merge(parts, path)
    return TraceStore.open(path)


def work_on(cluster: Cluster, make: Callable[[], Callable[[_PART], object]], parts: Sequence[_PART]) -> None:
    """Call what `make` gives with each of `parts`, by the workers of `cluster`, each of which makes it once, for its first part.

    A part whose worker dies is begun again by another one: whatever a part does has to leave its traces whole or not at all, and a
    second call for it has to go on behind them. The first error of ours ends the work and is raised here. Raises MissingExtraError
    where Ray is not installed, InputError where no such cluster is found, StoreError where the workers fail otherwise.
    """
    ray = _ray()
    if not parts:
        return
    with _connected(ray, cluster):
        done = ray.data.from_items(
            [{"part": i} for i in range(len(parts))], override_num_blocks=len(parts)
        ).map_batches(
            _Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(cluster.workers or _room(ray, cluster), len(parts))),
            fn_constructor_args=(make, parts),
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
        )
        try:
            with working("working on a cluster", total=len(parts), unit="parts") as work:
                for row in counted(done.iter_rows(), work):  # in the order in which they are done
                    if row["error"]:  # the first error ends the run
                        raise getattr(errors, row["error"])(row["message"])
        except ray.exceptions.RayError as error:
            raise StoreError(f"the workers failed: {error}; what they had stored is kept") from error


class _Worker:
    """Makes what does the work for its first part, then does part after part; a batch {"part": [number]} is one of them."""

    def __init__(self, make: Callable[[], Callable[[_PART], object]], parts: Sequence[_PART]) -> None:
        self._make, self._parts = make, parts
        self._work: Callable[[Any], object] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Of an error of ours Ray would hand on a text with tracebacks: it goes back as a result."""
        try:
            self._work = self._work or self._make()
            for index in batch["part"]:
                self._work(self._parts[int(index)])
        except ReasonscopeError as error:
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            return {"error": [kind.__name__], "message": [str(error)]}
        return {"error": [""], "message": [""]}


class _Recorder:
    """Loads the model, then records part after part."""

    def __init__(self, job: Job, folder: Path, done: frozenset[str]) -> None:
        self._job, self._folder, self._done = job, folder, done
        self._model = load_model(**job.load)

    def __call__(self, part: tuple[str, Sequence[Problem]]) -> None:
        (name, problems), job = part, self._job
        record(
            self._model,
            problems,
            self._folder / name,
            sites=expand_sites(job.sites, self._model.n_layers) if job.sites else (),
            sampling=job.sampling,
            samples=job.samples,
            batch_size=job.batch_size,
            think=job.think,
            open_tag=job.open_tag,
            leave_out=self._done,
        )


def _parts(problems: Sequence[Problem], size: int) -> Iterator[tuple[str, list[Problem]]]:
    """`problems` by `size`, under a name that says which they are: a part that was begun is found again."""
    ordered = sorted(problems, key=lambda problem: problem.id)
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        ids = "\n".join(problem.id for problem in part)
        yield hashlib.sha256(ids.encode()).hexdigest()[:16], part


def _merge(parts: Path, path: Path) -> None:
    """Take what the parts hold into the store at `path`; they go when it is there."""
    begun = (folder for folder in parts.glob("*") if (folder / NAME).exists())
    if folders := sorted(folder for folder in begun if len(TraceStore.open(folder))):
        merge_stores(folders, path)
    if parts.exists():
        shutil.rmtree(parts)


def _room(ray: Any, cluster: Cluster) -> int:
    there = ray.cluster_resources()
    fits = [there.get(kind, 0) / each for kind, each in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if each]
    if not fits or min(fits) < 1:
        raise InputError(f"no worker of {cluster.cpus} CPUs and {cluster.gpus} GPUs fits a cluster of {there}")
    return int(min(fits))


@contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """Inside, Ray runs; one that the caller had started is left as it is."""
    if ray.is_initialized():
        yield
        return
    here: dict[str, Any] = {"include_dashboard": False}
    if cluster.address == "local":
        here["num_cpus"] = max(os.cpu_count() or 1, math.ceil((cluster.workers or 1) * cluster.cpus))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of its plan and of bars that are off
    try:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False, **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster at {cluster.address!r} ({error}); start one (ray start --head), or use local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _ray() -> Any:
    """Ray, told to send nothing about its use, to draw nothing, and not to touch what accelerators the caller shows."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(f'this needs Ray Data ({error}): pip install "reasonscope[scale]"') from error
    return ray
