"""What a recipe asks of vLLM with each request."""

import base64
import json
import pickle
from collections.abc import Callable, Mapping
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
class InEngine:
    """A recipe in the engine.

    Attributes:
        meta: Its name and hash, as store and traces say them.
        vectors: Vectors that act on every token, as vllm-lens takes them.
        hook: The hook's expression for a request with this many tokens of prompt; None if vectors are all.
        post: Layers whose output the hook edits.
        pre: Whether the hook edits what the first layer takes.
        prefill: Text that the thinking starts with.
        prompts: For continuations: what was prompt when the sequences were written.
    """

    meta: Mapping[str, Any]
    vectors: tuple[Mapping[str, Any], ...] = ()
    hook: Callable[[int], str] | None = None
    post: tuple[int, ...] = ()
    pre: bool = False
    prefill: str = ""
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

    def fields(self, prompt: list[int]) -> dict[str, str]:
        """What `vllm_xargs` gets for a request with this prompt."""
        found = {"apply_steering_vectors": json.dumps(list(self.vectors))} if self.vectors else {}
        if self.hook is None:
            return found
        packed = base64.b64encode(pickle.dumps(Shipped(self.hook(self.n_prompt(prompt))))).decode()
        places = [(list(self.post), False)] * bool(self.post) + [([0], True)] * self.pre
        hooks = [{"fn": {"cloudpickle": packed}, "layer_indices": at, "pre": pre} for at, pre in places]
        return {**found, "apply_hooks": json.dumps(hooks)}

    def check(self, results: Any, rows: int, url: str) -> int:
        """How many tokens the hook edited. Raises InputError if it failed, or did not see all `rows` at each of its layers.

        vllm-lens logs errors of hooks and goes on without them, so a text that nobody edited would look like any other.
        """
        if self.hook is None:
            return 0
        saved = [one for one in results.values() if isinstance(one, dict)] if isinstance(results, dict) else []
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
