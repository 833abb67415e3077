"""Files that are there whole or not at all, whenever the power goes."""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from reasonscope.data.errors import StoreError

TEMPORARY = ".tmp"


def write_durably(path: Path, write: Callable[[Path], object]) -> str:
    """Let `write` fill a temporary file, bring it to the disk, and give it its name in one step. Gives its SHA-256.

    It is filled in a folder of its own, PATH.tmp: safetensors and others put temporary files of random names beside what they write, and
    what a killed writer left goes with the folder, at the next write. The checksum is computed while the disk works, since it takes
    about as long. Raises StoreError where that fails (a full disk), and leaves nothing behind then; and for a path that is no regular
    file (a folder, a device, a pipe), which stays as it is.
    """
    folder = path.parent / (path.name + TEMPORARY)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is there and no regular file")
        remove(folder)
        folder.mkdir()
        temporary = folder / path.name
        write(temporary)
        with temporary.open("rb+") as file, ThreadPoolExecutor(1) as beside:
            digest = beside.submit(sha256_of, temporary)
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
        return digest.result()
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write {path}: {error}; what was stored before is intact, make room and run it again"
        ) from error
    finally:
        with suppress(OSError):  # a name that is too long cannot be removed either
            remove(folder)


def write_text_durably(path: Path, text: str) -> None:
    """As `write_durably`, of a text in UTF-8."""
    write_durably(path, lambda file: file.write_text(text, encoding="utf-8"))


def make_folder(path: Path) -> None:
    """The folder `path` with those above it, where it is not there yet. Raises StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {path}: {error}; give another one, or make room there") from error


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
