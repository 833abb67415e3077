"""Ctrl-C and SIGTERM: one line on what was kept and how to go on, status 130, and a store that a second call takes up."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reasonscope.app.interruption import NOTHING_KEPT, interruption_line, keeping, sigterm_interrupts
from reasonscope.data.errors import StoreError
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore

# A shard a batch, so that there is something to see while it runs; a shell may have told its children to ignore Ctrl-C.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from importlib import import_module
import_module("reasonscope.probes.generation.recording")._SHARD_BYTES = 1
from reasonscope.app.cli import main
main()
"""
RECORD = ("record", "--sites", "resid_post.2", "--temperature", "0")


def interrupted(
    words: tuple[str, ...], cwd: Path, until: str, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """The command, with the signal sent once a file that matches `until` is there."""
    line = [sys.executable, "-c", MAIN, *words]
    with subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(cwd.glob(until)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # so that it is at work on what comes next
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def test_ctrl_c_keeps_what_is_stored_and_says_how_to_go_on(tmp_path):
    words = (*RECORD, "--n", "60", "--batch-size", "1", "--max-new-tokens", "200", "--out", "run")
    done = interrupted(words, tmp_path, "run/shards/000001.parquet", signal.SIGINT)
    assert done.returncode == 130, done.stderr
    kept = len(TraceStore.open(tmp_path / "run"))
    assert 2 <= kept < 60 and check_store(tmp_path / "run") == []
    told = f"Interrupted: {kept} of 60 traces are kept in run; run the same command again to go on."
    assert done.stderr.splitlines()[-1] == told
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_sigterm_before_the_first_trace_leaves_nothing(tmp_path):
    words = (*RECORD, "--n", "60", "--batch-size", "60", "--max-new-tokens", "900", "--out", "run")
    done = interrupted(words, tmp_path, "run/manifest.json", signal.SIGTERM)
    assert done.returncode == 130, done.stderr
    told = "Interrupted: no trace was finished, so nothing is kept; run the same command again to start over."
    assert done.stderr.splitlines()[-1] == told
    assert not (tmp_path / "run").exists()


def describe(text):
    def said():
        if isinstance(text, Exception):
            raise text
        return text

    return said


@pytest.mark.parametrize(
    ("inner", "outer", "said"),
    [
        ("the traces.", "the demo.", "the traces."),
        (StoreError("there is none"), "the demo.", NOTHING_KEPT),
    ],
)
def test_the_innermost_says_what_is_kept(inner, outer, said):
    with pytest.raises(KeyboardInterrupt) as raised, keeping(describe(outer)), keeping(describe(inner)):
        raise KeyboardInterrupt
    assert interruption_line(raised.value) == f"Interrupted: {said}"


def test_sigterm_is_what_it_was_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
