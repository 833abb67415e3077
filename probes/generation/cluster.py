"""Work for many machines or accelerators, shared out by Ray Data: any work in parts (`work_on`), and recording (`record_on`).

    run/                   the store, as `record` writes it
    run.parts/<part>/      one store per part while the run lasts, on a file system that all machines share

A part is named after its problems and the settings. When a worker dies, Ray starts another one, which opens the store of the part and
continues after what is stored. If the whole run was killed, the next one first takes over what the parts hold.
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
from reasonscope.data.storage.store import TraceStore, merge_stores
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.sites import Site, expand_sites
from reasonscope.probes.generation.recording import asking_settings, check_problems, check_settings, record
from reasonscope.probes.generation.steered import KEY, Steers
from reasonscope.probes.models.model import Model, load_model
from reasonscope.probes.models.prompting import Prompting, load_prompting

_QUIET = MappingProxyType(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
)
_PART = TypeVar("_PART")
_BATCHES = 4  # per part: enough to keep padding small, few enough that the last workers finish at about the same time


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker does with its problems: `load` holds the arguments of `load_model`, the rest are those of `record`."""

    load: Mapping[str, Any]
    sampling: Sampling
    sites: str = ""
    samples: int = 1
    batch_size: int = 16
    think: bool | None = None
    open_tag: bool | None = None
    steer: Steers | None = None

    @property
    def hash(self) -> str:
        """Differs between jobs whose traces must not mix."""
        told = (self.load, self.sampling, self.sites, self.think, self.open_tag, self.steer and self.steer.meta)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:8]

    def prompting(self) -> Prompting:
        """What its models are asked with, without their weights."""
        given = {name: self.load[name] for name in ("source", "revision", "thinking", "prompt") if name in self.load}
        if tags := self.load.get("tags"):
            given["thinking"] = Thinking(tags=tags)
        return load_prompting(**given)

    def check(self, store: TraceStore, model: Prompting) -> None:
        """Raise StoreError if a store was recorded with other settings. Of a model without weights only the name is compared."""
        known = model.fingerprint if isinstance(model, Model) else {**store.meta.get("model", {}), "name": model.name}
        meta = {"model": dict(known), **asking_settings(model, self.sampling, think=self.think, open_tag=self.open_tag)}
        steered = {KEY: dict(self.steer.meta)} if self.steer else {}
        check_settings(store, {**meta, **steered}, [str(site) for site in self.expanded(model)])

    def expanded(self, model: Prompting) -> tuple[Site, ...]:
        """The sites to record."""
        return expand_sites(self.sites, model.n_layers) if self.sites else ()


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the workers run.

    Attributes:
        address: "local" starts a Ray cluster for this process, "auto" joins the cluster of this machine; otherwise an address.
        workers: How many workers; as many as there are accelerators (if `gpus` is not 0) or CPUs if None.
        cpus: CPUs per worker.
        gpus: Accelerators per worker.
    """

    address: str = "local"
    workers: int | None = None
    cpus: float = 1
    gpus: float = 0


def record_on(cluster: Cluster, job: Job, problems: Sequence[Problem], path: str | Path) -> TraceStore:
    """Record into `path` as `record` does, with the workers of `cluster`.

    The number of workers changes no trace. Batches differ from those of one process, and so may the last digits of activations. Raises
    what `record` raises, MissingExtraError if Ray is not installed, InputError if the cluster does not exist.
    """
    path = Path(path).absolute()
    parts = path.with_name(path.name + ".parts")
    if not problems:
        raise InputError("no problems to record; give at least one")
    _check_begun(job, [store for folder in (path, *parts.glob("*")) if (store := _begun(folder))], problems)
    _merge(parts, path)
    there = _begun(path)
    done = {*there.ids} if there else set[str]()
    left = [p for p in problems if any(f"{p.id}/{sample}" not in done for sample in range(job.samples))]
    todo = list(_parts(left, max(1, _BATCHES * job.batch_size // job.samples), job.hash))
    work_on(cluster, partial(_Recorder, job, parts, path, frozenset(done)), todo)
    _merge(parts, path)
    return TraceStore.open(path)


def work_on(cluster: Cluster, make: Callable[[], Callable[[_PART], object]], parts: Sequence[_PART]) -> None:
    """Call the result of `make` with each of `parts`, on the workers of `cluster`. Each worker calls `make` once, before its first part.

    If a worker dies, another one starts its part again. So a part has to write its results whole or not at all, and a second call has to
    continue after them. The first error of this package ends the work and is raised here. Raises MissingExtraError if Ray is not
    installed, InputError if the cluster does not exist, StoreError if the workers fail for another reason.
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
            raise StoreError(f"the workers failed: {error}; what they stored is kept") from error


