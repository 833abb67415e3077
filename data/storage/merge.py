"""Join the stores of the parts of one run."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore


def merge_stores(parts: Sequence[str | Path], path: str | Path) -> TraceStore:
    """Copy the traces of all `parts` into the store at `path`, which is made if it does not exist; the parts do not
    change.

    Files are hard-linked if the file system allows it, so that nothing is stored twice. Traces that `path` already has
    are skipped, so a second merge completes one that was killed. Raises InputError if the parts were not recorded alike
    or share some traces, StoreError.
    """
    if not parts:
        raise InputError("nothing to merge; give the folder of at least one store")
    stores = [TraceStore.open(part) for part in parts]
    with TraceStore.open_or_create(path, meta=stores[0].meta, sites=stores[0].sites) as whole:
        for store in stores:
            whole.adopt(store)
        if whole.recipe is not None and not whole.recipe.exists():
            shutil.copyfile(stores[0].path / whole.recipe.name, whole.recipe)
    return whole
