"""Whether a store is whole: what may lie in its folder, and what is wrong with it after reading every byte."""

import os
from pathlib import Path

from reasonscope.data.errors import StoreError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.durable import TEMPORARY
from reasonscope.data.storage.manifest import LOCK, NAME, RECIPE, SHARDS, Manifest, look_at, shard_name
from reasonscope.data.storage.shards import content_problem


def need_blank(folder: Path) -> None:
    """Raise StoreError unless a folder is new, empty, or holds only what a writer leaves if it is killed before its
    first trace."""
    left = {folder / LOCK, folder / SHARDS, folder / RECIPE}
    try:
        there = folder.exists()
        empty = _empty_manifest(folder)
        if empty is not None:
            left.add(folder / NAME)
        blank = folder.is_dir() and all(
            path in left or _is_temporary(path, folder) or (empty is not None and _is_unfinished(path, folder, empty))
            for path in folder.rglob("*")
        )
    except OSError as error:
        raise StoreError(f"cannot make {folder}: {error}") from error
    if there and not blank:
        raise StoreError(f"{folder} exists and is not empty; give another folder, or open the store in it")


def _empty_manifest(folder: Path) -> Manifest | None:
    """The manifest of a store without traces; None for any other folder."""
    if look_at(folder / NAME) is None:
        return None
    try:
        manifest = Manifest.read(folder)
    except StoreError:  # a damaged store may hold traces
        return None
    return None if manifest.shards else manifest


def check_store(path: str | Path) -> list[str]:
    """Everything that is wrong with the store in `path` after reading every byte of it.

    Shards that a writer began and did not enter in the manifest are fine: nobody reads them, and the next ones replace
    them.

    Args:
        path: The folder of a store.

    Returns:
        One sentence per fault; empty if the store is sound.

    Example:
        problems = rs.data.check_store("runs/mine/store")
        for problem in problems:
            print(problem)
    """
    folder = Path(path)
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        return [str(error)]
    files = {folder / SHARDS / name: file for shard in manifest.shards for name, file in shard.files.items()}
    found = [problem for name in (SHARDS, LOCK) if (problem := link_problem(folder / name))]
    if not (folder / SHARDS).is_symlink():
        read = tracked(list(files.items()), "reading every byte", "files")
        found += [problem for name, file in read if (problem := content_problem(name, file))]
    if "steered" in manifest.meta and not (folder / RECIPE).is_file():
        found.append(f"{folder / RECIPE} is missing: the traces were steered by it; restore it from a copy")
    known = {*files, folder / NAME, folder / LOCK, folder / SHARDS, folder / RECIPE}
    present = (
        Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)
    )  # a writer may remove some meanwhile
    strays = sorted(name for name in present if name not in known and not _is_unfinished(name, folder, manifest))
    return found + [f"{name} does not belong to the store and may be removed" for name in strays]


def link_problem(path: Path) -> str | None:
    return (
        f"{path} is a link, which could lead out of the store; put the file itself there" if path.is_symlink() else None
    )


def _is_temporary(path: Path, folder: Path) -> bool:
    """Whether `path` is, or lies in, a file that a writer fills before it is renamed."""
    return any(part.endswith(TEMPORARY) for part in path.relative_to(folder).parts)


def _is_unfinished(path: Path, folder: Path, manifest: Manifest) -> bool:
    """Whether `path` belongs to a shard that a writer was about to add; it still writes, or was killed and the next
    shards replace it."""
    number = int(path.stem) if path.stem.isdecimal() else -1
    named = path.stem == shard_name(number) and path.suffix in (".parquet", ".safetensors")
    coming = path.parent == folder / SHARDS and named and number >= len(manifest.shards)
    return coming or _is_temporary(path, folder)
