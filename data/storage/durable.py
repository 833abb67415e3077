"""Files that are written whole or not at all, even if the power fails."""

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
    """Let `write` fill a temporary file, flush it to the disk, and rename it in one step. Returns its SHA-256.

    The file is filled in a folder of its own, PATH.tmp: safetensors and others put temporary files with random names
    next to what they write, and the next write removes the folder with everything a killed writer left in it. The
    checksum is computed while the disk works, since it takes about as long, unless `write` returns it.

    Raises StoreError if writing fails (a full disk), and then leaves nothing. Also raises it if `path` is not a regular
    file (a folder, a device, a pipe), which it does not touch.
    """
    folder = path.parent / (path.name + TEMPORARY)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it exists and is not a regular file")
        remove(folder)
        folder.mkdir()
        temporary = folder / path.name
        told = write(temporary)
        with temporary.open("rb+") as file, ThreadPoolExecutor(1) as beside:
            digest = beside.submit(lambda: told if isinstance(told, str) else sha256_of(temporary))
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
        return digest.result()
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write {path}: {error}; what was stored before is intact: make room and run it again"
        ) from error
    finally:
        with suppress(OSError):  # a name that is too long cannot be removed either
            remove(folder)


def write_text_durably(path: Path, text: str) -> None:
    """Like `write_durably`, for text in UTF-8."""
    write_durably(path, lambda file: file.write_text(text, encoding="utf-8"))


def make_folder(path: Path) -> None:
    """Make the folder `path` and its parents, unless they exist. Raises StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {path}: {error}; choose another one, or make room there") from error


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; do nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
