"""One writer at a time: a lock that the operating system ends with the process, even by a kill."""

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from reasonscope.data.errors import StoreError
from reasonscope.data.storage.manifest import LOCK, SHARDS
from reasonscope.data.storage.soundness import link_problem


class WriterLock:
    """The right to write in the store at `folder`; a dead process holds nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor = -1  # valid until `_close` has run
        self._close: weakref.finalize[..., Any] | None = None

    @property
    def held(self) -> bool:
        """Whether this process took the lock and did not release it."""
        return self._close is not None

    def take(self) -> None:
        """Raise StoreError if another process holds it."""
        self._descriptor = self._file()
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise StoreError(
                f"{self.folder} is being written by another process; wait for it, or give another folder"
            ) from error
        self.need()

    def need(self) -> None:
        """Raise StoreError, and release the lock, unless it is the one that another writer would find."""
        held, found = os.fstat(self._descriptor), None
        with suppress(OSError):
            found = (self.folder / LOCK).lstat()
        if found is None or not os.path.samestat(held, found):
            self.release()
            raise StoreError(
                f"the lock {self.folder / LOCK} was removed while it was held, so another process may write; what was "
                f"stored is intact: end the other process, and run it again"
            )

    def release(self) -> None:
        """Let others write, if it is held."""
        if self._close is not None:
            self._close()
            self._close = None

    def _file(self) -> int:
        """The descriptor of the file that is locked, unless the folder of the shards is a link."""
        try:
            if problem := link_problem(self.folder / SHARDS):
                raise StoreError(problem)
            return os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise StoreError(f"cannot write in {self.folder}: {error}") from error
