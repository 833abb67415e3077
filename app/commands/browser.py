"""`reasonscope app`: look at a run in the browser."""

import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.summary import read_summary
from reasonscope.data.errors import MissingExtraError

# Streamlit would by default listen to the whole network, ask for an e-mail address, report usage and watch our files.
_SETTINGS = (
    "--server.address=localhost",
    "--server.showEmailPrompt=false",
    "--browser.gatherUsageStats=false",
    "--server.fileWatcherType=none",
)


def browse(
    run: Annotated[Path, typer.Argument(help="The folder that `reasonscope demo` wrote.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port on this machine.")] = 8501,
) -> None:
    """Open a run in the browser: its summary and its report. Serves this machine only, until interrupted."""
    if find_spec("streamlit") is None:
        raise MissingExtraError(
            "the browser app needs streamlit, which is not installed: pip install 'reasonscope[app]'"
        )
    read_summary(run)  # a wrong folder is better said here than in the browser
    page = str(files("reasonscope.app").joinpath("main.py"))
    arguments = ["run", page, f"--server.port={port}", *_SETTINGS, "--", str(run.resolve())]
    raise typer.Exit(subprocess.run([sys.executable, "-m", "streamlit", *arguments]).returncode)
