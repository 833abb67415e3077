import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonscope.data.errors import InputError, SiteError, StoreError
from reasonscope.data.storage import durable, shards
from reasonscope.data.storage import store as store_module
from reasonscope.data.storage.durable import write_text_durably
from reasonscope.data.storage.manifest import Manifest, StoredFile
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace, trace_from_text
from reasonscope.data.trace import Message, Problem, Sampling, Trace

SITES = ("resid_post.0", "z.1")
BFLOAT16 = ml_dtypes.bfloat16


def make_trace(tokenizer, id: str, completion: str = "<think>\nSo 3 + 4 = 7.\n</think>\n\nIt is 7.", **fields) -> Trace:
    prompt = tokenizer.encode("What is 3 + 4?\n").ids
    problem = Problem(
        id=f"p-{id}", messages=(Message(role="user", content="What is 3 + 4?"),), answer="7", meta={"steps": [1, 2]}
    )
    ids = prompt + tokenizer.encode(completion).ids
    return build_trace(
        id=id, problem=problem, token_ids=ids, n_prompt_tokens=len(prompt), tokenizer=tokenizer, **fields
    )


def make_arrays(traces, seed: int = 0):
    rng = np.random.default_rng(seed)
    rows = [len(trace.token_ids) - 1 for trace in traces]
    return {
        "resid_post.0": [rng.normal(size=(n, 4)).astype(BFLOAT16) for n in rows],
        "z.1": [rng.normal(size=(n, 2, 3)).astype(np.float32) for n in rows],
    }


@pytest.fixture
def stored(tokenizer, tmp_path):
    """A store of two shards with three traces, and what went in."""
    traces = [make_trace(tokenizer, "a"), make_trace(tokenizer, "b", "7"), make_trace(tokenizer, "c")]
    arrays = make_arrays(traces)
    with TraceStore.create(tmp_path / "run", meta={"model": "tiny"}, sites=SITES) as store:
        store.append(traces[:2], {site: values[:2] for site, values in arrays.items()})
        store.append(traces[2:], {site: values[2:] for site, values in arrays.items()})
    return tmp_path / "run", traces, arrays


def test_what_goes_in_comes_out(stored):
    path, traces, arrays = stored
    store = TraceStore.open(path)
    assert store.ids == ("a", "b", "c") and len(store) == 3 and "b" in store and "x" not in store
    assert store.sites == SITES and store.meta == {"model": "tiny"}
    assert list(store) == traces and [store.trace(id) for id in "cab"] == [traces[2], traces[0], traces[1]]
    for site, values in arrays.items():
        for trace, value in zip(traces, values, strict=True):
            found = store.activations(trace.id, site)
            assert found.dtype == value.dtype and np.array_equal(found.view(np.uint8), value.view(np.uint8))
    assert store.table().num_rows == 3 and store.check() == []


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no such advice")
def test_the_header_and_the_rows_are_announced(stored, monkeypatch):
    path, _, arrays = stored
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *where: told.append(where))
    store = TraceStore.open(path)
    file = path / "shards" / "000000.safetensors"
    for site, values in arrays.items():
        rows = values[1].tobytes()  # of trace b, behind those of a
        store.activations("b", site)
        assert [advice for *_, advice in told] == [os.POSIX_FADV_WILLNEED] * 2
        (start, header, _), (offset, size, _) = told
        assert start == 0 and header >= int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert file.read_bytes()[offset : offset + len(rows)] == rows and size == 2 * len(rows)
        told.clear()


