"""The app as a separate process: the command that starts it, and a way to run it temporarily from a notebook, a test
or a benchmark."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from urllib.error import HTTPError

from reasonscope.app.server.access import VARIABLE
from reasonscope.data.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# By default, Streamlit asks for an e-mail address, reports usage, watches our files and shows tracebacks to everybody.
_SETTINGS = (
    "--server.showEmailPrompt=false",
    "--browser.gatherUsageStats=false",
    "--server.fileWatcherType=none",
    "--server.enableXsrfProtection=true",
    "--server.maxUploadSize=20",
    "--client.showErrorDetails=none",
    "--client.toolbarMode=minimal",
    # Separately for both themes: a single colour would override the reader's choice of dark or light.
    "--theme.light.primaryColor=#0072B2",
    "--theme.dark.primaryColor=#56B4E9",
)


def serve_command(run: str, root: Path, *, host: str, port: int, guarded: bool) -> list[str]:
    """The command that serves the runs below `root` on `host`:`port` and opens `run` ("" for the example).

    If `guarded`, it answers only those who know the token, which it reads from the environment.
    """
    page = str(files("reasonscope.app.server").joinpath("guarded.py" if guarded else "main.py"))
    # On this machine, answer only to its own names: a foreign page may let a name of its own point here.
    names = [f"--server.allowedHosts={name}" for name in LOOPBACK] if host in LOOPBACK else []
    where = (f"--server.address={host}", f"--server.port={port}", *names)
    return [sys.executable, "-m", "streamlit", "run", page, *where, *_SETTINGS, "--", run, str(root)]


@contextmanager
def serving(root: Path, run: str = "", *, token: str = "", within: float = 120.0) -> Iterator[str]:
    """Serve the runs below `root` on a free port of this machine while the block runs; yields the address. A `token` is
    required if given.

    Raises InputError if the app does not answer `within` seconds.
    """
    with socket.socket() as free:
        free.bind((LOOPBACK[0], 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "STREAMLIT_SERVER_HEADLESS": "true", VARIABLE: token}
    line = serve_command(run, root, host=LOOPBACK[0], port=port, guarded=bool(token))
    server = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, until = f"http://{LOOPBACK[0]}:{port}", time.monotonic() + within
    try:
        while not _answers(f"{address}/_stcore/health"):
            if server.poll() is not None or time.monotonic() > until:
                raise InputError(f"the app did not start within {within:g} s; run it to see why: {' '.join(line)}")
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _answers(url: str) -> bool:
    """Whether a server answers there, if only to ask for the token."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except HTTPError as error:
        return error.code == 403
    except OSError:
        return False
