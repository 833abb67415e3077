"""`reasonscope app`: look at runs in the browser."""

import os
import secrets
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import typer

from reasonscope.app.interruption import keeping
from reasonscope.data.errors import InputError, MissingExtraError


def browse(
    run: Annotated[Path | None, typer.Argument(help="The folder of a run; the shipped examples if not given.")] = None,
    run_: Annotated[Path | None, typer.Option("--run", help="The same as RUN.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="The folder whose runs may be opened; the parent of RUN if not given.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8501,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Any address but this machine's own asks for a token.")
    ] = "127.0.0.1",
    token: Annotated[str, typer.Option(help="The token that other machines have to give; random if not given.")] = "",
) -> None:
    """Show a run in the browser: its traces, and what was measured on them. Serves this machine only, until interrupted."""
    if find_spec("streamlit") is None:
        raise MissingExtraError(
            "the browser app needs streamlit, which is not installed: pip install 'reasonscope[app]'"
        )
    from reasonscope.app.server.access import VARIABLE
    from reasonscope.app.server.serving import LOOPBACK, serve_command

    folder, name = _place(run or run_, root)
    environment = dict(os.environ)
    token = token or environment.get(VARIABLE, "")
    guarded = host not in LOOPBACK or bool(token)
    if guarded:
        environment[VARIABLE] = token or secrets.token_urlsafe(16)
        typer.echo(f"http://{host}:{port}/?{urlencode({'token': environment[VARIABLE]})}", err=True)
    line = serve_command(name, folder, host=host, port=port, guarded=guarded)
    with keeping(lambda: "the app has stopped."):
        raise typer.Exit(subprocess.run(line, env=environment).returncode)


def _place(run: Path | None, root: Path | None) -> tuple[Path, str]:
    """The root folder, and the path of the run below it ("" for the example). Raises InputError, StoreError."""
    from reasonscope.analysis.runs.opened_run import open_run
    from reasonscope.app.page_parts.runs import confined

    if run is None:
        return (root or Path("runs")).resolve(), ""
    if not run.exists():
        raise InputError(f"no run at {run}; record one with: reasonscope record --out {run}")
    folder = root.resolve() if root else run.resolve().parent
    name = os.path.relpath(run.resolve(), folder)
    open_run(confined(folder, name))  # an error about a wrong folder belongs here rather than in the browser
    return folder, name
