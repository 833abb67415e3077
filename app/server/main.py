"""The app that `reasonscope app` serves: its pages, and the run that they show."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import streamlit as st

from reasonscope.analysis.runs.opened_run import OpenRun, open_run
from reasonscope.app.demo.real_example import EXAMPLES
from reasonscope.app.page_parts import components, state
from reasonscope.app.page_parts.runs import confined, find_runs
from reasonscope.app.page_parts.state import BOUND, Key
from reasonscope.app.pages import ablations, anchors, compare, heads, overview, probes, refusal, steering, traces
from reasonscope.app.pages import mi as mi_peaks
from reasonscope.data.errors import InputError, ReasonscopeError

# Drawn here, because Streamlit would load a page's icon from a font server.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Ccircle cx='7' cy='7' r='5' fill='none' stroke='%230072B2' stroke-width='2'/%3E"
    "%3Cpath d='M11 11l4 4' stroke='%23E69F00' stroke-width='2'/%3E%3C/svg%3E"
)
_UPLOAD = "uploaded"
_MOST_LINES = 2_000  # of an upload: a short line is cheap to send, but becomes a trace to parse, store and show
_UPLOADED, _FILE, _PROBLEM = "reasonscope uploaded run", "reasonscope file", "reasonscope problem of the file"

# Address, title, icon, and the function that shows a run.
_VIEWS: tuple[tuple[str, str, str, Callable[[OpenRun], None]], ...] = (
    ("overview", "Overview", ":material/dashboard:", overview.show),
    ("trace", "Trace", ":material/article:", traces.show),
    ("mi-peaks", "MI peaks", ":material/monitoring:", mi_peaks.show),
    ("anchors", "Thought anchors", ":material/hub:", anchors.show),
    ("heads", "Attention heads", ":material/grid_on:", heads.show),
    ("probes", "Probes", ":material/radar:", probes.show),
    ("refusal", "Refusal cliff", ":material/trending_down:", refusal.show),
    ("steering", "Steering", ":material/tune:", steering.show),
    ("ablations", "Ablations", ":material/content_cut:", ablations.show),
    ("compare", "Compare", ":material/compare_arrows:", compare.show),
)


def _serve(run: str, root: Path) -> None:
    """Show the run named `run` below `root` ("" for the example), or another one that the reader chooses."""
    st.set_page_config(page_title="reasonscope", page_icon=_ICON, layout="wide")
    st.html("<style>[data-testid='stMainBlockContainer'] {padding-top: 3rem}</style>")
    pages = {
        address: st.Page(partial(_page, show), title=title, icon=icon, url_path=address, default=address == "overview")
        for address, title, icon, show in _VIEWS
    }
    state.offer_pages(pages)
    chosen = st.navigation(list(pages.values()))
    state.arrive()
    with st.sidebar:
        opened = _choose(run, root)
        _upload()
    st.session_state["reasonscope run"] = opened
    chosen.run()


def _page(show: Callable[[OpenRun], None]) -> None:
    with components.show_errors():
        where = st.session_state["reasonscope run"]
        if where is not None:
            show(open_run(where))


def _choose(run: str, root: Path) -> Path | None:
    """The folder of the run that is chosen in the sidebar; None, with a message, if it has none."""
    runs: dict[str, Path] = {}
    with components.show_errors():
        runs = {name: confined(root, name) for name in dict.fromkeys([*([run] if run else []), *find_runs(root)])}
    examples = {name: folder for name, folder in EXAMPLES.items() if folder.is_dir()}
    runs = {**examples, **runs}
    if _UPLOADED in st.session_state:
        runs[_UPLOAD] = Path(st.session_state[_UPLOADED].name) / _UPLOAD
    if run:  # the examples come first only if no run was given
        runs = dict(sorted(runs.items(), key=lambda item: item[0] in examples))
    state.offer_runs(runs)
    if not runs:
        st.info("No run here yet.")
        return None
    return runs[st.selectbox("Run", list(runs), key=Key.RUN, bind=BOUND)]


def _upload() -> None:
    """Traces of the reader's own: a JSONL of completions, read as data into a run that lasts as long as the reader's
    session."""
    with st.expander("Open a file of completions"):
        st.caption("JSONL, one per line: `prompt` and `completion`, or `messages`. Nothing in it is executed.")
        st.file_uploader("JSONL", type=["jsonl"], label_visibility="collapsed", key=_FILE, on_change=_take_upload)
        with components.show_errors():
            if (problem := st.session_state.get(_PROBLEM)) is not None:
                raise problem


def _take_upload() -> None:
    """Open the uploaded file instead of the one before; an error is shown at the upload."""
    given = st.session_state[_FILE]
    st.session_state[_PROBLEM] = None
    if given is None:
        return
    folder = TemporaryDirectory(prefix="reasonscope-upload-")  # removed with the session that holds it, or with the app
    try:
        _import(given.getvalue(), Path(folder.name))
    except ReasonscopeError as error:
        folder.cleanup()
        st.session_state[_PROBLEM] = error
        return
    if _UPLOADED in st.session_state:
        st.session_state[_UPLOADED].cleanup()
    st.session_state[_UPLOADED] = folder
    st.session_state[Key.RUN] = _UPLOAD


def _import(content: bytes, folder: Path) -> None:
    """Make a run of the completions in `content`. Raises InputError if it has too many, or names the invalid line."""
    from reasonscope.data.exchange.importers import import_jsonl
    from reasonscope.data.storage.store import TraceStore

    if (n := content.rstrip().count(b"\n") + 1) > _MOST_LINES:
        raise InputError(
            f"the file has {n:,} lines, but only {_MOST_LINES:,} can be opened here; import it on the command line: "
            "reasonscope import FILE --out runs/NAME"
        )
    file = folder / "upload.jsonl"
    file.write_bytes(content)
    found = import_jsonl(file)
    file.unlink()
    with TraceStore.create(folder / _UPLOAD, meta={"imported": {"as": "jsonl", "from": "an upload"}}) as store:
        store.append(found, {})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _serve(sys.argv[1], Path(sys.argv[2]))
