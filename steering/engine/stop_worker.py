"""The hook that reads a probe on every token inside a worker of vLLM, and closes the thinking. Its source travels to the server.

It decides in the pass of the newest token, and leaves the sampler no choice but the next token of the closing: as `ProbeMonitor` and
`ExitControl` do here, with the same modules.
"""

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reasonscope.probes.vllm.in_worker import Here, Pass, reported
from reasonscope.steering.decoding.closing import Closing, forced
from reasonscope.steering.engine.worker import think_token_ids
from reasonscope.steering.exits.places import MASKS, Places
from reasonscope.steering.vectors.thinking import WrittenThinking

_ROW = 0  # of the one sequence that a hook follows


class StopHook:
    """Reads each token of one request, and reports its scores, and the token at which it stopped, in `ctx.saved`.

    Args:
        told: What to read, and when to stop, in JSON (`stop_told`).
        n_prompt: The tokens of the request's prompt.
    """

    def __init__(self, told: str, n_prompt: int) -> None:
        self._told: Mapping[str, Any] = json.loads(told)
        self._n_prompt = n_prompt
        self._coef = torch.from_numpy(np.frombuffer(bytearray(base64.b64decode(self._told["coef"])), dtype="<f8"))
        self._here: Here | None = None
        self._stop: _Stop | None = None
        self._ids: list[int] = []
        self._scores: list[float] = []
        self._decided = 0  # tokens after which was decided; what is read again after a preemption is not decided again

    def __call__(self, ctx: Any, hidden: Tensor) -> None:
        with reported(ctx.saved):
            if self._here is None:
                self._here = Here.of(ctx)
                self._stop = _stop_of(self._told, self._here.worker)
            self._read(ctx.saved, self._here.now(len(hidden)), hidden)

    def _read(self, saved: dict[str, Any], now: Pass, hidden: Tensor) -> None:
        rank = int(getattr(now.worker, "rank", 0))  # vllm-lens would join lists of the same name
        del self._scores[now.start :]
        if len(self._coef):
            self._scores += self._score(hidden).tolist()
            saved[f"scores.{rank}"] = self._scores
        saved[f"rows.{rank}"] = now.end
        if self._stop is None:
            return
        self._ids = now.followed(self._ids)
        if now.end < len(self._ids) or now.end <= self._decided:
            return
        self._decided = now.end
        token = self._stop.token(self._ids, self._scores[self._n_prompt - 1 :])
        saved[f"stopped.{rank}"] = self._stop.stopped
        if token is not None:
            _force(now, token, saved)

    def _score(self, hidden: Tensor) -> Tensor:
        """As the monitor here, in float32, or as the exit rule here, in float64."""
        if self._coef.device != hidden.device:
            self._coef = self._coef.to(hidden.device)
        exact = bool(self._told["stop"] and self._told["stop"]["rule"])
        read = hidden.double() @ self._coef if exact else hidden.float() @ self._coef.float()
        scores = read + self._told["intercept"]
        found: Tensor = scores.sigmoid() if self._told["binary"] else scores
        return found


class _Stop:
    """When the thinking of one sequence is closed."""

    def __init__(self, told: Mapping[str, Any], worker: Any) -> None:
        self._told = told
        thinking = _thinking(told["thinking"], worker)
        self._thinking, self._closing = thinking, Closing(thinking, told["closing"])
        self._places = _places(told["places"], thinking) if told["places"] else None
        self._last_place = 0
        self.stopped: int | None = None

    def token(self, ids: list[int], scores: list[float]) -> int | None:
        """The token that has to come next, if any; `scores` are those of the tokens from the last of the prompt on."""
        row = torch.tensor([ids])
        if _ROW not in self._closing and not self._reached(ids, scores, row):
            return None
        written = int(self._thinking.written(row)[0])
        if _ROW not in self._closing and self._may_stop(written):
            self._closing.begin(_ROW, written)
            self.stopped = written if self.stopped is None else self.stopped
        return self._closing.due(_ROW, written)

    def _reached(self, ids: list[int], scores: list[float], row: Tensor) -> bool:
        """Whether the number is reached, and this is a place at which the thinking may stop."""
        if self._told["rule"] is None:
            recent = scores[-self._told["window"] :]
            passed = len(recent) == self._told["window"] and float(torch.tensor(recent).mean()) > self._told["above"]
            return passed and (self._places is None or bool(self._places.ended(row)[0]))
        assert self._places is not None
        if self.stopped is not None or not self._places.ended(row)[0]:
            return False
        spent = self._places.written(ids)
        if spent < self._places.every + self._last_place:
            return False
        self._last_place = spent
        number = float(spent) if self._told["rule"] == "fixed budget" else round(scores[-1], 4)
        return bool(number >= self._told["above"])

    def _may_stop(self, written: int) -> bool:
        return written >= (self._told["window"] if self._told["rule"] is None else 0)


def _stop_of(told: Mapping[str, Any], worker: Any) -> _Stop | None:
    if told["stop"] is None:
        return None
    parallel = getattr(worker, "parallel_config", None)
    if int(getattr(parallel, "pipeline_parallel_size", 1)) > 1:
        raise RuntimeError("the rank that reads the probe does not sample if the model is served pipeline-parallel")
    return _Stop(told["stop"], worker)


def _force(now: Pass, token: int, saved: dict[str, Any]) -> None:
    """Leave the sampler of this pass no other token for this request."""
    processor = _logits_processor(now.worker.model_runner.model)

    def write(_: Any, __: Any, logits: Tensor | None) -> Tensor | None:
        handle.remove()
        if logits is None:  # on a rank that does not sample
            return None
        if logits.shape[0] <= now.row:
            saved.setdefault(
                "error", f"RuntimeError: logits of {logits.shape[0]} rows, and row {now.row} is to be closed"
            )
            return None
        return forced(logits, now.row, token)

    handle = processor.register_forward_hook(write)


def _logits_processor(model: nn.Module) -> nn.Module:
    """The module that makes logits, one row per request."""
    found: list[nn.Module] = [
        module for name, module in model.named_modules() if name.rpartition(".")[2] == "logits_processor"
    ]
    if len(found) != 1:
        raise RuntimeError(f"{type(model).__name__} has {len(found)} modules called logits_processor, and not one")
    return found[0]


def _thinking(told: Mapping[str, Any], worker: Any) -> WrittenThinking:
    return WrittenThinking(
        opens=told["opens"],
        closes=told["closes"],
        given=told["given"],
        closing=tuple(told["closing"]),
        header=tuple(told["header"]),
        marks=think_token_ids(told["marks"], worker) if told["marks"] else None,
    )


def _places(told: Mapping[str, Any], thinking: WrittenThinking) -> Places:
    masks = {name: _unpacked(told[name], told["vocabulary"]) for name in MASKS}
    return Places(thinking=thinking, every=told["every"], kind=told["kind"], **masks)


def _unpacked(packed: str, n: int) -> Tensor:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=n).astype(bool))
