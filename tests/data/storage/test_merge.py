"""Parts of one run become one store."""

import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore, merge_stores
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem


def part(folder, *ids, meta=None):
    traces = [
        trace_from_text(id=id, problem=Problem(id=id, prompt="Q"), prompt="Q", completion="<think>7</think>7")
        for id in ids
    ]
    with TraceStore.create(folder, meta=meta or {"model": "tiny"}) as store:
        store.append(traces)
    return folder


def test_parts_become_one_store_and_stay(tmp_path):
    parts = [part(tmp_path / "a", "1", "2"), part(tmp_path / "b", "3")]
    whole = merge_stores(parts, tmp_path / "whole")
    assert whole.ids == ("1", "2", "3") and whole.meta == {"model": "tiny"} and whole.check() == []
    assert [TraceStore.open(folder).ids for folder in parts] == [("1", "2"), ("3",)]
    again = merge_stores([*parts, part(tmp_path / "c", "4")], tmp_path / "whole")
    assert again.ids == ("1", "2", "3", "4")
    with TraceStore.open(tmp_path / "whole") as free:
        free.append([trace_from_text(id="5", problem=Problem(id="5", prompt="Q"), prompt="Q", completion="7")])


def test_one_part_is_a_whole(tmp_path):
    assert merge_stores([part(tmp_path / "a", "1")], tmp_path / "whole").ids == ("1",)


def test_what_cannot_be_merged(tmp_path):
    with pytest.raises(InputError, match="nothing to merge"):
        merge_stores([], tmp_path / "whole")
    other = part(tmp_path / "b", "3", meta={"model": "other"})
    with pytest.raises(InputError, match="not recorded in the same way"):
        merge_stores([part(tmp_path / "a", "1"), other], tmp_path / "whole")
