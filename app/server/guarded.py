"""The app behind its token: what `streamlit run` is given where one is asked for."""

import os
import signal
import sys
from pathlib import Path

from streamlit.starlette import App

from reasonscope.app.server.access import VARIABLE, Guard

# Uvicorn ends by the very signal that it was sent; at an exit what was uploaded is removed.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

# For Streamlit, which looks for this line and serves what bears the name.
app = App(Path(__file__).with_name("main.py"))
app = Guard(app, os.environ[VARIABLE])
