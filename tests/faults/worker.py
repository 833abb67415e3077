"""Runs commands in processes that can be killed, forked from this one, which has imported everything: a second less for each.

A line of JSON on stdin is one command: `words` behind `reasonscope`; `kill_after` seconds (null: never); `largest_file` in bytes (null:
of any size).
A line of JSON on stdout answers when its process has ended: `status` (negative: the signal), `seconds`, `said` (its stderr).
"""

import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module

from reasonscope.analysis.runs import registry as analysing
from reasonscope.app import cli

with suppress(ImportError):
    import_module("openai")
recording = import_module("reasonscope.probes.generation.recording")  # the package calls its function by the same name


def run(words, largest_file, said):
    """In the child: the command, never to return."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    recording._SHARD_BYTES = 1  # a shard a batch
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.argv = ["reasonscope", *words]
    status = 70
    try:
        cli.main()
    except SystemExit as exited:
        status = int(exited.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid, kill_after):
    """Wait for the process, and kill it when its time is over; nobody else reaps it, so the id is its own until then."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.0005)


def main():
    assert analysing.ANALYSES
    for line in sys.stdin:
        task = json.loads(line)
        end, said = os.pipe()
        os.set_blocking(said, False)  # what is said beyond the buffer is lost rather than waited for
        began = time.monotonic()
        pid = os.fork()
        if not pid:
            run(task["words"], task["largest_file"], said)
        os.close(said)
        status = ended(pid, task["kill_after"])
        with os.fdopen(end, "rb") as file:
            text = file.read().decode(errors="replace")
        sys.stdout.write(json.dumps({"status": status, "seconds": time.monotonic() - began, "said": text}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
