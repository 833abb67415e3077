"""One process that compares answers as mathematics, started at the first hard pair and used again for all others."""

import atexit
import json
import os
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

_WORKER = Path(__file__).with_name("worker.py")
_lock = threading.Lock()
_worker: "subprocess.Popen[str] | None" = None
_owner = 0  # the process that started the worker; a fork must not share its pipes


@lru_cache(maxsize=4096)
def same_mathematics(given: str, gold: str) -> bool | None:
    """Whether two answers are the same mathematics (math-verify), or None if that is not decided within seconds.

    Never raises and never hangs: the comparison has 2 seconds of processor time and 2 GiB of memory.
    """
    with _lock:
        return {"true\n": True, "false\n": False}.get(_ask(json.dumps([given, gold]) + "\n"))


def _ask(pair: str) -> str:
    """The line that the worker writes; empty if it ended instead."""
    line = ""
    try:
        worker = _running()
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(pair)
        worker.stdin.flush()
        line = worker.stdout.readline()
    except OSError:  # no process can be started, or the worker closed its pipe
        pass
    finally:
        if not line:  # also after Ctrl-C: a late answer must not be read as that to the next pair
            _stop_worker()
    return line


def _alive() -> bool:
    return _worker is not None and _owner == os.getpid() and _worker.poll() is None


def _running() -> "subprocess.Popen[str]":
    global _worker, _owner
    if _worker is None or not _alive():
        _stop_worker()
        # -P keeps the current folder, which may hold a module named as one of Python's, out of the search path.
        _worker = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        _owner = os.getpid()
    return _worker


@atexit.register
def _stop_worker() -> None:
    """End the worker, if this process has one. The next hard pair starts another."""
    global _worker
    worker, _worker = _worker, None
    if worker is not None and _owner == os.getpid():
        worker.kill()
        worker.communicate()
