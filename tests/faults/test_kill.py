"""SIGKILL at random instants: what was stored is intact, and a second run ends as if nothing had happened."""

import json
import shutil
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest

from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore

RECORD = (
    *("record", "--n", 4, "--batch-size", 1, "--sites", "resid_post.2,z.1", "--temperature", 0),
    *("--max-new-tokens", 16, "--out"),
)
# The second and third kill the run again while it resumes.
INSTANTS = (0.2, 0.5, 0.8)
MANY = 200


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run that nobody interrupted, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = command(*RECORD, folder)
    assert done["status"] == 0, done["said"]
    return folder, done["seconds"]


def killed(command, folder, instants):
    """Kill a run at each of `instants` (seconds) in turn, checking what is left; whether it was begun at all at the end."""
    for instant in instants:
        assert command(*RECORD, folder, kill_after=instant)["status"] in (-9, 0)
        if (folder / NAME).exists():
            assert check_store(folder) == []
            store = TraceStore.open(folder)
            assert [store.activations(id, "z.1").shape[0] for id in store.ids] == [
                len(trace.token_ids) - 1 for trace in store
            ]


def test_a_killed_record_resumes_to_the_same_bytes(command, content, whole, tmp_path):
    reference, seconds = whole
    killed(command, tmp_path / "run", [at * seconds for at in INSTANTS])
    assert command(*RECORD, tmp_path / "run")["status"] == 0
    assert content(tmp_path / "run") == content(reference)


@pytest.mark.slow
def test_a_record_killed_anywhere_resumes_to_the_same_bytes(command, content, whole, tmp_path):
    reference, seconds = whole
    wanted, begun = content(reference), 0
    for instant in np.random.default_rng(0).permutation(np.linspace(0, 1.05 * seconds, MANY)):
        killed(command, tmp_path / "run", [instant])
        begun += (tmp_path / "run" / NAME).exists()
        done = command(*RECORD, tmp_path / "run")
        assert done["status"] == 0, (instant, done["said"])
        assert content(tmp_path / "run") == wanted, instant
        shutil.rmtree(tmp_path / "run")
    assert begun > MANY / 4  # that many were killed while there was something to lose


def analysed(command, run, **options):
    return command("analyse", "entropy", "--figures", "--run", run, **options)


@pytest.fixture(scope="module")
def analyses(command, whole, tmp_path_factory):
    """The results of an analysis that nobody interrupted, and how long it took."""
    folder = tmp_path_factory.mktemp("analysed")
    shutil.copytree(whole[0], folder / "run")
    done = analysed(command, folder / "run")
    assert done["status"] == 0, done["said"]
    return folder / "run-results", done["seconds"]


def killed_analysis(command, content, whole, analyses, folder, instant):
    shutil.copytree(whole[0], folder / "run")
    assert analysed(command, folder / "run", kill_after=instant)["status"] in (-9, 0)
    assert check_store(folder / "run") == []
    assert analysed(command, folder / "run")["status"] == 0
    assert content(folder / "run-results") == content(analyses[0])


def test_a_killed_analysis_is_done_again_to_the_same_bytes(command, content, whole, analyses, tmp_path):
    killed_analysis(command, content, whole, analyses, tmp_path / "0", 0.7 * analyses[1])


@pytest.mark.slow
def test_an_analysis_killed_anywhere_is_done_again_to_the_same_bytes(command, content, whole, analyses, tmp_path):
    for i, instant in enumerate(np.linspace(0, 1.05 * analyses[1], MANY // 4)):
        killed_analysis(command, content, whole, analyses, tmp_path / str(i), instant)
        shutil.rmtree(tmp_path / str(i))


class Deadly(BaseHTTPRequestHandler):
    """Counts the rollouts that it is asked for, and kills whoever asks for the one behind `last`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked[str(body["prompt"]), body["seed"]] += 1
            reached = self.server.asked.total() == self.server.last
        if reached:
            children = psutil.Process().children(recursive=True)
            commands = [one for one in children if "worker.py" in str(one.as_dict(["cmdline"]))]
            commands[-1].kill()  # the first is the one that forks them
        payload = {"choices": [{"text": " 7.</think>\n\nIt is \\boxed{7}.", "finish_reason": "stop"}]}
        with suppress(BrokenPipeError):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(payload).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Deadly)
    http.asked, http.last, http.lock = Counter(), None, threading.Lock()
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def test_rollouts_that_a_server_wrote_are_not_asked_for_again(command, content, server, tmp_path):
    pytest.importorskip("openai")
    how = ("--problems", "ledger:brief", "--n", 3, "--sites", "", "--max-new-tokens", 100)
    assert command("record", *how, "--out", tmp_path / "one" / "run")["status"] == 0
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    url = f"http://127.0.0.1:{server.server_port}"
    words = ("analyse", "confidence", "--server", url, "--samples", 3, "--run")
    assert command(*words, tmp_path / "one" / "run")["status"] == 0
    wanted, server.asked = server.asked, Counter()
    server.last = wanted.total() // 2
    assert command(*words, tmp_path / "cut" / "run")["status"] == -9
    server.last = None
    assert command(*words, tmp_path / "cut" / "run")["status"] == 0
    again = server.asked - wanted
    assert set(server.asked) == set(wanted) and again.total() <= 8 + 1  # those that were on their way
    assert content(tmp_path / "cut" / "run-results") == content(tmp_path / "one" / "run-results")
