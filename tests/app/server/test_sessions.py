"""Many readers at once: no page fails, and what the server holds stays below a bound."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psutil
import pytest
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

from reasonscope.app.server.serving import serving

SESSIONS = 50
SECONDS = float(os.environ.get("REASONSCOPE_SOAK_SECONDS", "30"))
BOUND = 2**30  # bytes of the server and its children beyond what the first session left
PAGES = ("", "trace", "mi-peaks", "anchors", "heads", "probes", "refusal", "steering", "ablations", "compare")


def rerun(socket, page: str) -> list[str]:
    """Ask for a page as a browser does, take all that comes until its script has ended, and return what went wrong in it."""
    message = BackMsg()
    message.rerun_script.page_name = page
    socket.send(message.SerializeToString())
    wrong = []
    while True:
        came = ForwardMsg.FromString(socket.recv(timeout=120))
        if came.HasField("delta") and came.delta.new_element.HasField("exception"):
            wrong.append(came.delta.new_element.exception.message)
        if came.HasField("script_finished"):
            return wrong


def reader(address: str, until: float) -> tuple[int, list[str]]:
    """One session: page after page, with the pause of a quick reader between them."""
    pages, wrong = 0, []
    with connect(
        f"ws://{address}/_stcore/stream", origin=f"http://{address}", max_size=None, open_timeout=60
    ) as socket:
        while not pages or time.monotonic() < until:
            wrong += rerun(socket, PAGES[pages % len(PAGES)])
            pages += 1
            time.sleep(2)
    return pages, wrong


def held(address: str) -> int:
    """Bytes of the process that listens on the port, and of its children."""
    port = urlsplit(f"http://{address}").port
    own = psutil.Process().children(recursive=True)
    server = next(p for p in own if any(c.laddr.port == port and c.status == "LISTEN" for c in p.net_connections()))
    return sum(process.memory_info().rss for process in [server, *server.children(recursive=True)])


@pytest.mark.slow
def test_fifty_readers_see_no_error_and_the_server_stays_below_a_bound(tmp_path):
    with serving(tmp_path) as url:
        address = urlsplit(url).netloc
        reader(address, 0)
        before, until = held(address), time.monotonic() + SECONDS
        with ThreadPoolExecutor(SESSIONS) as pool:
            told = list(pool.map(lambda _: reader(address, until), range(SESSIONS)))
        grown = held(address) - before
    assert [wrong for _, wrong in told if wrong] == []
    assert all(pages for pages, _ in told)
    assert grown < BOUND, f"{grown / 2**20:.0f} MiB more after {sum(pages for pages, _ in told)} pages"
