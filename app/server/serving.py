"""The app as a process of its own: the line that starts it, and a way to have it for a while from a notebook, a test or a benchmark."""

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
# Streamlit would by default ask for an e-mail address, report usage, watch our files and show tracebacks to whoever looks.
_SETTINGS = (
    "--server.showEmailPrompt=false",
    "--browser.gatherUsageStats=false",
    "--server.fileWatcherType=none",
    "--server.enableXsrfProtection=true",
    "--server.maxUploadSize=20",
    "--client.showErrorDetails=none",
    "--client.toolbarMode=minimal",
    # For both themes apart: one colour for all would switch the reader's choice of dark or light off.
    "--theme.light.primaryColor=#0072B2",
    "--theme.dark.primaryColor=#56B4E9",
)


def serve_command(run: str, root: Path, *, host: str, port: int, guarded: bool) -> list[str]:
    """The line that serves the runs below `root`, of which `run` ("" for the example) is opened, on `host`:`port`.

    `guarded`, it answers nothing to whoever does not know the token, which it takes from the environment.
    """
    page = str(files("reasonscope.app.server").joinpath("guarded.py" if guarded else "main.py"))
    # On this machine only its own names are answered to: a foreign page may have a name of its own point here.
    names = [f"--server.allowedHosts={name}" for name in LOOPBACK] if host in LOOPBACK else []
    where = (f"--server.address={host}", f"--server.port={port}", *names)
    return [sys.executable, "-m", "streamlit", "run", page, *where, *_SETTINGS, "--", run, str(root)]


@contextmanager
def serving(root: Path, run: str = "", *, token: str = "", within: float = 120.0) -> Iterator[str]:
    """Serve the runs below `root` on a free port of this machine while the block runs; gives the address. A `token` is asked for.

    Raises InputError where the app does not answer `within` seconds.
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
                raise InputError(f"the app did not start within {within:g} s; see what it says: {' '.join(line)}")
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
    """Whether somebody serves there, if only to ask for the token."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except HTTPError as error:
        return error.code == 403
    except OSError:
        return False
