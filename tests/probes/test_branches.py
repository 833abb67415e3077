"""Branches off one prefix equal whole generations, for every family; a server is believed only as far as its ids."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest

from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.trace import Sampling
from reasonscope.probes.branches import Branch, PrefixWriter
from reasonscope.probes.decoding import generate
from reasonscope.probes.server import ServerWriter

SEQUENCE = [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45]


def test_branches_equal_generating_from_each_prefix(family, model_of):
    model = model_of(family)
    sampling = Sampling(temperature=0.8, max_new_tokens=5)
    branches = [
        Branch(cut=cut, stub=stub, seed=10 * cut + sample)
        for cut in (1, 4, 12)
        for stub in ((), (7, 8))
        for sample in range(2)
    ]
    done = PrefixWriter(model, batch_size=5)(SEQUENCE, branches, sampling)
    prompts = [[*SEQUENCE[: b.cut], *b.stub] for b in branches]
    whole = generate(model, prompts, sampling, seeds=[b.seed for b in branches])
    for one, other in zip(done, whole, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-4)
        assert one.n_prompt_tokens == other.n_prompt_tokens and one.finish_reason == other.finish_reason


def test_a_cut_or_a_branch_that_cannot_be_is_refused(model_of):
    write = PrefixWriter(model_of("qwen3"))
    assert write(SEQUENCE, [], Sampling()) == []
    with pytest.raises(InputError, match="cut 13"):
        write(SEQUENCE, [Branch(cut=13, seed=0)], Sampling())
    with pytest.raises(ContextError, match="no room"):
        write(SEQUENCE, [Branch(cut=12, seed=0, stub=(5,) * 120)], Sampling())


class Answers(BaseHTTPRequestHandler):
    lie = ""
    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        ids = [5, 6, body["seed"] % 7 + 5]
        reply = {"text": self.server.decode(ids), "token_ids": ids, "finish_reason": "length"}
        reply["prompt_token_ids"] = body["prompt"]
        if self.lie == "prompt":
            reply["prompt_token_ids"] = [1, *body["prompt"]]
        if self.lie == "ids":
            reply["token_ids"] = [9, 9, 9]
        if self.lie == "vocabulary":
            reply["token_ids"] = [10**6]
        if self.lie == "text only":
            del reply["token_ids"]
        payload = json.dumps({"choices": [] if self.lie == "empty" else [reply]}).encode()
        self.send_response(500 if self.lie == "broken" else 200)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tokenizer):
    http = HTTPServer(("127.0.0.1", 0), Answers)
    http.decode = tokenizer.backend_tokenizer.decode
    Answers.lie, Answers.asked = "", []
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield ServerWriter(
        url=f"http://127.0.0.1:{http.server_port}", model="m", tokenizer=tokenizer.backend_tokenizer, workers=2
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
    assert np.isnan(done[0].logprobs).all() and done[0].n_prompt_tokens == 4
    Answers.lie = "text only"
    assert [c.token_ids.tolist() for c in server(SEQUENCE, branches, sampling)] == [c.token_ids.tolist() for c in done]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("prompt", "other than the 2 that were sent"),
        ("ids", "spell"),
        ("vocabulary", "outside the vocabulary"),
        ("empty", "without one choice"),
        ("broken", "refused"),
    ],
)
def test_a_lying_server_is_an_error(server, lie, message):
    Answers.lie = lie
    with pytest.raises(InputError, match=message):
        server(SEQUENCE, [Branch(cut=2, seed=0)], Sampling(max_new_tokens=3))


def test_an_unreachable_server_is_an_error(tokenizer):
    for url, message in (("http://127.0.0.1:9", "cannot read"), ("file:///etc", "has to begin with http")):
        nowhere = ServerWriter(url=url, model="m", tokenizer=tokenizer.backend_tokenizer, timeout=2)
        with pytest.raises(InputError, match=message):
            nowhere(SEQUENCE, [Branch(cut=2, seed=0)], Sampling())