class _Worker:
    """Calls `make` before its first part, and then its result with one part after another; a batch is {"part": [number]}."""

    def __init__(self, make: Callable[[], Callable[[_PART], object]], parts: Sequence[_PART]) -> None:
        self._make, self._parts = make, parts
        self._work: Callable[[Any], object] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return an error of this package as a result, because Ray would turn it into a text with tracebacks."""
        try:
            self._work = self._work or self._make()
            for index in batch["part"]:
                self._work(self._parts[int(index)])
        except ReasonscopeError as error:
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            return {"error": [kind.__name__], "message": [str(error)]}
        return {"error": [""], "message": [""]}


class _Recorder:
    """Loads the model, then records one part after another."""

    def __init__(self, job: Job, folder: Path, whole: Path, done: frozenset[str]) -> None:
        self._job, self._folder, self._done = job, folder, done
        self._model = load_model(**job.load)
        if store := _begun(whole):
            job.check(store, self._model)  # the weights, too, before they are used

    def __call__(self, part: tuple[str, Sequence[Problem]]) -> None:
        (name, problems), job = part, self._job
        record(
            self._model,
            problems,
            self._folder / name,
            sites=job.expanded(self._model),
            sampling=job.sampling,
            samples=job.samples,
            batch_size=job.batch_size,
            think=job.think,
            open_tag=job.open_tag,
            leave_out=self._done,
            steer=job.steer,
        )


def _parts(problems: Sequence[Problem], size: int, settings: str) -> Iterator[tuple[str, list[Problem]]]:
    """`problems` in parts of `size`, each named by its problems and the settings, so that a part that was begun is found again."""
    ordered = sorted(problems, key=lambda problem: problem.id)
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        ids = "\n".join(problem.id for problem in part)
        yield f"{hashlib.sha256(ids.encode()).hexdigest()[:16]}-{settings}", part


def _begun(folder: Path) -> TraceStore | None:
    """The store in a folder, if it has a trace."""
    store = TraceStore.open(folder) if (folder / NAME).exists() else None
    return store if store is not None and len(store) else None


def _check_begun(job: Job, stores: Sequence[TraceStore], problems: Sequence[Problem]) -> None:
    """Raise StoreError if a run, or a part of it, was recorded with other settings than those of the job, or other problems."""
    if not stores:
        return
    model = job.prompting()
    for store in stores:
        job.check(store, model)
        check_problems(store, problems)


def _merge(parts: Path, path: Path) -> None:
    """Move the traces of the parts into the store at `path`, and then remove the parts."""
    if folders := sorted(folder for folder in parts.glob("*") if _begun(folder)):
        merge_stores(folders, path)
    if parts.exists():
        shutil.rmtree(parts)


def _room(ray: Any, cluster: Cluster) -> int:
    there = ray.cluster_resources()
    fits = [there.get(kind, 0) / each for kind, each in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if each]
    if not fits or min(fits) < 1:
        raise InputError(f"no worker with {cluster.cpus} CPUs and {cluster.gpus} GPUs fits into a cluster of {there}")
    return int(min(fits))


@contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """Run Ray for the length of the block; a cluster that the caller started is left alone."""
    if ray.is_initialized():
        yield
        return
    here: dict[str, Any] = {"include_dashboard": False}
    if cluster.address == "local":
        here["num_cpus"] = max(os.cpu_count() or 1, math.ceil((cluster.workers or 1) * cluster.cpus))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would log its plan
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
