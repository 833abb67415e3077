"""The hook that steers inside a worker of vLLM. Its source travels to the server, with every module that it imports from here.

It reads the tokens of each pass from the worker's own batch, which every rank has with tensor and with pipeline parallelism, and decides by
`Scope` and the operators, as the edits of this process do.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.text.think_tags import ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.probes.vllm.in_worker import Here, Pass, reported
from reasonscope.steering.recipes.description import operator_for, scope_with
from reasonscope.steering.vectors.operators import Operator
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.token_regions import ThinkTokenIds

_tokenizers: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class _EnginePart:
    """One direction at one site, as it acts."""

    layer: int
    pre: bool
    direction: Tensor
    operator: Operator
    scope: Scope
    strength: float


class EngineHook:
    """Edits the states of one request at the layers of its recipe, and notes in `ctx.saved` what it saw, what it edited, and errors.

    Args:
        told: The recipe in JSON (`engine_recipe`).
        n_prompt: How many tokens of the request are prompt; the others were written before.
    """

    def __init__(self, told: str, n_prompt: int) -> None:
        self._told: Mapping[str, Any] = json.loads(told)
        self._n_prompt = n_prompt
        self._here: Here | None = None
        self._parts: list[_EnginePart] = []
        self._ids: list[int] = []
        self._pass: tuple[int, int] | None = None
        self._masks: dict[int, Tensor] = {}

    def __call__(self, ctx: Any, hidden: Tensor) -> Tensor | None:
        with reported(ctx.saved):
            return self._edited(ctx, hidden)
        return None

    def _edited(self, ctx: Any, hidden: Tensor) -> Tensor | None:
        if self._here is None:
            self._here = Here.of(ctx)
            self._parts = _parts_of(self._told, self._here.worker, hidden)
        start = self._follow(self._here.now(len(hidden)))
        # A hook on what the first layer takes has a context of its own, in which nothing else is called.
        pre = bool(ctx.saved.get("pre", ctx.layer_idx == 0 and self._here.is_pre(ctx)))
        ctx.saved["pre"] = pre
        place = "pre" if pre else str(ctx.layer_idx)
        _count(ctx, f"rows.{place}", len(hidden))
        after, n_edited = hidden, 0
        for i, part in enumerate(self._parts):
            if part.pre == pre and part.layer == ctx.layer_idx:
                mask = self._mask(i, part.scope, start, len(hidden))
                n_edited += int(mask.sum())
                after = _applied(part, after, mask)
        _count(ctx, f"edited.{place}", n_edited)
        return None if after is hidden else after

    def _follow(self, now: Pass) -> int:
        """Note the tokens of this pass; gives the position of the first."""
        if self._pass != (now.start, now.n):
            self._pass, self._masks = (now.start, now.n), {}
            self._ids = now.followed(self._ids)
        return now.start

    def _mask(self, i: int, scope: Scope, start: int, n: int) -> Tensor:
        if i not in self._masks:
            same = next((j for j in self._masks if self._parts[j].scope is scope), None)
            self._masks[i] = self._masks[same] if same is not None else self._chosen(scope, start, n)
        return self._masks[i]

    def _chosen(self, scope: Scope, start: int, n: int) -> Tensor:
        given = torch.tensor([self._n_prompt])
        if scope.is_local:
            ids = torch.tensor([self._ids[start : start + n]])
            return scope.local_mask(ids, torch.arange(start, start + n)[None], given)[0]
        last = len(self._ids) - start
        return scope.mask(torch.tensor([self._ids]), n_prompt=given, last=last)[0, :n]


def _parts_of(told: Mapping[str, Any], worker: Any, states: Tensor) -> list[_EnginePart]:
    """The parts of a recipe, with directions where `states` are. Parts with one scope share the object, and so its mask."""
    marks = think_token_ids(told["marks"], worker) if told.get("marks") else None
    scopes = {text: scope_with(json.loads(text), marks) for text in {json.dumps(p["scope"]) for p in told["parts"]}}
    return [
        _EnginePart(
            layer=part["layer"],
            pre=part["pre"],
            direction=_direction(part["direction"]).to(_wide(states)),
            operator=operator_for(part["operator"]),
            scope=scopes[json.dumps(part["scope"])],
            strength=float(part["strength"]),
        )
        for part in told["parts"]
    ]


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """What two tokenizers have in common that decode alike."""
    return sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def _applied(part: _EnginePart, states: Tensor, mask: Tensor) -> Tensor:
    """As `Steering` does: in float32 at least, on the chosen rows alone."""
    if part.strength == 0 or not mask.any():
        return states
    chosen = mask.to(states.device)
    moved = part.operator(_wide(states[chosen]), part.direction, part.strength).to(states.dtype)
    if not moved.isfinite().all():
        raise ValueError(f"a strength of {part.strength:g} takes layer {part.layer} beyond what {states.dtype} holds")
    after = states.clone()
    after[chosen] = moved
    return after


def _wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


def _direction(packed: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(base64.b64decode(packed)), dtype="<f4"))


def think_token_ids(told: Mapping[str, Any], worker: Any) -> ThinkTokenIds:
    by_text = told.get("by_text")
    tags = ThinkTags(**by_text["tags"]) if by_text and by_text.get("tags") else None
    return ThinkTokenIds(
        opens=tuple(told["opens"]),
        closes=tuple(told["closes"]),
        separators=frozenset(told["separators"]),
        newlines=frozenset(told["newlines"]),
        blanks=frozenset(told["blanks"]),
        tokenizer=_tokenizer(worker, told["vocabulary"]) if told["reads_text"] else None,
        by_text=Thinking(**{**by_text, "tags": tags}) if by_text else None,
    )


def _tokenizer(worker: Any, expected: str) -> Any:
    """The tokenizer that the server has itself. Raises ValueError if its vocabulary is another one."""
    config = worker.model_config
    if expected not in _tokenizers:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(config.tokenizer, revision=getattr(config, "tokenizer_revision", None))
        backend = found.backend_tokenizer
        if vocabulary_hash(backend.get_vocab(with_added_tokens=True)) != expected:
            raise ValueError(f"the server's tokenizer {config.tokenizer} has another vocabulary than the client's")
        _tokenizers[expected] = backend
    return _tokenizers[expected]


def _count(ctx: Any, name: str, n: int) -> None:
    ctx.saved[name] = ctx.saved.get(name, 0) + n
