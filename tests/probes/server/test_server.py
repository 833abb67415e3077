"""A server is believed only as far as its ids, asked again if it is busy, and writes what `record` stores."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.text.parse import THINK
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.branches import Branch
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.loading import locate
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import Prompting, load_prompting
from reasonscope.probes.server.completions import ServerWriter, server_writer

pytest.importorskip("openai")
SEQUENCE = [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45]
GREEDY = Sampling(temperature=0, max_new_tokens=3)


class Answers(BaseHTTPRequestHandler):
    """Writes two fixed tokens and one that hangs on the seed; `lie` says what is wrong with it."""

    lie = ""
    asked: ClassVar[list] = []
    parted: ClassVar[dict] = {}  # what a reasoning parser makes of a reply

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == [0]:  # the first call of a writer, which asks what the server takes
            return self.answer(400 if self.lie == "no ids" else 200, {"choices": []})
        type(self).asked.append(body)
        if self.lie == "broken behind 2" and len(self.asked) > 2:
            return self.answer(500, {})
        if self.lie == "busy" and Counter(map(str, self.asked))[str(body)] < 3:
            return self.answer(429, {"error": "busy"}, **{"Retry-After-Ms": "1"})
        ids = [5, 6, body.get("seed", 0) % 7 + 5]
        reply = {"text": self.server.decode(ids), "token_ids": ids, "finish_reason": "length"}
        reply["prompt_token_ids"] = body["prompt"]
        if self.lie == "prompt":
            reply["prompt_token_ids"] = [1, *body["prompt"]]
        if self.lie == "ids":
            reply["token_ids"] = [9, 9, 9]
        if self.lie == "vocabulary":
            reply["token_ids"] = [10**6]
        if self.lie in ("text only", "no ids"):
            reply = {"text": reply["text"], "finish_reason": "stop"}
        reply |= self.parted
        usage = {"prompt_tokens": self.server.count(body["prompt"])} if self.lie == "no ids" else None
        payload = {"choices": [] if self.lie == "empty" else [reply], "usage": usage}
        return self.answer(500 if self.lie == "broken" else 200, payload)

    def answer(self, status, payload, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(payload).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tokenizer):
    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    http.daemon_threads = False
    http.decode = tokenizer.backend_tokenizer.decode
    http.count = lambda text: len(tokenizer.backend_tokenizer.encode(text).ids)
    Answers.lie, Answers.asked, Answers.parted = "", [], {}
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield ServerWriter(
        url=f"http://127.0.0.1:{http.server_port}",
        model="m",
        tokenizer=tokenizer.backend_tokenizer,
        stop=2,
        workers=2,
        retries=0,
    )
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_server_gets_ids_and_seeds_and_gives_ids_back(server):
    branches = [Branch(cut=3, seed=1, stub=(8,)), Branch(cut=2, seed=2)]
    sampling = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=3)
    done = server(SEQUENCE, branches, sampling)
    assert [c.token_ids.tolist() for c in done] == [[1, 5, 9, 8, 5, 6, 6], [1, 5, 5, 6, 7]]
    asked = sorted(Answers.asked, key=lambda body: body["seed"])
    assert [(b["prompt"], b["seed"], b["temperature"]) for b in asked] == [([1, 5, 9, 8], 1, 0.6), ([1, 5], 2, 0.6)]
    assert all(body["return_token_ids"] for body in asked)
    assert np.isnan(done[0].logprobs).all() and done[0].n_prompt_tokens == 4
    Answers.lie = "text only"  # and what it says has ended, ended with the stop token
    texts = server(SEQUENCE, branches, sampling)
    assert [c.token_ids.tolist() for c in texts] == [[*c.token_ids.tolist(), 2] for c in done]


def test_a_server_that_takes_no_ids_gets_the_text_that_makes_them(server):
    Answers.lie = "no ids"
    (done,) = server(SEQUENCE, [Branch(cut=4, seed=1)], GREEDY)
    assert not server.takes_ids
    assert (
        Answers.asked[0]["prompt"] == server.tokenizer.decode(SEQUENCE[1:4])
        and "return_token_ids" not in Answers.asked[0]
    )
    assert done.token_ids.tolist() == [*SEQUENCE[:4], 5, 6, 6, 2] and done.finish_reason == "stop"
    with pytest.raises(InputError, match="no text encodes to"):
        server([2, 1, 5], [Branch(cut=2, seed=1)], GREEDY)
    with pytest.raises(InputError, match="texts lack the think tags"):
        replace(server, needs_ids=True)(SEQUENCE, [Branch(cut=4, seed=1)], GREEDY)


def test_a_busy_server_is_asked_again(server):
    Answers.lie = "busy"
    with pytest.raises(InputError, match=r"refused \(429\)"):
        server(SEQUENCE, [Branch(cut=2, seed=0)], GREEDY)
    Answers.asked = []
    patient = replace(server, retries=2)
    (done,) = patient(SEQUENCE, [Branch(cut=2, seed=0)], GREEDY)
    assert len(Answers.asked) == 3 and done.token_ids.tolist() == [1, 5, 5, 6, 5]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("prompt", "not the 2 that were sent"),
        ("ids", "spell"),
        ("vocabulary", "outside the vocabulary"),
        ("empty", "without one choice"),
        ("broken", "refused"),
    ],
)
def test_a_lying_server_is_an_error(server, lie, message):
    Answers.lie = lie
    with pytest.raises(InputError, match=message):
        server(SEQUENCE, [Branch(cut=2, seed=0)], GREEDY)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_a_server_parts_from_the_text_is_put_back(server, name):
    """Without ids the text is made whole again, after a prompt that opens the thinking and after one that does not."""
    decode, encode = server.tokenizer.decode, server.tokenizer.encode
    server, Answers.lie = replace(server, tags=THINK, needs_ids=True), "text only"
    opens = [1, *encode("a<think>", add_special_tokens=False).ids]
    cases = {
        (7, ("So 7.", "It is 7.", "stop")): "<think>\nSo 7.\n</think>\n\nIt is 7.</s>",
        (8, ("So", None, "length")): "<think>\nSo",
    }
    for (seed, (thought, text, finish)), whole in cases.items():
        Answers.parted = {name: thought, "text": text, "finish_reason": finish}
        for prompt in ([1, 5], opens):
            (done,) = server.complete([prompt], GREEDY, [seed])
            written = decode(done.token_ids[len(prompt) :].tolist(), skip_special_tokens=False)
            assert written == (whole.removeprefix("<think>\n") if prompt is opens else whole)
    with pytest.raises(InputError, match="without its reasoning parser"):
        replace(server, tags=None).complete([[1, 5]], GREEDY, [1])


def test_ids_that_spell_reasoning_and_text_are_believed(server):
    ids = server.tokenizer.encode("<think>So 7.</think>7", add_special_tokens=False).ids
    Answers.parted = {"token_ids": ids, "text": "7", "reasoning": "So 7."}
    (done,) = server.complete([[1, 5]], GREEDY, [1])
    assert done.token_ids.tolist() == [1, 5, *ids]
    Answers.parted = {"token_ids": ids, "text": "7", "reasoning": "So 8."}
    with pytest.raises(InputError, match="another tokenizer"):
        server.complete([[1, 5]], GREEDY, [1])


def test_an_unreachable_server_is_an_error(tokenizer):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        for url, message in ((closed, "cannot read"), ("file:///etc", "has to begin with http")):
            nowhere = ServerWriter(url=url, model="m", tokenizer=tokenizer.backend_tokenizer, timeout=60, retries=0)
            with pytest.raises(InputError, match=message):
                nowhere(SEQUENCE, [Branch(cut=2, seed=0)], GREEDY)


def test_what_was_written_is_kept_and_not_asked_for_again(server, tmp_path):
    keeping = replace(server, keep=tmp_path, workers=1)
    branches = [Branch(cut=3, seed=seed) for seed in range(4)]
    Answers.lie = "broken behind 2"
    with pytest.raises(InputError, match="refused"):
        keeping(SEQUENCE, branches, GREEDY)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])  # killed while it wrote the second
    Answers.lie, Answers.asked = "", []
    done = replace(keeping)(SEQUENCE, branches, GREEDY)
    assert sorted(body["seed"] for body in Answers.asked) == [1, 2, 3]
    Answers.lie, fresh = "broken", replace(keeping, url="http://127.0.0.1:9")
    again = fresh(SEQUENCE, branches, GREEDY)  # another server, which is not even there
    for one, other in zip(done, again, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.finish_reason == other.finish_reason
    with pytest.raises(InputError, match="refused"):  # other sampling is another request
        replace(keeping)(SEQUENCE, branches, replace(GREEDY, max_new_tokens=2))


def test_a_server_is_asked_from_a_running_event_loop(server):
    async def cell():
        return server(SEQUENCE, [Branch(cut=2, seed=0)], GREEDY)

    with ThreadPoolExecutor(1) as beside:  # here one may be running already: that of the browser's tests
        (done,) = beside.submit(lambda: asyncio.run(cell())).result()
    assert done.token_ids.tolist() == [1, 5, 5, 6, 5]


PROBLEMS = [Problem(id=f"p{i}", messages=(Message(role="user", content=f"{i} + 1 ="),), answer="1") for i in range(5)]


def test_what_a_server_writes_is_read_by_the_model_here(server, model_of, tmp_path):
    model = model_of("qwen3")
    how = {"sampling": GREEDY, "batch_size": 2, "server": server}
    store = record(model, PROBLEMS[:3], tmp_path / "run", sites=["resid_post.1"], **how)
    assert store.meta["server"] == {"model": "m"} and len(Answers.asked) == 3
    for trace in store:
        assert trace.token_ids[trace.n_prompt_tokens :].tolist()[:2] == [5, 6]
        (seen,) = replay(model, [trace.token_ids.tolist()], [Site("resid_post", 1)])
        np.testing.assert_allclose(store.activations(trace.id, "resid_post.1"), seen[Site("resid_post", 1)], atol=2e-5)
    assert len(record(model, PROBLEMS, tmp_path / "run", sites=["resid_post.1"], **how)) == 5
    assert len(Answers.asked) == 5  # nothing was asked for twice
    with pytest.raises(StoreError, match="server"):
        record(model, PROBLEMS, tmp_path / "run", sites=["resid_post.1"], **{**how, "server": None})


def test_text_alone_needs_no_weights(server, model_of, tmp_path):
    model = model_of("qwen3")
    known = {name: getattr(model, name) for name in ("config", "tokenizer", "thinking", "name")}
    bare = Prompting(**known)
    how = {"sampling": GREEDY}
    store = record(bare, PROBLEMS, tmp_path / "run", server=server, **how)
    assert len(store) == 5 and store.meta["model"]["weights"] is None
    assert store.meta["model"]["tokenizer"] == model.fingerprint["tokenizer"]
    with pytest.raises(InputError, match="without weights"):
        record(bare, PROBLEMS, tmp_path / "other", **how)
    with pytest.raises(InputError, match="without weights"):
        record(bare, PROBLEMS, tmp_path / "other", sites=["z.0"], server=server, **how)


def test_the_writer_of_a_shipped_model(monkeypatch):
    monkeypatch.setenv("REASONSCOPE_SERVER_KEY", "secret")
    organism = load_prompting("organism")
    writer = server_writer("http://host", organism, served_as="theirs")
    assert (writer.model, writer.key, writer.needs_ids) == ("theirs", "secret", False)
    assert writer.stop == organism.tokenizer.eos_token_id
    assert server_writer("http://host", organism).model == "organism"


@pytest.fixture
def transformers_serve(tmp_path):
    """The address of a real `transformers serve` of the organism."""
    pytest.importorskip("fastapi")
    folder, port = locate("organism"), 18_765
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield url, str(folder)
        finally:
            process.terminate()


@pytest.mark.slow
def test_transformers_serve_writes_what_the_model_here_writes(transformers_serve, tmp_path):
    url, name = transformers_serve
    model, problems = load_model("organism"), load_problems("ledger", n=4)
    how = {"sampling": Sampling(temperature=0, max_new_tokens=250), "sites": ["resid_post.3"]}
    here = record(model, problems, tmp_path / "here", **how)
    there = record(model, problems, tmp_path / "there", server=server_writer(url, model, served_as=name), **how)
    assert sorted(here.ids) == sorted(there.ids)
    assert any(trace.state == "closed" for trace in here)
    for trace in here:
        np.testing.assert_array_equal(there.trace(trace.id).token_ids, trace.token_ids)
        assert there.trace(trace.id).finish_reason == trace.finish_reason


def test_every_field_of_the_sampling_is_sent(server):
    """A server fills what is missing from the model's own generation configuration."""
    sampling = Sampling(
        temperature=0.5, top_k=7, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3, max_new_tokens=3
    )
    server.complete([[1, 5]], sampling, [3])
    server.complete([[1, 5]], Sampling(max_new_tokens=3, stop=("x",)), [3])
    first, second = Answers.asked[-2:]
    sent = {
        name: first[name]
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
    }
    assert sent == {
        "temperature": 0.5, "top_p": 1.0, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
    }  # fmt: skip
    assert (second["top_k"], second["min_p"], second["repetition_penalty"], second["stop"]) == (-1, 0, 1, ["x"])
    assert first["frequency_penalty"] == 0