def test_it_opens_with_pyarrow_and_safetensors_alone(stored):
    path, traces, arrays = stored
    code = (
        "import sys, json, ml_dtypes, pyarrow.parquet as pq; from safetensors import safe_open\n"
        "row = pq.read_table('shards/000000.parquet').to_pylist()[1]\n"
        "file = safe_open('shards/000000.safetensors', framework='np')\n"
        "rows = file.get_slice('resid_post.0')[row['row_start']:row['row_stop']]\n"
        "assert 'reasonscope' not in sys.modules\n"
        "print(json.dumps([row['id'], row['text'], str(rows.dtype), rows.astype('float64').tolist()]))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, check=True, text=True).stdout
    assert json.loads(out) == ["b", traces[1].text, "bfloat16", arrays["resid_post.0"][1].astype("float64").tolist()]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3),
    max_leaves=5,
)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip_of_any_trace_is_exact(tokenizer, tmp_path_factory, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=20))
    n_prompt = data.draw(st.integers(0, len(ids)))
    floats = st.lists(st.floats(width=32), min_size=len(ids) - n_prompt, max_size=len(ids) - n_prompt)
    floats = floats.map(lambda values: np.array(values, dtype=np.float32))
    problem = Problem(
        id=data.draw(TEXT), prompt=data.draw(TEXT), answer=data.draw(st.none() | TEXT), group=data.draw(TEXT),
        difficulty=data.draw(st.none() | st.floats(-9, 9)), meta=data.draw(st.dictionaries(TEXT, JSON, max_size=2)),
    )  # fmt: skip
    sampling = Sampling(
        temperature=data.draw(st.floats(0, 2)), top_p=0.9, max_new_tokens=5, seed=data.draw(st.integers(0, 2**40))
    )
    trace = build_trace(
        id=data.draw(TEXT), problem=problem, token_ids=ids, n_prompt_tokens=n_prompt, tokenizer=tokenizer,
        finish_reason=data.draw(st.sampled_from(["stop", "length", "unknown"])), sample=data.draw(st.integers(0, 9)),
        sampling=data.draw(st.none() | st.just(sampling)), model={"name": data.draw(TEXT)},
        logprobs=data.draw(st.none() | floats), entropies=data.draw(st.none() | floats),
        meta=data.draw(st.dictionaries(TEXT, JSON, max_size=2)),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("store") / "run"
    with TraceStore.create(path) as store:
        store.append([trace])
    assert list(TraceStore.open(path)) == [trace]
    assert TraceStore.open(path).trace(trace.id) == trace


def test_one_trace_reads_its_own_bytes_alone(stored):
    path, _, arrays = stored
    file = path / "shards" / "000000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[_begin(file, "z.1") + 4 * 6 * len(arrays["z.1"][0])] ^= 1  # the first row of trace b
    file.write_bytes(raw)
    store = TraceStore.open(path)
    assert np.array_equal(store.activations("a", "z.1"), arrays["z.1"][0])
    assert np.array_equal(store.activations("b", "resid_post.0"), arrays["resid_post.0"][1])
    with pytest.raises(StoreError, match="changed since they were stored"):
        store.activations("b", "z.1")
    assert [problem.split(" is damaged")[0] for problem in store.check()] == [str(file)]


def _begin(file: Path, site: str) -> int:
    """Where the bytes of a tensor begin: behind the length of the header (8 bytes) and the header."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length + json.loads(raw[8 : 8 + length])[site]["data_offsets"][0]


def test_every_byte_of_the_manifest_counts(tokenizer, tmp_path):
    path = tmp_path / "run"
    with TraceStore.create(path, meta={"model": "tiny"}) as store:
        store.append([make_trace(tokenizer, "a")])
    file = path / "manifest.json"
    raw = file.read_bytes()
    for position in range(len(raw)):
        for bit in (1, 32):  # 32 turns a letter into the other case, a blank into NUL
            file.write_bytes(raw[:position] + bytes([raw[position] ^ bit]) + raw[position + 1 :])
            with pytest.raises(StoreError):
                Manifest.read(path)
    for damaged in (raw[:-1], raw + b"\n", b""):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged"):
            Manifest.read(path)


@pytest.mark.parametrize("name", ["000000.parquet", "000001.safetensors"])
def test_every_byte_of_a_shard_is_checked(stored, name):
    path, _, _ = stored
    file = path / "shards" / name
    raw = file.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(raw), 25):
        file.write_bytes(raw[:position] + bytes([raw[position] ^ 16]) + raw[position + 1 :])
        assert len(check_store(path)) == 1 and str(file) in check_store(path)[0]
    file.write_bytes(raw[:-1])
    with pytest.raises(StoreError, match=f"{len(raw) - 1} bytes instead of {len(raw)}"):
        TraceStore.open(path)
    file.unlink()
    with pytest.raises(StoreError, match="is missing"):
        TraceStore.open(path)
    assert len(check_store(path)) == 1


def test_an_altered_table_is_an_error_when_it_is_read(stored):
    path, _, _ = stored
    file = path / "shards" / "000000.parquet"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StoreError, match="changed since they were stored"):
        list(TraceStore.open(path))


def test_strays_are_reported(stored):
    path, _, _ = stored
    strays = [path / name for name in ("000002.parquet", "note.txt")]
    strays += [path / "shards" / name for name in ("000002.txt", "00009.parquet", "0000010.parquet", "x.parquet")]
    for stray in strays:
        stray.write_bytes(b"x")
    assert [problem.split(" does not belong")[0] for problem in check_store(path)] == sorted(map(str, strays))


def test_what_is_not_a_store(tmp_path, stored):
    path, _, _ = stored
    with pytest.raises(StoreError, match="is not a trace store"):
        TraceStore.open(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="not the manifest of a trace store"):
        TraceStore.open(tmp_path)
    with pytest.raises(StoreError, match="not empty"):
        TraceStore.create(path)
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**values, "version": 99}))
    with pytest.raises(StoreError, match=r"version 99.*upgrade"):
        TraceStore.open(path)


def test_unknown_names(stored):
    store = TraceStore.open(stored[0])
    with pytest.raises(InputError, match="no trace 'x'"):
        store.trace("x")
    with pytest.raises(SiteError, match=r"has no activations at 'z\.9'"):
        store.activations("a", "z.9")


def test_what_does_not_fit_is_refused_and_nothing_is_written(stored, tokenizer):
    path, traces, arrays = stored
    new = make_trace(tokenizer, "d")
    fitting = make_arrays([new])
    with TraceStore.open(path) as store:
        cases = [
            (traces[:1], {site: values[:1] for site, values in arrays.items()}, "already has a trace"),
            ([new, new], {site: values * 2 for site, values in fitting.items()}, "already"),
            ([new], {"resid_post.0": fitting["resid_post.0"]}, "the store needs"),
            ([new], {**fitting, "z.1": []}, "0 arrays for 1 traces"),
            ([new], {**fitting, "z.1": [fitting["z.1"][0][:-1]]}, "rows"),
            ([new], {**fitting, "z.1": [fitting["z.1"][0].astype(np.float16)]}, "float16"),
            ([new], {**fitting, "z.1": [fitting["z.1"][0][:, :1]]}, "does not fit"),
            ([make_trace(tokenizer, "e", meta={"x": {1, 2}})], make_arrays([new]), "JSON"),
        ]
        for bad, values, message in cases:
            with pytest.raises(InputError, match=message):
                store.append(bad, values)
        store.append([])
        assert store.check() == [] and len(store) == 3
    with (
        TraceStore.create(path.parent / "other", sites=["z.0"]) as store,
        pytest.raises(InputError, match="cannot be stored"),
    ):
        store.append([new], {"z.0": [np.zeros((len(new.token_ids) - 1, 1), dtype="complex64")]})
    with pytest.raises(InputError, match="contain a duplicate"):
        TraceStore.create(path.parent / "third", sites=["z.0", "z.0"])
    with pytest.raises(InputError, match="JSON"):
        TraceStore.create(path.parent / "fourth", meta={"x": float("nan")})


def test_resume(stored, tokenizer):
    path, _, _ = stored
    with TraceStore.open_or_create(path, meta={"model": "tiny"}, sites=SITES) as store:
        new = make_trace(tokenizer, "d")
        store.append([new], make_arrays([new]))
    assert TraceStore.open(path).ids == ("a", "b", "c", "d") and check_store(path) == []
    with pytest.raises(StoreError, match="holds the sites"):
        TraceStore.open_or_create(path, meta={"model": "tiny"}, sites=["z.1"])
    with pytest.raises(StoreError, match="another model"):
        TraceStore.open_or_create(path, meta={"model": "other"}, sites=SITES)
    assert len(TraceStore.open_or_create(path.parent / "new")) == 0


def test_two_writers_are_one_too_many(stored, tokenizer):
    path, _, _ = stored
    new = make_trace(tokenizer, "d")
    first, second = TraceStore.open(path), TraceStore.open(path)
    first.append([new], make_arrays([new]))
    with pytest.raises(StoreError, match="written by another process"):
        second.append([make_trace(tokenizer, "e")], make_arrays([new]))
    first.close()
    with pytest.raises(InputError, match="already"):  # it has seen what the first one wrote
        second.append([new], make_arrays([new]))
    second.append([make_trace(tokenizer, "e")], make_arrays([new]))
    second.close()
    assert TraceStore.open(path).ids == ("a", "b", "c", "d", "e")


def test_a_store_that_another_made_before_the_lock_was_held_stays(tokenizer, tmp_path, monkeypatch):
    path, take = tmp_path / "run", TraceStore._take_lock

    def late(store):
        monkeypatch.setattr(TraceStore, "_take_lock", take)
        with TraceStore.create(path) as other:
            other.append([make_trace(tokenizer, "a")])
        take(store)

    monkeypatch.setattr(TraceStore, "_take_lock", late)
    with pytest.raises(StoreError, match="not empty") as raised:
        TraceStore.create(path)
    with TraceStore.open(path) as store:  # the lock was released, although the error is still at hand
        store.append([make_trace(tokenizer, "b")])
    assert TraceStore.open(path).ids == ("a", "b") and check_store(path) == [] and raised


def test_a_writer_that_finds_the_manifest_damaged_writes_nothing(tokenizer, tmp_path):
    TraceStore.create(tmp_path / "run").close()
    store, file = TraceStore.open(tmp_path / "run"), tmp_path / "run" / "manifest.json"
    file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            store.append([make_trace(tokenizer, "a")])
    assert not any((tmp_path / "run" / "shards").iterdir())


@pytest.mark.parametrize("name", "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split())
def test_every_type_comes_back_as_it_was(name, tokenizer, tmp_path):
    trace = make_trace(tokenizer, "a")
    values = (np.arange(2 * (len(trace.token_ids) - 1)).reshape(-1, 2) % 3).astype(
        BFLOAT16 if name == "bfloat16" else name
    )
    with TraceStore.create(tmp_path / "run", sites=["mlp_out.0"]) as store:
        store.append([trace], {"mlp_out.0": [values]})
    found = TraceStore.open(tmp_path / "run").activations("a", "mlp_out.0")
    assert found.dtype.name == name and np.array_equal(found, values)


def test_a_type_that_others_do_not_know_is_refused(tokenizer, tmp_path):
    trace = make_trace(tokenizer, "a")
    values = np.zeros((len(trace.token_ids) - 1, 2), dtype=np.complex64)
    store = TraceStore.create(tmp_path / "run", sites=["mlp_out.0"])
    with store, pytest.raises(InputError, match="complex64 cannot be stored"):
        store.append([trace], {"mlp_out.0": [values]})


def test_traces_in_order_read_each_table_once(stored, monkeypatch):
    store, read = TraceStore.open(stored[0]), []
    assert store.ids == ("a", "b", "c")
    table = store._table
    monkeypatch.setattr(store, "_table", lambda shard: read.append(shard.name) or table(shard))
    assert [store.trace(id).id for id in "abca"] == ["a", "b", "c", "a"]
    assert read == ["000000", "000001", "000000"]


def test_text_without_tokens_is_stored_too(tmp_path):
    trace = trace_from_text(id="t", problem=Problem(id="p", prompt="Q"), prompt="Q", completion="<think>a</think>b")
    with TraceStore.create(tmp_path / "run", sites=["z.0"]) as store:
        store.append([trace], {"z.0": [np.zeros((0, 4), dtype=np.float32)]})
        assert list(store) == [trace] and store.activations("t", "z.0").shape == (0, 4)
        assert TraceStore.open(tmp_path / "run").table()["text"].to_pylist() == [trace.text]


def test_an_empty_store_has_a_table(tmp_path):
    with TraceStore.create(tmp_path / "run") as store:
        assert store.table().num_rows == 0 and "row_start" in store.table().schema.names and list(store) == []


@pytest.mark.parametrize("limit", [0, 200, 9000])
def test_a_full_disk_is_one_error_and_loses_nothing(stored, tokenizer, limit):
    path, traces, _ = stored
    new = make_trace(tokenizer, "d", "So 7. " * (1 + limit // 20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with TraceStore.open(path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may grow beyond
        try:
            with pytest.raises(StoreError, match="what was stored before is intact"):
                store.append([new], make_arrays([new]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert check_store(path) == []
        store.append([new], make_arrays([new]))
    assert list(TraceStore.open(path)) == [*traces, new]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from reasonscope.data.storage.store import TraceStore
from dataclasses import replace
path = Path(sys.argv[1])
store = TraceStore.open(path)
trace = store.trace("a")
rows = np.ones((len(trace.token_ids) - 1, 4), dtype=np.float32)
start = len(store)
print("ready", flush=True)
for i in range(start, 100000):
    store.append([replace(trace, id=f"t{i}")], {"z.0": [rows * i]})
    print("appended", flush=True)
"""


def test_a_killed_writer_loses_at_most_one_shard(tokenizer, tmp_path):
    path = tmp_path / "run"
    trace = make_trace(tokenizer, "a")
    rows = np.ones((len(trace.token_ids) - 1, 4), dtype=np.float32)
    with TraceStore.create(path, sites=["z.0"]) as store:
        store.append([trace], {"z.0": [rows]})
    known = 1
    for delay in (0.0, 0.013, 0.047, 0.11):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        if known == 1 and delay == 0.11:  # a slow machine has appended nothing by now
            assert process.stdout.readline() == b"appended\n"
        process.kill()
        process.wait()
        process.stdout.close()
        store = TraceStore.open(path)
        assert len(store) >= known and store.ids == ("a", *(f"t{i}" for i in range(1, len(store))))
        for i, id in enumerate(store.ids[1:], start=1):
            assert np.array_equal(store.activations(id, "z.0"), rows * i)
        known = len(store)
    with TraceStore.open(path) as store:  # the dead held no lock; its half-written shard is replaced
        store.append([make_trace(tokenizer, "last")], {"z.0": [rows]})
    assert known > 1 and check_store(path) == []


def test_a_writer_killed_before_its_first_manifest_leaves_room_for_a_new_one(tmp_path):
    (tmp_path / "run" / "shards").mkdir(parents=True)
    (tmp_path / "run" / "manifest.json.tmp").write_text("{")
    TraceStore.create(tmp_path / "run").close()
    assert check_store(tmp_path / "run") == []
    (tmp_path / "run" / "manifest.json").unlink()
    (tmp_path / "run" / "shards" / "000000.parquet").write_bytes(b"x")
    with pytest.raises(StoreError, match="not empty"):  # a lost manifest is no empty store
        TraceStore.create(tmp_path / "run")


@pytest.mark.parametrize("make", [TraceStore.create, TraceStore.open_or_create])
def test_a_store_without_a_trace_gives_way_to_one_of_another_kind(tokenizer, tmp_path, make):
    """As a writer leaves it that was killed while it wrote its first shard."""
    path = tmp_path / "run"
    TraceStore.create(path, meta={"model": "tiny"}, sites=["z.1"]).close()
    for begun in ("000000.parquet", "000000.safetensors"):
        (path / "shards" / begun).write_bytes(b"x")
    with make(path, meta={"model": "other"}) as store:
        assert (dict(store.meta), store.sites, len(store)) == ({"model": "other"}, (), 0)
        store.append([make_trace(tokenizer, "a")])
    assert TraceStore.open(path).ids == ("a",) and check_store(path) == []
    with pytest.raises(StoreError, match=r"not empty|another model"):
        make(path, meta={"model": "tiny"})


def test_a_store_without_a_trace_stays_while_somebody_writes(tmp_path):
    path = tmp_path / "run"
    with TraceStore.create(path, meta={"model": "tiny"}):
        with pytest.raises(StoreError, match="written by another process"):
            TraceStore.create(path, meta={"model": "other"})
        with pytest.raises(StoreError, match="written by another process"):
            TraceStore.open(path).discard()
    assert dict(TraceStore.open(path).meta) == {"model": "tiny"}


def test_a_store_without_a_trace_with_a_file_of_somebody_else_stays(tmp_path):
    TraceStore.create(tmp_path / "run").close()
    (tmp_path / "run" / "notes.txt").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        TraceStore.create(tmp_path / "run")


def test_a_store_is_discarded_only_without_a_trace(stored, tmp_path):
    TraceStore.open(stored[0]).discard()
    assert TraceStore.open(stored[0]).ids == ("a", "b", "c")
    TraceStore.create(tmp_path / "new").discard()
    assert not (tmp_path / "new").exists()
    TraceStore.create(tmp_path / "used").close()
    (tmp_path / "used" / "notes.txt").write_text("x")
    TraceStore.open(tmp_path / "used").discard()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        TraceStore.create(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot make"):
        TraceStore.create(tmp_path / "file" / "below")


def part(tokenizer, folder, *ids, meta=None, sites=SITES):
    """A store of one shard, as a worker leaves it."""
    traces = [make_trace(tokenizer, id) for id in ids]
    with TraceStore.create(folder, meta=meta or {"model": "tiny"}, sites=sites) as store:
        store.append(traces, make_arrays(traces, seed=len(ids)) if sites else {})
    return TraceStore.open(folder)


def test_a_store_takes_over_the_shards_of_another(stored, tokenizer, tmp_path):
    store = TraceStore.open(stored[0])
    other = part(tokenizer, tmp_path / "part", "d", "e")
    store.adopt(other)
    again = TraceStore.open(stored[0])
    assert again.ids == store.ids == ("a", "b", "c", "d", "e") and again.check() == []
    for id in other.ids:
        assert again.trace(id) == other.trace(id)
        for site in SITES:
            np.testing.assert_array_equal(again.activations(id, site), other.activations(id, site))
    store.adopt(other)  # a driver that was killed behind it takes it once more
    assert len(TraceStore.open(stored[0])) == 5
    for path in (tmp_path / "part" / "shards").iterdir():
        path.unlink()
    assert again.check() == []


def parts(tokenizer, folder):
    """A store of three shards."""
    with TraceStore.create(folder, meta={"model": "tiny"}, sites=SITES) as store:
        for id in "def":
            store.append([new := make_trace(tokenizer, id)], make_arrays([new]))
    return TraceStore.open(folder)


def test_a_killed_adoption_leaves_no_strays_and_is_done_by_a_second_one(stored, tokenizer, tmp_path, monkeypatch):
    path, other = stored[0], parts(tokenizer, tmp_path / "part")

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, TraceStore.open(path) as store:
        patch.setattr(Manifest, "write", kill)
        with pytest.raises(Killed):
            store.adopt(other)
    assert (path / "shards" / "000004.safetensors").exists() and check_store(path) == []
    with TraceStore.open(path) as store:
        store.append([new := make_trace(tokenizer, "g")], make_arrays([new]))
        store.adopt(other)
    again = TraceStore.open(path)
    assert again.ids == (*"abcgdef",) and again.check() == other.check() == []
    for id in other.ids:
        assert again.trace(id) == other.trace(id)
        for site in SITES:
            np.testing.assert_array_equal(again.activations(id, site), other.activations(id, site))


@pytest.mark.parametrize("failing", ["000003.parquet", "000003.safetensors", "manifest.json"])
def test_an_adoption_that_fails_leaves_nothing_behind(stored, tokenizer, tmp_path, monkeypatch, failing):
    path, other = stored[0], parts(tokenizer, tmp_path / "part")
    before, rename = sorted(path.rglob("*")), Path.replace

    def replace(self, target):
        if target.name == failing:
            raise OSError("no space left")
        return rename(self, target)

    with TraceStore.open(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            with pytest.raises(StoreError, match="no space left"):
                store.adopt(other)
        assert sorted(path.rglob("*")) == before and store.ids == (*"abc",)
        store.adopt(other)
    assert TraceStore.open(path).ids == (*"abcdef",) and check_store(path) == []


def test_a_new_store_learns_its_types_from_the_first_it_takes(tokenizer, tmp_path):
    other = part(tokenizer, tmp_path / "part", "a")
    with TraceStore.create(tmp_path / "whole", meta={"model": "tiny"}, sites=SITES) as whole:
        whole.adopt(other)
        fitting = make_arrays([new := make_trace(tokenizer, "b")])
        with pytest.raises(InputError, match="does not fit"):
            whole.append([new], {**fitting, "z.1": [fitting["z.1"][0].astype(np.float64)]})
        whole.append([new], fitting)


def test_parts_of_another_run_are_refused(stored, tokenizer, tmp_path):
    store = TraceStore.open(stored[0])
    with pytest.raises(InputError, match="not recorded in the same way"):
        store.adopt(part(tokenizer, tmp_path / "other", "d", meta={"model": "huge"}))
    with pytest.raises(InputError, match="not recorded in the same way"):
        store.adopt(part(tokenizer, tmp_path / "bare", "d", sites=()))
    with pytest.raises(InputError, match="both have a trace 'c'"):
        store.adopt(part(tokenizer, tmp_path / "twice", "c", "d"))
    assert TraceStore.open(stored[0]).ids == ("a", "b", "c")


def test_where_no_link_can_be_made_shards_are_copied(stored, tokenizer, tmp_path, monkeypatch):
    other = part(tokenizer, tmp_path / "part", "d")
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    store = TraceStore.open(stored[0])
    store.adopt(other)
    assert store.check() == [] and "d" in store


def test_a_name_that_no_file_can_have_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="cannot write"):
        write_text_durably(tmp_path / ("x" * 300), "text")


def test_a_table_that_was_damaged_after_its_ids_were_read_is_never_read(stored):
    path = stored[0]
    store, file = TraceStore.open(path), path / "shards" / "000000.parquet"
    assert store.ids == ("a", "b", "c")
    whole = file.read_bytes()
    for position in range(0, len(whole), 97):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        for read in (lambda: store.trace("a"), lambda: next(iter(store)), store.table):
            with pytest.raises(StoreError, match="changed since they were stored"):
                read()


def test_a_damaged_table_is_an_error_each_time_it_is_asked_for(stored):
    file = stored[0] / "shards" / "000001.parquet"
    raw = file.read_bytes()
    file.write_bytes(raw[:50] + bytes([raw[50] ^ 1]) + raw[51:])
    store = TraceStore.open(stored[0])
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            _ = store.ids


def test_a_file_that_is_not_parquet_is_an_error_although_its_checksum_fits(stored):
    path = stored[0]
    file, manifest = path / "shards" / "000000.parquet", Manifest.read(path)
    for raw in (
        b"",
        b"PAR1",
        file.read_bytes()[:-9] + b"\0" * 5 + b"PAR1",
        b"PAR1" + b"\xff" * 400 + b"\x90\1\0\0PAR1",
    ):
        file.write_bytes(raw)
        entry = StoredFile(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        first = replace(manifest.shards[0], files={**manifest.shards[0].files, file.name: entry})
        replace(manifest, shards=(first, manifest.shards[1])).write(path)
        with pytest.raises(StoreError, match="not a Parquet file"):
            TraceStore.open(path).table()


def test_a_table_that_unpacks_to_far_more_than_its_file_is_refused_unread(tokenizer, tmp_path, monkeypatch):
    with TraceStore.create(tmp_path / "run") as store:
        store.append([make_trace(tokenizer, "a", meta={"x": "a" * 2**24})])
    size = (tmp_path / "run" / "shards" / "000000.parquet").stat().st_size
    assert list(store)  # a table of some megabytes may be as repetitive as it likes
    monkeypatch.setattr("reasonscope.data.storage.shards._HARMLESS", 2**20)
    monkeypatch.setattr("reasonscope.data.storage.shards._PACKED", 2**24 // size + 2)
    assert list(store)
    monkeypatch.setattr("reasonscope.data.storage.shards._PACKED", 2**24 // size - 1)
    with pytest.raises(StoreError, match=f"would unpack {size} bytes to 167"):
        list(store)


def read_the_first(store):
    """What reads the files of the first shard, by their endings."""
    return {".parquet": lambda: store.trace("a"), ".safetensors": lambda: store.activations("a", "z.1")}


@pytest.mark.parametrize("ending", [".parquet", ".safetensors"])
def test_a_file_that_became_a_folder_is_an_error(stored, ending):
    path = stored[0]
    store = TraceStore.open(path)
    assert store.ids
    (path / "shards" / f"000000{ending}").unlink()
    (path / "shards" / f"000000{ending}").mkdir()
    with pytest.raises(StoreError, match="a store needs the file itself"):
        read_the_first(store)[ending]()
    assert len(check_store(path)) == 1 and "a store needs the file itself" in check_store(path)[0]


@pytest.mark.parametrize("ending", [".parquet", ".safetensors", ".json"])
def test_a_file_that_may_not_be_read_is_an_error(stored, monkeypatch, ending):
    path, opens = stored[0], Path.open
    store = TraceStore.open(path)
    assert store.ids

    def refused(self, *words, **named):
        if self.suffix == ending:
            raise PermissionError(13, "Permission denied", str(self))
        return opens(self, *words, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(StoreError, match="Permission denied"):
        ({".json": lambda: TraceStore.open(path)} | read_the_first(store))[ending]()
    assert check_store(path) and all("cannot be read" in problem for problem in check_store(path))


def test_a_folder_that_may_not_be_looked_at_is_an_error(stored, monkeypatch):
    path = stored[0]

    def refused(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("lstat", "exists"):
        monkeypatch.setattr(Path, name, refused)
    for read in (TraceStore.open, TraceStore.create, TraceStore.open_or_create):
        with pytest.raises(StoreError, match="Permission denied"):
            read(path)
    assert len(check_store(path)) == 1


def test_a_name_that_is_too_long_is_an_error(tmp_path):
    path = tmp_path / ("x" * 300)
    for read in (TraceStore.open, TraceStore.create, TraceStore.open_or_create):
        with pytest.raises(StoreError, match="too long"):
            read(path)
    assert len(check_store(path)) == 1
    with pytest.raises(StoreError, match="not a trace store"):
        TraceStore.open(tmp_path / "a\0b")


def test_what_a_killed_writer_left_and_nobody_may_remove_is_an_error_and_frees_the_lock(tokenizer, stored, monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied")

    with TraceStore.open(stored[0]) as store:
        with monkeypatch.context() as patch:
            patch.setattr("reasonscope.data.storage.store.remove", refused)
            with pytest.raises(StoreError, match="cannot write"):
                store.append([make_trace(tokenizer, "d")], {})
        with TraceStore.open(stored[0]) as other:
            other.append([new := make_trace(tokenizer, "d")], make_arrays([new]))


def test_a_writer_whose_lock_was_removed_writes_no_more(stored, tokenizer):
    path, new = stored[0], [make_trace(tokenizer, id) for id in "def"]
    with TraceStore.open(path) as first, TraceStore.open(path) as second:
        first.append(new[:1], make_arrays(new[:1]))
        (path / ".lock").unlink()
        with pytest.raises(StoreError, match=r"lock .* was removed"):
            first.append(new[1:2], make_arrays(new[1:2]))
        first.append(new[1:2], make_arrays(new[1:2]))  # it holds a new one, and nobody else has written
        (path / ".lock").unlink()
        second.append(new[2:], make_arrays(new[2:]))
        with pytest.raises(StoreError, match=r"lock .* was removed"):
            first.append(new[:1], make_arrays(new[:1]))
        with pytest.raises(StoreError, match="written by another process"):
            first.append(new[:1], make_arrays(new[:1]))
    assert TraceStore.open(path).ids == (*"abcdef",) and check_store(path) == []


@pytest.mark.parametrize("adopting", [False, True])
def test_a_lock_that_is_removed_during_a_write_keeps_the_manifest_of_the_other_and_its_files(
    stored, tokenizer, tmp_path, monkeypatch, adopting
):
    path, [new, other] = stored[0], [make_trace(tokenizer, id) for id in "de"]
    name = "link_shard" if adopting else "write_shard"
    taken, write = part(tokenizer, tmp_path / "part", "d"), getattr(store_module, name)

    def late(*words):
        shard = write(*words)
        monkeypatch.setattr(store_module, name, write)
        (path / ".lock").unlink()
        with TraceStore.open(path) as second:
            second.append([other], make_arrays([other]))
        return shard

    monkeypatch.setattr(store_module, name, late)
    with TraceStore.open(path) as first:
        with pytest.raises(StoreError, match=r"lock .* was removed"):
            first.adopt(taken) if adopting else first.append([new], make_arrays([new]))
        assert check_store(path) == []
        first.adopt(taken) if adopting else first.append([new], make_arrays([new]))
    assert TraceStore.open(path).ids == (*"abced",) and check_store(path) == []


def test_an_adoption_that_fails_without_its_lock_removes_nothing(stored, tokenizer, tmp_path, monkeypatch):
    path, other, link = stored[0], parts(tokenizer, tmp_path / "part"), store_module.link_shard

    def fail(*words):
        if words[-1] == "000003":
            (path / ".lock").unlink()
            raise StoreError("no space left")
        return link(*words)

    monkeypatch.setattr(store_module, "link_shard", fail)
    with TraceStore.open(path) as store, pytest.raises(StoreError, match="no space left"):
        store.adopt(other)
    assert (path / "shards" / "000002.parquet").exists() and check_store(path) == []


@pytest.mark.parametrize("adopting", [False, True])
def test_a_disk_that_fails_after_the_new_manifest_takes_no_file_that_it_names(
    stored, tokenizer, tmp_path, monkeypatch, adopting
):
    path, new = stored[0], make_trace(tokenizer, "d")
    taken, sync = part(tokenizer, tmp_path / "part", "d"), durable._sync_folder

    def fail(folder):
        if folder == path:
            raise OSError("input/output error")
        sync(folder)

    with TraceStore.open(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(durable, "_sync_folder", fail)
            with pytest.raises(StoreError, match="input/output error"):
                store.adopt(taken) if adopting else store.append([new], make_arrays([new]))
        assert check_store(path) == [] and store.ids == TraceStore.open(path).ids == (*"abcd",)
        store.append([last := make_trace(tokenizer, "e")], make_arrays([last]))
    assert TraceStore.open(path).ids == (*"abcde",) and check_store(path) == []


def test_a_store_whose_rows_are_of_another_type_is_not_taken_over(tmp_path):
    for name, dtype in (("one", np.float32), ("two", np.float16)):
        trace = trace_from_text(id=name, problem=Problem(id="p", prompt="Q"), prompt="Q", completion="b")
        with TraceStore.create(tmp_path / name, sites=["z.0"]) as store:
            store.append([trace], {"z.0": [np.zeros((0, 3), dtype=dtype)]})
    with TraceStore.open(tmp_path / "one") as store, pytest.raises(InputError, match="float16"):
        store.adopt(TraceStore.open(tmp_path / "two"))


def test_a_row_that_says_nothing_of_its_place_is_an_error(tokenizer, tmp_path, monkeypatch):
    for column, values in (("row_stop", [None]), ("crc32", [[1]]), ("crc32", [None])):
        table = shards._table

        def changed(*words, table=table, column=column, values=values):
            made = table(*words)
            at = made.schema.get_field_index(column)
            return made.set_column(at, made.schema.field(at), pa.array(values, made.schema.field(at).type))

        folder = tmp_path / f"{column}{values}"
        with monkeypatch.context() as patch, TraceStore.create(folder) as store:
            patch.setattr(shards, "_table", changed)
            with pytest.raises(StoreError, match=r"000000\.parquet is damaged"):
                store.append([make_trace(tokenizer, "a")])
        with pytest.raises(StoreError, match=r"000000\.parquet is damaged"):
            _ = TraceStore.open(folder).ids
