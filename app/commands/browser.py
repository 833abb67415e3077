"""`reasonscope app`: look at runs in the browser."""

import os
import secrets
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from reasonscope.data.errors import InputError, MissingExtraError

# Streamlit would by default ask for an e-mail address, report usage, watch our files and show tracebacks to whoever looks.
_SETTINGS = (
    "--server.showEmailPrompt=false",
    "--browser.gatherUsageStats=false",
    "--server.fileWatcherType=none",
    "--server.enableXsrfProtection=true",
    "--server.maxUploadSize=50",
    "--client.showErrorDetails=none",
    "--client.toolbarMode=minimal",
    # For both themes apart: one colour for all would switch the reader's choice of dark or light off.
    "--theme.light.primaryColor=#0072B2",
    "--theme.dark.primaryColor=#56B4E9",
)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def browse(
    run: Annotated[Path | None, typer.Argument(help="The folder of a run; without one, the example.")] = None,
    run_: Annotated[Path | None, typer.Option("--run", help="The same.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="The folder whose runs may be shown; that of RUN where not given.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port on this machine.")] = 8501,
    host: Annotated[str, typer.Option(help="Another address to listen on; a token is then asked for.")] = "127.0.0.1",
    token: Annotated[str, typer.Option(help="The token; drawn at random where not given.")] = "",
) -> None:
    """Look at a run in the browser: its traces, and what was measured on them. Serves this machine only, until interrupted."""
    if find_spec("streamlit") is None:
        raise MissingExtraError(
            "the browser app needs streamlit, which is not installed: pip install 'reasonscope[app]'"
        )
    folder, name = _place(run or run_, root)
    environment = dict(os.environ)
    if host not in _LOOPBACK or token:
        from reasonscope.app.access import VARIABLE

        environment[VARIABLE] = token or secrets.token_urlsafe(16)
        typer.echo(f"http://{host}:{port}/?token={environment[VARIABLE]}", err=True)
    page = str(files("reasonscope.app").joinpath("main.py"))
    # On this machine only its own names are answered to: a foreign page may have a name of its own point here.
    names = [f"--server.allowedHosts={name}" for name in _LOOPBACK] if host in _LOOPBACK else []
    where = (f"--server.address={host}", f"--server.port={port}", *names)
    arguments = ["run", page, *where, *_SETTINGS, "--", name, str(folder)]
    raise typer.Exit(subprocess.run([sys.executable, "-m", "streamlit", *arguments], env=environment).returncode)


def _place(run: Path | None, root: Path | None) -> tuple[Path, str]:
    """The root, and the run as a path below it ("" for the example). Raises InputError, StoreError."""
    from reasonscope.app.runs import confined, open_run

    if run is None:
        return (root or Path("runs")).resolve(), ""
    if not run.exists():
        raise InputError(f"there is no {run}; record a run with: reasonscope record --out {run}")
    folder = root.resolve() if root else run.resolve().parent
    name = os.path.relpath(run.resolve(), folder)
    open_run(confined(folder, name))  # a wrong folder is better said here than in the browser
    return folder, name
