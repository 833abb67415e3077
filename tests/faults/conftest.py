"""What the tests of faults share: a process that runs commands and kills them, and what a folder holds."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def command():
    """Run `reasonscope` with some words in a process of its own; see worker.py."""
    worker = Path(__file__).with_name("worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-P", str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def run(*words, kill_after=None, largest_file=None):
            task = {"words": [str(word) for word in words], "kill_after": kill_after, "largest_file": largest_file}
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture
def content():
    """Every file below a folder, by its path from there; the lock is no content, and nobody may hold it."""

    def read(folder):
        if (folder / ".lock").exists():
            with (folder / ".lock").open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read
