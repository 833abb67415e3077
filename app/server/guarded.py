"""The app protected by its token: the entry point that `streamlit run` gets if a token is required."""

import os
import signal
import sys
from pathlib import Path

from streamlit.starlette import App

from reasonscope.app.server.access import VARIABLE, Guard

# Uvicorn ends by the signal that it received; a normal exit removes uploaded files.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

# Streamlit searches for this line and serves the object with this name.
app = App(Path(__file__).with_name("main.py"))
app = Guard(app, os.environ[VARIABLE])
