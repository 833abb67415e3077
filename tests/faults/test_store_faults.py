"""Full disks, vanished stores, two writers, flipped bits: one error that says what to do, and nothing that was stored is lost."""

import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonscope.data.errors import ReasonscopeError, StoreError
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace, trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.steering.vectors.vector import Site, SteeringVector

RECORD = ("record", "--n", 2, "--batch-size", 1, "--sites", "resid_post.2", "--temperature", 0, "--max-new-tokens", 16)


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: what a full disk does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small_store(folder):
    """Two shards with a trace each, every row of it another number; text alone, since the store does not care what rows mean."""
    with TraceStore.create(folder, meta={"made": "by hand"}, sites=["z.0"]) as store:
        for i in range(2):
            store.append([small_trace(i)], {"z.0": [np.zeros((0, 3), dtype=np.float32)]})
    return folder


def small_trace(i):
    return trace_from_text(id=f"t{i}", problem=Problem(id="p", prompt="Q"), prompt="Q", completion="<think>a</think>b")


@pytest.mark.parametrize("size", [0, 3000, 9000])
def test_a_full_disk_ends_a_command_in_one_line_and_a_second_run_ends_as_if_it_had_not_been(
    command, content, tmp_path, size
):
    full = command(*RECORD, "--out", tmp_path / "full", largest_file=size)
    assert full["status"] == 2, full["said"]
    assert "make room" in full["said"] and "Traceback" not in full["said"]
    if (tmp_path / "full" / "manifest.json").exists():
        assert check_store(tmp_path / "full") == []
    assert not list(tmp_path.rglob("*.tmp*"))
    for name in ("full", "whole"):
        assert command(*RECORD, "--out", tmp_path / name)["status"] == 0
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def test_a_full_disk_leaves_the_results_and_exports_that_were_there(command, content, tmp_path):
    assert command(*RECORD, "--out", tmp_path / "run")["status"] == 0
    made = (
        ("analyse", "entropy", "--run", tmp_path / "run"),
        ("export", tmp_path / "run", "--out", tmp_path / "run-results" / "t.jsonl"),
    )
    for words in made:
        assert command(*words)["status"] == 0
    before = content(tmp_path / "run-results")
    for words in made:
        done = command(*words, largest_file=1000)
        assert done["status"] == 2 and "make room" in done["said"] and "Traceback" not in done["said"], done["said"]
    assert content(tmp_path / "run-results") == before


