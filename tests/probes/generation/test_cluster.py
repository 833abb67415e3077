"""Two workers of a real Ray on this machine write the store of one process, whatever happens to them."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest

from reasonscope.data.errors import InputError, ModelLoadError, StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.think_tags import ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation import cluster
from reasonscope.probes.generation.cluster import Cluster, Job, record_on
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import PromptOptions

pytest.importorskip("ray")
SAMPLING = Sampling(temperature=0, max_new_tokens=40)
SITES = "resid_post.2-3"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of two problems."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    how = {"sites": ["resid_post.2"], "sampling": SAMPLING}
    record(load_model("organism"), load_problems("ledger", n=2), path, **how).close()
    return path


def job(**changes):
    return Job(**{"load": {"source": "organism"}, "sampling": SAMPLING, "sites": SITES, "batch_size": 1, **changes})


def test_parts_are_named_by_what_is_in_them():
    problems = load_problems("ledger", n=7)
    parts = dict(cluster._parts(problems, 3, job().hash))
    assert sorted(problem.id for part in parts.values() for problem in part) == sorted(p.id for p in problems)
    assert [len(part) for part in parts.values()] == [3, 3, 1]
    assert dict(cluster._parts(problems[::-1], 3, job().hash)) == parts
    for change in ({"sites": ""}, {"think": False}, {"load": {"source": "organism", "dtype": "bfloat16"}}):
        assert not set(parts) & set(dict(cluster._parts(problems, 3, job(**change).hash)))


def test_a_run_whose_driver_was_killed_keeps_its_parts_and_starts_no_worker_for_them(tmp_path):
    """What is done is taken over first; here that is all, so that no Ray is started."""
    model, problems = load_model("organism"), load_problems("ledger", n=3)
    parts = tmp_path / "run.parts"
    for name, part in (("one", problems[:2]), ("two", problems[2:])):
        record(model, part, parts / name, sites=["resid_post.2"], sampling=SAMPLING).close()
    store = record_on(Cluster(address="nowhere:1"), job(sites="resid_post.2"), problems, tmp_path / "run")
    assert sorted(store.ids) == sorted(f"{problem.id}/0" for problem in problems)
    assert store.check() == [] and not parts.exists()


OTHERWISE = [
    (
        {"sampling": replace(SAMPLING, temperature=0.1, max_new_tokens=99)},
        r"max_new_tokens: 40 \(now 99\).*temperature",
    ),
    ({"sites": "resid_post.1"}, r"sites: resid_post.2 \(now resid_post.1\)"),
    ({"sites": ""}, r"sites: resid_post.2 \(now none\)"),
    ({"think": False}, r"prompt.think: True \(now False\)"),
    ({"open_tag": True}, r"prompt.open_tag"),
    ({"load": {"source": "organism-base"}}, r"model.name: organism \(now organism-base\)"),
    ({"load": {"source": "organism", "prompt": PromptOptions(system="Be brief.")}}, r"prompt.system"),
    (
        {"load": {"source": "organism", "thinking": Thinking(mode="completion")}},
        r"thinking.mode: tags \(now completion",
    ),
    ({"load": {"source": "organism", "tags": ThinkTags(open="<a>", close="</a>")}}, r"thinking.tags"),
    ({"steer": Mock(meta={"name": "short", "hash": "1234"})}, r"steered by short"),
]


@pytest.mark.parametrize(("change", "message"), OTHERWISE)
@pytest.mark.parametrize("n", [2, 3])  # all are there, or one is left
@pytest.mark.parametrize("folder", ["run", "run.parts/one"])
def test_a_run_or_a_part_with_other_settings_is_refused_before_any_work(recorded, tmp_path, change, message, n, folder):
    """No worker would be found at this address."""
    shutil.copytree(recorded, tmp_path / folder)
    with pytest.raises(StoreError, match=message):
        record_on(
            Cluster(address="nowhere:1"),
            job(**{"sites": "resid_post.2", **change}),
            load_problems("ledger", n=n),
            tmp_path / "run",
        )
    assert len(TraceStore.open(tmp_path / folder)) == 2


def test_a_problem_that_was_changed_is_refused_before_any_work(recorded):
    problems = [replace(problem, answer="7.5") for problem in load_problems("ledger", n=3)]
    with pytest.raises(StoreError, match=r"\(now 7.5\)"):
        record_on(Cluster(address="nowhere:1"), job(sites="resid_post.2"), problems, recorded)


def test_a_worker_compares_the_weights_before_it_uses_them(recorded, tmp_path):
    half = job(sites="resid_post.2", load={"source": "organism", "dtype": "bfloat16"})
    with pytest.raises(StoreError, match=r"model.dtype: float32 \(now bfloat16\)"):
        cluster._Recorder(half, tmp_path / "parts", recorded, frozenset())
    cluster._Recorder(job(sites="resid_post.2"), tmp_path / "parts", recorded, frozenset())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray leaves sockets and files open
def test_two_workers_of_which_one_is_killed_write_the_store_of_one_process(tmp_path, capfd):
    problems = load_problems("ledger", n=12)
    killed = []

    def kill():
        while not list(tmp_path.glob("run.parts/*/shards/*.parquet")):
            time.sleep(0.05)
        mine = psutil.Process().children(recursive=True)
        workers = [child for child in mine if "MapWorker" in child.name()]
        workers[0].kill()
        killed.append(workers[0].pid)

    threading.Thread(target=kill, daemon=True).start()
    store = record_on(Cluster(workers=2), job(), problems, tmp_path / "run")
    one = record(load_model("organism"), problems, tmp_path / "one", sites=SITES_LIST, sampling=SAMPLING)
    assert killed
    assert sorted(store.ids) == sorted(one.ids) and store.meta == one.meta and store.check() == []
    for trace in one:
        np.testing.assert_array_equal(store.trace(trace.id).token_ids, trace.token_ids)
        for site in one.sites:
            there, here = store.activations(trace.id, site), one.activations(trace.id, site)
            np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-3)
    files = {path: path.stat().st_mtime_ns for path in Path(tmp_path / "run").rglob("*.safetensors")}
    assert len(record_on(Cluster(workers=2), job(), problems, tmp_path / "run")) == 12
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path / "run").rglob("*.safetensors")} == files
    with pytest.raises(ModelLoadError, match="not a folder"):
        record_on(Cluster(workers=1), job(load={"source": "./nothing"}), problems, tmp_path / "none")
    with pytest.raises(InputError, match="fits"):
        record_on(Cluster(gpus=99), job(), problems, tmp_path / "none")
    assert not (tmp_path / "none").exists()


SITES_LIST = ["resid_post.2", "resid_post.3"]
