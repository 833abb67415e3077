"""Stores of the parts of one run become one store."""

from collections.abc import Sequence
from pathlib import Path

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore


def merge_stores(parts: Sequence[str | Path], path: str | Path) -> TraceStore:
    """Take the traces of all `parts` into the store at `path`, which is made where it is not there; the parts stay as they are.

    Files are linked where the file system can, so that nothing is stored twice. What is in `path` already is left out: a merge that
    was killed is done by a second one. Raises InputError where the parts were not recorded alike or share some traces, StoreError.
    """
    if not parts:
        raise InputError("there is no part to merge; give the folders of at least one store")
    stores = [TraceStore.open(part) for part in parts]
    with TraceStore.open_or_create(path, meta=stores[0].meta, sites=stores[0].sites) as whole:
        for store in stores:
            whole.adopt(store)
    return whole
