"""SIGKILL of a worker of Ray at random instants: nothing that was finished is lost or done again, and the end is that of one process."""

import random
import shutil
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest

from reasonscope.analysis.runs.runner import AnalysisTask, run_analysis
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.cluster import Cluster, Job, record_on
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model

ray = pytest.importorskip("ray")
# Ray leaves sockets and files open, and a killed worker is news to it.
pytestmark = pytest.mark.filterwarnings("default")
SITE = "resid_post.3"
JOB = Job(load={"source": "organism"}, sampling=Sampling(temperature=0, max_new_tokens=40), sites=SITE, batch_size=1)
MANY = 20  # instants of each kind


@pytest.fixture(scope="module")
def joined():
    """A Ray of two CPUs, started once; the runs join it."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield Cluster(workers=2)
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process records and analyses."""
    folder = tmp_path_factory.mktemp("alone")
    how = {"sites": [SITE], "sampling": JOB.sampling, "batch_size": 1}
    record(load_model("organism"), load_problems("ledger", n=12), folder / "store", **how).close()
    shutil.copytree(folder / "store", folder / "bare" / "store")
    list(run_analysis(task(folder)))
    return folder


def task(folder):
    return AnalysisTask.of(folder, "mi", figures=True)


def workers():
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "MapWorker" in one.name():
                found.append(one)
    return found


@contextmanager
def killing(instant, begun, draw):
    """Kill one of the workers `instant` seconds after `begun()`; gives what `draw()` saw just before, once it has happened."""
    seen, over = [], threading.Event()

    def kill():
        while not begun():
            if over.wait(0.01):
                return
        if over.wait(instant):
            return
        found = workers()
        # A run that ends just now puts away what is looked at, and lets its workers go.
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            if found:
                before = draw()
                random.choice(found).kill()
                seen.append(before)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def shards(folder):
    """The finished shards of a store, or of many, by the file itself, whatever its name is."""
    return {
        path.with_suffix(".safetensors").stat().st_ino
        for manifest in (*folder.glob(NAME), *folder.glob(f"*/{NAME}"))
        for path in (manifest.parent / "shards").glob("*.parquet")
        if path.stem in manifest.read_text()
    }


def recorded(joined, alone, folder, instant, begun):
    with killing(instant, begun, lambda: shards(folder / "run.parts")) as seen:
        store = record_on(joined, JOB, load_problems("ledger", n=12), folder / "run")
    one = TraceStore.open(alone / "store")
    assert check_store(folder / "run") == [] and sorted(store.ids) == sorted(one.ids) and store.meta == one.meta
    for trace in one:
        assert store.trace(trace.id) == trace
        np.testing.assert_array_equal(store.activations(trace.id, SITE), one.activations(trace.id, SITE))
    assert not (folder / "run.parts").exists()
    for finished in seen:
        assert finished <= shards(folder / "run")  # the very files, linked
    return seen


def notes(folder):
    """Those that bear their names: one that is being written lies in a folder of its own."""
    return [*folder.glob("unfinished/*/*.json")]


def analysed(joined, alone, content, folder, instant, begun):
    shutil.copytree(alone / "bare" / "store", folder / "store")
    results = run_folder(folder).analyses

    def finished():
        noted = notes(folder)
        return {path: path.stat().st_mtime_ns for note in noted for path in results.glob(f"*/{note.stem}.safetensors")}

    with killing(instant, lambda: begun(folder), finished) as seen:
        found = [result.provenance["trace"] for result in run_analysis(task(folder), cluster=joined)]
    assert found == [*TraceStore.open(folder / "store").ids, "all"]
    assert not (folder / "unfinished").exists()
    for name in ("results", "figures"):
        assert content(folder / name) == content(alone / name)
    for before in seen:
        assert {path: path.stat().st_mtime_ns for path in before} == before
    return seen


def killed_anywhere(run, seconds, seed):
    """`run(name, instant)` until MANY instants of its `seconds` have met a worker; one that met none says how short a run can be."""
    rng, killed = np.random.default_rng(seed), 0
    for i in range(3 * MANY):
        began = time.monotonic()
        met = len(run(str(i), rng.uniform(0, seconds)))
        killed += met
        if killed == MANY:
            return
        if not met:
            seconds = min(seconds, time.monotonic() - began)
    raise AssertionError(f"{killed} of {3 * MANY} instants met a worker")


@pytest.mark.slow
def test_a_killed_recorder_loses_and_repeats_nothing(joined, alone, tmp_path):
    parts = tmp_path / "run.parts"
    seen = recorded(joined, alone, tmp_path, 0.1, lambda: any(parts.glob("*/shards/*.parquet")))
    assert seen and seen[0]


def test_a_killed_analyst_loses_and_repeats_nothing(joined, alone, content, tmp_path):
    seen = analysed(joined, alone, content, tmp_path, 0.1, notes)
    assert seen and seen[0]


@pytest.mark.slow
def test_recorders_killed_anywhere(joined, alone, tmp_path):
    began = time.monotonic()
    recorded(joined, alone, tmp_path / "whole", 1e6, lambda: True)
    run = lambda name, instant: recorded(joined, alone, tmp_path / name, instant, lambda: True)  # noqa: E731
    killed_anywhere(run, time.monotonic() - began, seed=0)


@pytest.mark.slow
def test_analysts_killed_anywhere(joined, alone, content, tmp_path):
    began = time.monotonic()
    analysed(joined, alone, content, tmp_path / "whole", 1e6, lambda _: True)
    run = lambda name, instant: analysed(joined, alone, content, tmp_path / name, instant, lambda _: True)  # noqa: E731
    killed_anywhere(run, time.monotonic() - began, seed=1)