CPU_METRICS = 'vllm:cache_config_info{block_size="128",kv_cache_memory_bytes="1073741824"} 1.0\n'


@pytest.mark.parametrize(
    ("metrics", "seeds", "sent"),
    [
        (CPU_METRICS, "auto", False),
        (CPU_METRICS, "send", True),
        ("", "none", False),
        (None, "auto", True),  # a server that publishes nothing
        (CPU_METRICS.replace("128", "16"), "auto", True),
        (CPU_METRICS.replace("1073741824", "None"), "auto", True),
        ("\xff{" * 2**20, "auto", True),
    ],
)
def test_vllm_on_cpus_gets_no_seeds_and_its_traces_say_so(
    server, model_of, tmp_path, monkeypatch, metrics, seeds, sent
):
    def do_get(self):
        self.send_response(404 if metrics is None else 200)
        self.end_headers()
        self.wfile.write((metrics or "").encode())

    monkeypatch.setattr(Answers, "do_GET", do_get, raising=False)
    drawn, writer = Sampling(temperature=0.6, max_new_tokens=3), replace(server, seeds=seeds)
    store = record(model_of("qwen3"), PROBLEMS[:1], tmp_path / "store", sampling=drawn, server=writer)
    assert all(("seed" in body) is sent for body in Answers.asked) and Answers.asked
    told = store.trace(store.ids[0]).meta.get("unseeded", False), store.meta["server"].get("unseeded", False)
    assert told == (not sent, not sent)
    greedy = record(model_of("qwen3"), PROBLEMS[:1], tmp_path / "greedy", sampling=GREEDY, server=writer)
    assert "unseeded" not in greedy.meta["server"]
