"""The content of a manifest is checked when it is read, even if its checksum fits."""

import json

import pytest

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.storage.manifest import (
    LOCK,
    NAME,
    RECIPE,
    SHARDS,
    Manifest,
    Shard,
    SiteType,
    StoredFile,
    shard_name,
)

SHARD = Shard(name="000000", traces=2, rows=7, files={"000000.parquet": StoredFile(size=3, sha256="ab")})
WHOLE = Manifest(
    meta={"model": "tiny"}, sites={"z.1": SiteType(dtype="float32", shape=(2, 3)), "z.2": None}, shards=(SHARD,)
)


def test_a_manifest_comes_back_and_can_be_read_without_this_package(tmp_path):
    WHOLE.write(tmp_path)
    assert Manifest.read(tmp_path) == WHOLE
    raw = json.loads((tmp_path / "manifest.json").read_text())
    assert raw.pop("checksum") and raw == {
        "format": "reasonscope-store",
        "version": 1,
        "meta": {"model": "tiny"},
        "sites": {"z.1": {"dtype": "float32", "shape": [2, 3]}, "z.2": None},
        "shards": [
            {"name": "000000", "traces": 2, "rows": 7, "files": {"000000.parquet": {"size": 3, "sha256": "ab"}}}
        ],
    }
    assert (SHARD.table, SHARD.arrays, shard_name(12)) == ("000000.parquet", "000000.safetensors", "000012")


def test_a_shard_may_hold_as_many_as_a_disk_can(tmp_path):
    for traces, rows in ((1, 0), (2**40 - 1, 2**50 - 1)):
        kept = Manifest(shards=(Shard(name="000000", traces=traces, rows=rows, files=SHARD.files),))
        kept.write(tmp_path)
        assert Manifest.read(tmp_path) == kept


FILES = {"000000.parquet": {"size": 3, "sha256": "ab"}}


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ({"traces": 0}, "shard 0 claims 0 traces with 7 rows"),
        ({"traces": 2**40}, "shard 0 claims"),
        ({"rows": -1}, "with -1 rows"),
        ({"rows": 2**50}, "shard 0 claims"),
        ({"rows": None}, ": a shard is damaged: its rows"),
        ({"traces": "2"}, ": a shard is damaged: its traces"),
        ({"name": 0}, ": a shard is damaged: its name"),
        ({"files": []}, ": a shard is damaged: its files"),
        ({"name": "000001"}, "expected '000000'"),
        ({"files": {}}, "expected '000000'"),
        ({"files": {**FILES, "../x": FILES["000000.parquet"]}}, "expected '000000'"),
        ({"files": {"000000.parquet": {"size": "3", "sha256": "ab"}}}, ": a file is damaged: its size"),
        ({"files": {"000000.parquet": {"size": 3, "sha256": 5}}}, ": a file is damaged: its sha256"),
    ],
)
def test_a_shard_that_no_store_writes_is_refused(shard, message, tmp_path, monkeypatch):
    values = {"name": "000000", "traces": 2, "rows": 7, "files": FILES} | shard
    monkeypatch.setattr(
        "reasonscope.data.storage.manifest.asdict", lambda _: {"meta": {}, "sites": {}, "shards": [values]}
    )
    WHOLE.write(tmp_path)
    with pytest.raises(StoreError, match=message):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": {"z.1": {"dtype": 3, "shape": []}}}, ": the type of a site is damaged: its dtype"),
        ({"sites": {"z.1": {"dtype": "int8", "shape": 3}}}, ": the type of a site is damaged: its shape"),
        *(({"sites": {"z.1": value}}, "the type of a site|is damaged") for value in (0, "", [], False)),
        ({"meta": None}, "its meta must be dict, got None"),
        ({"sites": []}, "its sites must be"),
        ({"shards": {}}, "its shards must be"),
        ({"version": 2}, "has version 2"),
        ({"format": "other"}, "its format must be 'reasonscope-store'"),
    ],
)
def test_a_manifest_of_another_form_is_refused(change, message, tmp_path, monkeypatch):
    values = {"meta": {}, "sites": {}, "shards": []} | change
    monkeypatch.setattr("reasonscope.data.storage.manifest.asdict", lambda _: values)
    WHOLE.write(tmp_path)
    with pytest.raises(StoreError, match=message):
        Manifest.read(tmp_path)


def test_meta_has_to_be_json(tmp_path):
    for value in (float("nan"), object()):
        with pytest.raises(InputError, match="must be JSON values"):
            Manifest(meta={"x": value}).write(tmp_path)


def test_files_have_the_names_that_stores_on_disk_have():
    assert (NAME, SHARDS, LOCK, RECIPE) == ("manifest.json", "shards", ".lock", "recipe.safetensors")
