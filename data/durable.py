"""Files that are there whole or not at all, whenever the power goes."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from reasonscope.data.errors import StoreError

TEMPORARY = ".tmp"


def write_durably(path: Path, write: Callable[[Path], None]) -> str:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, and give it its name in one step. Gives its SHA-256.

    The checksum is computed while the disk works: it takes about as long. Raises StoreError where that fails (a full disk), and
    removes the temporary file then.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
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
        temporary.unlink(missing_ok=True)


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
