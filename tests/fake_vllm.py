"""A server with the HTTP interface of vLLM 0.32 and vllm-lens 1.3, on a model of this process: for tests that need neither.

What it does with rows, chunks, hooks, handles and the prefix cache is what the real ones were seen to do (docs/log.md). Its `lie` makes it
do otherwise.
"""

import base64
import copy
import json
import pickle
import secrets
import threading
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zstandard
from transformers import DynamicCache

from reasonscope.analysis.attention.blocks import attending
from reasonscope.analysis.attention.rows.block import attention_blocks


class Attention(torch.nn.Module):
    """vLLM's attention of a layer, which is given the queries and keys of all requests."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.hidden_size // self.num_heads
        self.impl = SimpleNamespace(
            scale=self.head_size**-0.5, logits_soft_cap=0.0, sliding_window=(-1, -1), alibi_slopes=None
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> None:
        assert query.shape[1] == self.num_heads * self.head_size
        assert key.shape[1] == self.num_kv_heads * self.head_size


class LogitsProcessor(torch.nn.Module):
    """Where vLLM makes the logits of all requests."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def served(hf: Any) -> Any:
    """A copy of the model as vLLM has it, so that no client meets the server's hooks."""
    found = copy.deepcopy(hf)
    found.logits_processor = LogitsProcessor()
    return found


class Worker:
    """As much of vLLM's worker, with the extension of vllm-lens, as hooks can see."""

    def __init__(self, hf: Any, tokenizer_folder: str) -> None:
        self.hf, self.model_config = hf, SimpleNamespace(tokenizer=tokenizer_folder, tokenizer_revision=None)
        self._hook_contexts: dict[str, dict[int, Any]] = {}
        self._hook_data: dict[str, list[Any]] = {}
        self.now: Any = None  # the request of the pass
        self.attentions = {i: Attention(hf.config) for i in range(hf.config.num_hidden_layers)}
        self.model_runner = SimpleNamespace(model=hf, input_batch=None)

    def _select_qk_attention_modules(self) -> dict[int, Attention]:
        return self.attentions

    def attend(self, call: Any) -> torch.Tensor:
        """One layer's attention of the tokens of this pass, of which another request has the first three."""
        n = call.query.shape[2]
        flat = [states[0, :, -n:].transpose(0, 1).flatten(1) for states in (call.query, call.key)]
        self.attentions[call.layer](*(torch.cat([states.new_zeros(3, states.shape[1]), states]) for states in flat))
        blocks = attention_blocks(call.query[0], call.key[0], call.rule)
        groups = len(call.query[0]) // len(call.value[0])
        value = call.value[0].repeat_interleave(groups, dim=0)
        return torch.cat([one.probabilities @ value[:, one.keys.slice] for one in blocks], dim=1)[None]

    def begin(self, request: Any, start: int, ids: list[int]) -> None:
        other = 3  # another request comes first in the batch, so rows and offsets are not 0
        tokens = np.zeros((2, 4096), dtype=np.int64)
        tokens[1, : len(request.ids)] = request.ids
        self.now = request
        self.model_runner.input_batch = SimpleNamespace(
            req_id_to_index={"other-1": 0, request.name: 1},
            num_computed_tokens_cpu=np.array([9, start]),
            num_prompt_tokens=np.array([9, request.n_prompt]),
            token_ids_cpu=tokens,
        )
        self.model_runner.query_start_loc = SimpleNamespace(np=np.array([0, other, other + len(ids)]))
        self.model_runner.input_ids = SimpleNamespace(gpu=torch.tensor([0] * other + ids))

    def run(self, layer: int, hidden: torch.Tensor, *, pre: bool) -> torch.Tensor:
        request = self.now
        for place, hook in enumerate(request.hooks):
            if hook["pre"] != pre or layer not in hook["layers"]:
                continue
            contexts = self._hook_contexts.setdefault(request.name, {})
            ctx = contexts.setdefault(place, SimpleNamespace(saved={}, layer_idx=0, seq_len=0, model=self.hf))
            ctx.layer_idx, ctx.seq_len = layer, len(hidden)
            try:
                found = hook["fn"](ctx, hidden)
            except Exception:  # noqa: BLE001  # as vllm-lens does
                return hidden
            hidden = hidden if found is None else found
        return hidden