def test_a_vector_that_does_not_fit_on_the_disk_is_one_error_and_the_one_before_stays(tmp_path):
    vector = SteeringVector(directions={Site("resid_post", 1): np.ones(4096, dtype=np.float32)}, method="ones")
    for name in ("v.safetensors", "v.gguf"):
        vector.save(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with largest_file(5000), pytest.raises(StoreError, match="make room"):
            vector.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.gguf", "v.safetensors"]


def test_a_store_that_vanishes_under_a_reader_is_an_error_that_says_so(tmp_path):
    store = TraceStore.open(small_store(tmp_path / "run"))
    assert store.ids == ("t0", "t1")
    shutil.rmtree(tmp_path / "run")
    for read in (lambda: list(store), lambda: store.trace("t1"), lambda: store.activations("t1", "z.0"), store.table):
        with pytest.raises(StoreError, match="missing"):
            read()
    assert len(store.check()) == 1 and "not a trace store" in store.check()[0]
    with pytest.raises(StoreError):
        store.append([small_trace(2)], {"z.0": [np.zeros((0, 3), dtype=np.float32)]})
    assert not (tmp_path / "run").exists()


def test_readers_never_see_half_a_shard_while_one_writes(tmp_path):
    small_store(tmp_path / "run")
    with TraceStore.open(tmp_path / "run") as writer:
        stop = threading.Event()

        def write():
            try:
                for i in range(2, 20):
                    writer.append([small_trace(i)], {"z.0": [np.zeros((0, 3), dtype=np.float32)]})
            finally:
                stop.set()

        thread = threading.Thread(target=write)
        thread.start()
        seen = []
        while not stop.is_set() or not seen:
            assert check_store(tmp_path / "run") == []
            seen.append([trace.id for trace in TraceStore.open(tmp_path / "run")])
        thread.join()
    assert all(ids == [f"t{i}" for i in range(len(ids))] for ids in seen) and len(seen[-1]) >= len(seen[0])


HOLDER = """
import sys, time
import numpy as np
from reasonscope.data.storage.store import TraceStore
store = TraceStore.open(sys.argv[1])
store.append([], {})
store._take_lock()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    path = small_store(tmp_path / "run")
    rows = {"z.0": [np.zeros((0, 3), dtype=np.float32)]}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with TraceStore.open(path) as store:
            with pytest.raises(StoreError, match="being written by another process"):
                store.append([small_trace(2)], rows)
            assert store.ids == ("t0", "t1")  # reading goes on
            holder.kill()
            holder.wait()
            store.append([small_trace(2)], rows)
    assert TraceStore.open(path).ids == ("t0", "t1", "t2") and check_store(path) == []


@pytest.fixture(scope="module")
def damaged(tokenizer, tmp_path_factory):
    """A small store to be damaged, and every file of it as it was."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    rng = np.random.default_rng(0)
    ids = tokenizer.encode("Q 3").ids
    with TraceStore.create(folder, sites=["resid_post.0", "z.1"]) as store:
        for i in range(2):
            problem = Problem(id=f"p{i}", prompt="a")
            trace = build_trace(id=f"t{i}", problem=problem, token_ids=ids, n_prompt_tokens=1, tokenizer=tokenizer)
            arrays = {
                site: [rng.normal(size=(len(ids) - 1, *shape)).astype(np.float32)]
                for site, shape in (("resid_post.0", (4,)), ("z.1", (2, 3)))
            }
            store.append([trace], arrays)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    return folder, files, read(TraceStore.open(folder))


def read(store):
    """Everything that a reader gets out of a store."""
    arrays = [store.activations(id, site) for id in store.ids for site in store.sites]
    return list(store), [store.trace(id) for id in store.ids], [(a.dtype.name, a.shape, a.tobytes()) for a in arrays]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_of_any_file_and_any_truncation_is_found_and_never_read(damaged, data):
    folder, files, whole = damaged
    path = data.draw(st.sampled_from(sorted(files)))
    position = data.draw(st.integers(0, len(files[path]) - 1))
    changed = bytearray(files[path])
    if data.draw(st.booleans()):
        changed[position] ^= data.draw(st.integers(1, 255))
    else:
        changed = changed[:position]
    found_and_never_read(folder, path, bytes(changed), whole, files, opened=data.draw(st.booleans()))


def test_a_type_that_was_changed_in_a_header_is_never_read(damaged):
    folder, files, whole = damaged
    for path, raw in files.items():
        for a, b in ((b"F32", b"I32"), (b"F32", b"U32"), (b"[2,2,3]", b"[2,3,2]"), (b"[2,4]", b"[4,2]")):
            if path.suffix == ".safetensors" and (changed := raw.replace(a, b)) != raw:
                found_and_never_read(folder, path, changed, whole, files)
                path.write_bytes(changed)
                with pytest.raises(StoreError, match="differs from what was stored"):
                    read(TraceStore.open(folder))
                path.write_bytes(raw)


@pytest.mark.slow
def test_every_byte_of_every_file_counts(damaged):
    folder, files, whole = damaged
    rng = np.random.default_rng(0)
    for path, raw in files.items():
        header = int.from_bytes(raw[:8], "little") if path.suffix == ".safetensors" else 0
        for position in range(len(raw)):
            for byte in {
                raw[position] ^ int(rng.integers(1, 256)),
                *(b"IUF0123456" if 8 <= position < 8 + header else b""),
            }:
                if byte != raw[position]:
                    found_and_never_read(
                        folder, path, raw[:position] + bytes([byte]) + raw[position + 1 :], whole, files
                    )
            found_and_never_read(folder, path, raw[:position], whole, files)


def found_and_never_read(folder, path, changed, whole, files, *, opened=False):
    """`check` finds the damage; a reader gets an error, or (where the damage is in what nobody asked for) what was stored."""
    store = TraceStore.open(folder)
    assert not opened or store.ids  # it knows by now where every trace lies
    path.write_bytes(changed)
    try:
        assert len(check_store(folder)) == 1
        try:
            found = read(store if opened else TraceStore.open(folder))
        except ReasonscopeError as error:
            assert isinstance(error, StoreError)
        else:
            assert found == whole
    finally:
        path.write_bytes(files[path])
    assert check_store(folder) == []
