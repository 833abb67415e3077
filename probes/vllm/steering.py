"""What a recipe asks of vLLM with each request."""

import base64
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reasonscope.data.errors import InputError
from reasonscope.probes.vllm.wire import decode, inline


class Shipped:
    """A hook as it travels: an expression that the server evaluates. See `steering.engine.shipping`."""

    def __init__(self, expression: str) -> None:
        self._expression = expression

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (self._expression,)


@dataclass(frozen=True, kw_only=True)
class Look:
    """A hook that reads along and changes no state: a probe on every token, or what rows of attention are reduced to.

    Attributes:
        what: What it does, for messages.
        hook: The hook's expression for a request with this many tokens of prompt.
        post: Layers whose output it is given.
        pre: Layers whose input it is given.
        reply_bytes: How long what it reports may be, beyond a few bytes for each token.
    """

    what: str
    hook: Callable[[int], str]
    post: tuple[int, ...] = ()
    pre: tuple[int, ...] = ()
    reply_bytes: int = 0

    def hooks(self, n_prompt: int) -> list[dict[str, Any]]:
        """The hooks of a request, as vllm-lens takes them."""
        return _hooks(self.hook(n_prompt), [(self.post, False), (self.pre, True)])

    def report(self, results: Any, n_before: int, url: str) -> dict[str, Any]:
        """What it reported, if `n_before` hooks come before it. Raises InputError if it failed, or was not run."""
        own = range(n_before, n_before + bool(self.post) + bool(self.pre))
        said = {key: value for one in _saved(results, own) for key, value in one.items()}
        if error := said.get("error"):
            raise InputError(f"{url} could not {self.what}: {error!s:.300}")
        if not said:
            raise InputError(
                f"{url} did not {self.what}; is vllm-lens active there (VLLM_LENS_DISABLE), and does it know this model?"
            )
        return said


@dataclass(frozen=True, kw_only=True)
class InEngine:
    """A recipe in the engine.

    Attributes:
        meta: Its name and hash, as store and traces say them.
        vectors: Vectors that act on every token, as vllm-lens takes them.
        hook: The hook's expression for a request with this many tokens of prompt; None if vectors are all.
        post: Layers whose output the hook edits.
        pre: Whether the hook edits what the first layer takes.
        prefill: Text that the thinking starts with.
        stops: Hooks that may close the thinking.
        prompts: For continuations: what was prompt when the sequences were written.
    """

    meta: Mapping[str, Any]
    vectors: tuple[Mapping[str, Any], ...] = ()
    hook: Callable[[int], str] | None = None
    post: tuple[int, ...] = ()
    pre: bool = False
    prefill: str = ""
    stops: tuple[Look, ...] = ()
    prompts: frozenset[tuple[int, ...]] = frozenset()

    def n_prompt(self, ids: list[int]) -> int:
        """How many of the tokens that a request sends are prompt; the rest was written before."""
        lengths = sorted({len(prompt) for prompt in self.prompts}, reverse=True)
        return next((n for n in lengths if tuple(ids[:n]) in self.prompts), len(ids))

    def moved_first(self) -> tuple[int, list[float]]:
        """The first layer that vectors move, and by what: their sum there."""
        layer = min(layer for vector in self.vectors for layer in vector["layer_indices"])
        sums = [
            vector["scale"] * decode(told, inline(told, ""), told["shape"], "")[vector["layer_indices"].index(layer)]
            for vector in self.vectors
            if (told := vector["activations"]) and layer in vector["layer_indices"]
        ]
        return layer, torch.stack(sums).sum(dim=0).tolist()

    @property
    def fields(self) -> dict[str, str]:
        """What `vllm_xargs` gets with each request, besides hooks."""
        return {"apply_steering_vectors": json.dumps(list(self.vectors))} if self.vectors else {}

    def hooks(self, prompt: list[int]) -> list[dict[str, Any]]:
        """The hooks of a request with this prompt, as vllm-lens takes them."""
        n_prompt = self.n_prompt(prompt)
        stops = [hook for stop in self.stops for hook in stop.hooks(n_prompt)]
        if self.hook is None:
            return stops
        return _hooks(self.hook(n_prompt), [(self.post, False), ((0,) * self.pre, True)]) + stops

    @property
    def n_hooks(self) -> int:
        """How many hooks a request has."""
        return self._n_edits + len(self.stops)

    @property
    def is_code(self) -> bool:
        """Whether hooks travel, which the server runs as code."""
        return self.n_hooks > 0

    @property
    def _n_edits(self) -> int:
        return 0 if self.hook is None else bool(self.post) + self.pre

    def check(self, results: Any, rows: int, url: str) -> int:
        """How many tokens the hook edited. Raises InputError if it failed, or did not see all `rows` at each of its layers.

        vllm-lens logs errors of hooks and goes on without them, so a text that nobody edited would look like any other.
        """
        for place, stop in enumerate(self.stops):
            stop.report(results, self._n_edits + place, url)
        if self.hook is None:
            return 0
        saved = _saved(results, range(self._n_edits))
        for one in saved:
            if error := one.get("error"):
                raise InputError(f"{url} could not steer by {self.meta.get('name')}: {error!s:.300}")
        seen = {key: value for one in saved for key, value in one.items() if isinstance(value, int)}
        places = [f"rows.{layer}" for layer in self.post] + ["rows.pre"] * self.pre
        if missing := [place for place in places if seen.get(place, 0) < rows]:
            raise InputError(
                f"{url} ran the hook of {self.meta.get('name')} on {seen.get(missing[0], 0)} of {rows} tokens at {missing[0][5:]}; "
                "is vllm-lens active there (VLLM_LENS_DISABLE), and does it know this model?"
            )
        return max((value for key, value in seen.items() if key.startswith("edited.")), default=0)


def _hooks(expression: str, places: Iterable[tuple[tuple[int, ...], bool]]) -> list[dict[str, Any]]:
    packed = base64.b64encode(pickle.dumps(Shipped(expression))).decode()
    return [
        {"fn": {"cloudpickle": packed}, "layer_indices": list(layers), "pre": pre} for layers, pre in places if layers
    ]


def _saved(results: Any, places: Iterable[int]) -> list[dict[str, Any]]:
    """What the hooks at these places of a request's list saved."""
    found = (results.get(str(place)) for place in places) if isinstance(results, dict) else ()
    return [one for one in found if isinstance(one, dict)]
