"""The hook that reduces attention inside a worker of vLLM. Its source travels to the server, with every module that it imports from here.

It is called before each layer, and from there looks once at the queries and keys that the layer's attention is given. Keys are kept
until the prompt is read; no row of attention outlives its block. Each rank reads its own heads of its own layers.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reasonscope.analysis.attention.rows.block import ScoreRule, attention_blocks
from reasonscope.analysis.attention.rows.functionals import RowFunctional, made
from reasonscope.probes.vllm.in_worker import Here, Pass, reported


class RowsHook:
    """Reduces the attention of one request's prompt, and leaves the sums of each layer in `ctx.saved` when it is read.

    Args:
        kind: The functional, one of `KINDS`.
        told: Its arguments.
        n_prompt: The tokens of the prompt.
    """

    def __init__(self, kind: str, told: Mapping[str, Any], n_prompt: int) -> None:
        self._kind, self._told, self._n_prompt = kind, told, n_prompt
        self._here: Here | None = None
        self._attentions: Mapping[int, Any] = {}
        self._first_head = 0
        self._functionals: dict[int, RowFunctional] = {}
        self._keys: dict[int, Tensor] = {}

    def __call__(self, ctx: Any, hidden: Tensor) -> None:
        with reported(ctx.saved):
            if self._here is None:
                self._here = Here.of(ctx)
                self._attentions = self._here.worker._select_qk_attention_modules()
            if ctx.layer_idx in self._attentions:
                self._look_once(ctx, ctx.layer_idx, self._here.now(len(hidden)))

    def _look_once(self, ctx: Any, layer: int, now: Pass) -> None:
        attention, saved = self._attentions[layer], ctx.saved

        def look(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            handle.remove()
            with reported(saved):
                query, key = kwargs.get("query", args[0] if args else None), kwargs.get("key", (*args, None, None)[1])
                self._read(saved, layer, now, _heads(query, attention.num_heads), _heads(key, attention.num_kv_heads))

        handle = attention.register_forward_pre_hook(look, with_kwargs=True)

    def _read(self, saved: dict[str, Any], layer: int, now: Pass, query: Tensor, key: Tensor) -> None:
        """Add the rows of this pass. `query` and `key` (token, head, d_head) hold the tokens of all requests."""
        before = self._keys.get(layer)
        done = 0 if before is None else before.shape[1]
        stop = min(now.end, self._n_prompt)
        if stop <= done or layer in _finished(saved):  # what is read again after a preemption was read before
            return
        if now.start > done:
            raise RuntimeError(f"tokens {done} to {now.start} were not read; was the prefix cache used?")
        own = slice(now.first + done - now.start, now.first + stop - now.start)
        more = key[own].transpose(0, 1)
        keys = more if before is None else torch.cat([before, more], dim=1)
        functional = self._functional(layer, query.shape[1])
        for block in attention_blocks(query[own].transpose(0, 1), keys, _rule(self._attentions[layer])):
            functional(block)
        self._keys[layer] = keys
        if stop == self._n_prompt:
            self._report(saved, layer, query.shape[1])

    def _functional(self, layer: int, n_heads: int) -> RowFunctional:
        if layer not in self._functionals:
            self._functionals[layer] = made(self._kind, self._told, 1, n_heads)
        return self._functionals[layer]

    def _report(self, saved: dict[str, Any], layer: int, n_heads: int) -> None:
        """The sums of a layer, with the number of its first head on this rank."""
        assert self._here is not None
        del self._keys[layer]
        place = f"{layer}.{_rank(self._here.worker) * n_heads}"
        for name, values in self._functionals.pop(layer).sums.items():
            saved[f"{place}.{name}"] = values[0].float().cpu()
        saved[f"{place}.rows"] = self._n_prompt


def hook_of(kind: str, told: str, n_prompt: int) -> RowsHook:
    """The hook, by arguments in JSON."""
    return RowsHook(kind, json.loads(told), n_prompt)


def _finished(saved: Mapping[str, Any]) -> set[int]:
    return {int(key.partition(".")[0]) for key in saved if key.endswith(".rows")}


def _heads(states: Any, n_heads: int) -> Tensor:
    if not isinstance(states, Tensor):
        raise RuntimeError("the attention of this model is not given queries and keys as tensors")
    return states.reshape(len(states), n_heads, -1)


def _rule(attention: Any) -> ScoreRule:
    """How the kernel turns products into attention, as vLLM has told it."""
    impl = attention.impl
    if getattr(impl, "alibi_slopes", None) is not None:
        raise RuntimeError("attention with a bias by distance (ALiBi) is not read in the engine; use --backend hooks")
    window = getattr(impl, "sliding_window", None)
    left = window - 1 if isinstance(window, int) else -1 if window is None else int(window[0])
    return ScoreRule(
        scaling=float(getattr(impl, "scale", None) or attention.head_size**-0.5),
        softcap=float(getattr(impl, "logits_soft_cap", None) or 0.0) or None,
        window=left + 1 if left >= 0 else None,
        sink=getattr(impl, "sinks", None),
    )


def _rank(worker: Any) -> int:
    """Which part of the heads this rank has."""
    parallel = getattr(worker, "parallel_config", None)
    size = int(getattr(parallel, "tensor_parallel_size", 1))
    return int(worker.rank) % size if size > 1 else 0