class Engine:
    """One model, one request at a time, greedy; prompts are read `chunk` tokens at a time."""

    def __init__(self, hf: Any, tokenizer: Any, folder: str, *, chunk: int = 7) -> None:
        self.hf, self.tokenizer, self.chunk = served(hf), tokenizer, chunk
        self.worker, self.lock = Worker(self.hf, folder), threading.Lock()
        self.lie, self.asked, self.kept = "", [], {}
        self.name, self.started = "m", 1000.0
        self.keep_at_most = 512

    @contextmanager
    def hooked(self) -> Any:
        """vllm-lens' hooks on every layer; their closures know the worker, as the real ones' do."""
        handles, worker = [], self.worker
        for layer, block in enumerate(self.hf.model.layers):

            def after(_: Any, __: Any, output: Any, layer: int = layer) -> Any:
                return self._after(worker, layer, output)

            def before(_: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                moved = worker.run(layer, hidden[0], pre=True)[None]
                return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

            handles.append(block.register_forward_hook(after))
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after(self, worker: Worker, layer: int, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        request, states = worker.now, hidden[0]
        for vector in request.vectors:
            if layer in vector["layer_indices"] and self.lie != "no vectors":
                add = vector["values"][vector["layer_indices"].index(layer)] * vector.get("scale", 1.0)
                states = states + add
        states = worker.run(layer, states, pre=False)
        if layer in request.wanted:
            request.rows.setdefault(layer, []).append(states.clone())
        moved = states[None]
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def write(self, body: dict[str, Any]) -> Any:
        told = body.get("vllm_xargs", {})
        hooks = [
            {
                "fn": pickle.loads(base64.b64decode(hook["fn"]["cloudpickle"])),  # noqa: S301  # what vllm-lens does
                "layers": hook["layer_indices"],
                "pre": hook["pre"],
            }
            for hook in json.loads(told.get("apply_hooks", "[]"))
        ]
        name = f"cmpl-{secrets.token_hex(4)}"
        request = SimpleNamespace(
            name=f"{name}-0", ids=list(body["prompt"]), n_prompt=len(body["prompt"]), hooks=hooks, rows={},
            wanted=json.loads(told.get("output_residual_stream", "[]")), vectors=json.loads(told.get("apply_steering_vectors", "[]")),
        )  # fmt: skip
        for vector in request.vectors:
            raw = np.frombuffer(base64.b64decode(vector["activations"]["data"]), dtype=np.float32)
            vector["values"] = torch.from_numpy(raw.reshape(vector["activations"]["shape"]).copy())
        self.worker._hook_data[name] = [SimpleNamespace(pre=hook["pre"]) for hook in hooks]
        reads = attending(self.hf, self.worker.attend) if any(hook["pre"] for hook in hooks) else nullcontext()
        with self.lock, torch.no_grad(), self.hooked(), reads:
            self._generate(request, body["max_tokens"])
        request.saved = {str(i): ctx.saved for i, ctx in self.worker._hook_contexts.pop(request.name, {}).items()}
        self.worker._hook_data.pop(name)
        return request

    def _generate(self, request: Any, most: int) -> None:
        cache, start, end = DynamicCache(config=self.hf.config), 0, request.n_prompt + most
        while len(request.ids) < end:
            fed = request.ids[start : min(start + self.chunk, len(request.ids))]
            at = {"preempted": request.n_prompt + 2, "preempted early": 2 * self.chunk}.get(self.lie)
            if start == at:
                self.lie, cache, start = "", DynamicCache(config=self.hf.config), 0
                continue
            self.worker.begin(request, start, fed)
            logits = self.hf(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True).logits
            start += len(fed)
            if start == len(request.ids):
                every = torch.stack([torch.zeros_like(logits[0, -1]), logits[0, -1]])  # the other request comes first
                request.ids.append(int(self.hf.logits_processor(every)[1].argmax()))
                if request.ids[-1] == self.tokenizer.eos_token_id:
                    return

    def tensors(self, request: Any, transport: str) -> dict[str, Any]:
        rows = len(request.ids) - 1
        stacked = torch.stack([torch.cat(request.rows[layer])[:rows] for layer in sorted(request.rows)])
        if self.lie == "shape":
            stacked = stacked[:, 1:]
        if self.lie == "nan":
            stacked[0, -1, 0] = float("nan")
        packed = zstandard.ZstdCompressor(level=1).compress(stacked.numpy().tobytes())
        told = {
            "dtype": "float32",
            "original_dtype": "torch.float32",
            "shape": list(stacked.shape),
            "compression": "zstd",
        }
        if self.lie == "longer":
            packed = zstandard.ZstdCompressor(level=1).compress(bytes(2 * stacked.nbytes))
        if transport != "binary":
            return {"residual_stream": {"data": base64.b64encode(packed).decode(), **told}}
        handle = secrets.token_urlsafe(24)
        self.kept[handle] = packed
        while len(self.kept) > self.keep_at_most:  # the oldest goes, as in vllm-lens
            self.kept.pop(next(iter(self.kept)))
        return {"residual_stream": {"handle": handle, "nbytes": len(packed), "transport": "binary", **told}}

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        request = self.write(body)
        ids = request.ids[request.n_prompt :]
        told = list(reversed(ids)) if self.lie == "ids" else ids
        decode = self.tokenizer.backend_tokenizer.decode
        ended = ids[-1] == self.tokenizer.eos_token_id
        choice = {
            "text": decode(ids[:-1] if ended else ids, skip_special_tokens=False),
            "token_ids": told,
            "prompt_token_ids": body["prompt"],
            "finish_reason": "stop" if ended else "length",
        }
        found: dict[str, Any] = {"choices": [choice], "model": self.name}
        if request.rows and self.lie != "no lens":
            found["activations"] = self.tensors(request, body["vllm_xargs"].get("activations_transport", ""))
        if request.hooks and self.lie != "no lens":
            found["hook_results"] = {place: _in_json(saved) for place, saved in request.saved.items()}
        return found


def _in_json(saved: dict[str, Any]) -> dict[str, Any]:
    """What a hook saved, as vllm-lens sends it."""
    return {key: _tensor(value) if isinstance(value, torch.Tensor) else value for key, value in saved.items()}


def _tensor(value: torch.Tensor) -> dict[str, Any]:
    packed = zstandard.ZstdCompressor(level=1).compress(value.contiguous().numpy().tobytes())
    kind = str(value.dtype)
    told = {"dtype": kind.removeprefix("torch."), "original_dtype": kind, "shape": list(value.shape)}
    return {"__type__": "tensor", "data": base64.b64encode(packed).decode(), "compression": "zstd", **told}


class Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        engine: Engine = self.server.engine  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine.asked.append(body)
        if engine.lie == "dead" or (
            engine.lie.startswith("dies after") and len(engine.asked) > int(engine.lie.split()[2])
        ):
            self.close_connection = True
            return
        self.answer(200, json.dumps(engine.reply(body)).encode())

    def do_GET(self) -> None:
        engine: Engine = self.server.engine  # type: ignore[attr-defined]
        handle = self.path.removeprefix("/v1/activations/")
        if self.path == "/metrics":
            self.answer(200, f"process_start_time_seconds {engine.started}\n".encode())
        elif handle in engine.kept:
            self.answer(200, engine.kept[handle])
        else:
            self.answer(404, b"{}")

    def answer(self, status: int, payload: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(engine: Engine) -> Any:
    """The address of a server of `engine`."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    http.engine = engine  # type: ignore[attr-defined]
    http.daemon_threads = False
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
