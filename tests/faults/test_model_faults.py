"""An edit that raises leaves no hook and changes no number; a server that drops, stalls or babbles is one error."""

import gzip
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from itertools import takewhile

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.hooks import HooksBackend
from reasonscope.probes.generation.activations import capture, run_with_cache
from reasonscope.probes.generation.branches import Branch
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import load_model
from reasonscope.probes.server.completions import ServerWriter
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

PROMPT = [5, 6, 7, 8]


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


def hooks(module: nn.Module) -> int:
    tables = (table for m in module.modules() for table in (m._forward_hooks, m._forward_pre_hooks))
    return sum(hook.__module__.startswith("reasonscope") for table in tables for hook in table.values())


def breaking(at):
    """An edit that raises when it is called for the `at`-th time."""
    calls = []

    def edit(activation, where):
        calls.append(where)
        if len(calls) == at:
            raise Broken
        return activation

    return edit


@pytest.mark.parametrize("point", ["resid_pre", "z", "attn_out", "mlp_out", "resid_post"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_edit_that_raises_while_the_model_writes_leaves_nothing_behind(model, point, at):
    sampling = Sampling(max_new_tokens=4)
    before = generate(model, [PROMPT], sampling, seeds=[0])[0]
    with pytest.raises(Broken):
        generate(model, [PROMPT], sampling, seeds=[0], write={Site(point, 2): breaking(at)}, read=[Site("z", 0)])
    assert hooks(model.hf) == 0 and isinstance(model.backend, HooksBackend)
    after = generate(model, [PROMPT], sampling, seeds=[0])[0]
    assert after.token_ids.tolist() == before.token_ids.tolist()
    assert after.logprobs.tobytes() == before.logprobs.tobytes()


def test_what_raises_inside_a_block_leaves_nothing_behind(model):
    attention = model.hf.config._attn_implementation
    plain, _ = run_with_cache(model, PROMPT, [])
    vector = SteeringVector(directions={Site("resid_post", 1): torch.ones(model.d_model).numpy()}, method="ones")
    with pytest.raises(Broken), capture(model, ["attn_probs.1", "z.2"]), vector.apply(model, scope=Scope()):
        model.hf(torch.tensor([PROMPT]))
        raise Broken
    handle = vector.patch_activations(model)
    handle.remove()
    handle.remove()
    assert hooks(model.hf) == 0 and model.hf.config._attn_implementation == attention
    assert torch.equal(run_with_cache(model, PROMPT, [])[0], plain)


def drops(connection):
    connection.close()


def stalls(connection):
    time.sleep(1.5)
    connection.close()


def drips(connection):
    """A byte at a time, each well within any limit between two of them, for a minute."""
    for byte in HEAD + b" " * 1_000:
        connection.sendall(bytes([byte]))
        time.sleep(0.06)


def drips_a_body(connection):
    connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
    for _ in range(1_000):
        connection.sendall(b" ")
        time.sleep(0.06)


def hear(connection):
    """Take the whole request: a connection that is closed with some of it unread is reset, and with it the reply."""
    with connection.makefile("rb") as lines:
        head = takewhile(lambda line: line.strip(), lines)
        fields = dict(line.lower().split(b": ", 1) for line in head if b": " in line)
        lines.read(int(fields.get(b"content-length", 0)))


def answers(*pieces):
    def answer(connection):
        for piece in pieces:
            connection.sendall(piece)
        connection.close()

    return answer


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "behaviour",
    [
        drops,
        stalls,
        drips,
        drips_a_body,
        answers(b"nonsense\r\n\r\n"),
        answers(HEAD + b"Content-Length: 1000\r\n\r\n", b'{"choices": ['),
        answers(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
        answers(HEAD + b"\r\n" + b"[" * 100_000),
        answers(HEAD + b"\r\n[]"),
        answers(HEAD + b'\r\n{"choices": [{"text": "a", "token_ids": [[]]}]}'),
        answers(HEAD + b'\r\n{"choices": [{"text": "a", "prompt_token_ids": 3}]}'),
        answers(HEAD + b'\r\n{"choices": [3]}'),
        answers(HEAD + b'\r\n{"choices": [{"text": "\\ud800"}]}'),
    ],
)
def test_a_server_that_fails_is_one_error_in_time(behaviour):
    late = behaviour in (stalls, drips, drips_a_body)
    message = "no complete answer within 0.5 seconds in 1 tries" if late else "127"
    began = time.monotonic()
    with asked(behaviour, timeout=0.5 if late else 60) as ask, pytest.raises(InputError, match=message):
        ask()
    assert time.monotonic() - began < 10


CODECS = ("base64", "hex", "zlib", "bz2", "uu", "quopri", "rot13", "no such")


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request"])
@pytest.mark.parametrize("codec", CODECS)
def test_no_server_chooses_how_its_reply_is_read(status, codec):
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json; charset=" + codec.encode() + b"\r\n\r\n"
    with asked(answers(head + b'{"choices": [{"text": "a", "finish_reason": "length"}], "x": "\xc3\xa9"}')) as ask:
        if status.startswith(b"200"):
            assert ask()[0].token_ids.tolist() == [0, 0]
        else:
            with pytest.raises(InputError, match=r"refused \(400\).*é"):
                ask()


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request"])
def test_a_reply_is_read_to_a_bound_and_not_unpacked(status):
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\n"
    endless = answers(head + b"\r\n", *[b" " * 2**20] * 300)
    with asked(endless) as ask, pytest.raises(InputError, match="has more than 10"):
        ask()
    bomb = answers(head + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b" " * 2**24))
    with asked(bomb) as ask, pytest.raises(InputError, match=r"compressed \(gzip\)"):
        ask()


@contextmanager
def asked(behaviour, timeout=60):
    """Something to call that asks a server which does so for one token."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # the test is over
                with connection, suppress(OSError):  # the client may have gone
                    hear(connection)
                    behaviour(connection)

        threading.Thread(target=serve, daemon=True).start()
        tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        writer = ServerWriter(url=url, model="m", tokenizer=tokenizer, timeout=timeout, retries=0)
        yield lambda: writer([0, 0], [Branch(cut=1, seed=0)], Sampling(max_new_tokens=1))
        listener.shutdown(socket.SHUT_RDWR)
