"""What a hook of vllm-lens finds out inside a worker of vLLM. Its source travels to the server, so it imports nothing from here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@contextmanager
def reported(saved: dict[str, Any]) -> Iterator[None]:
    """Inside, the first error goes into `saved`, where the client reads it: vllm-lens would log it and go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever a hook raises on a server is told to its client
        saved.setdefault("error", f"{type(error).__name__}: {error}")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The tokens of one request in the pass that runs now.

    Attributes:
        worker: The worker of vLLM.
        row: The request's place in the batch.
        start: The position of its first token in this pass.
        first: The place of that token among those of all requests.
        n: How many of them are its own.
    """

    worker: Any
    row: int
    start: int
    first: int
    n: int

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.n

    @property
    def n_prompt(self) -> int:
        """How many tokens the request came with."""
        return int(self._batch.num_prompt_tokens[self.row])

    def followed(self, ids: list[int]) -> list[int]:
        """All tokens up to this pass and of the prompt, if `ids` were those of the pass before.

        Tokens of this pass are taken from what is fed: the batch does not know the newest yet, and a draft may have been refused.
        """
        known = max(self.n_prompt, self.start)
        if len(ids) < known:
            ids = [int(token) for token in self._batch.token_ids_cpu[self.row, :known]]
        if self.start >= self.n_prompt or self.end > len(ids):
            fed = self.worker.model_runner.input_ids.gpu[self.first : self.first + self.n]
            ids[self.start :] = [int(token) for token in fed.tolist()]
        return ids

    @property
    def _batch(self) -> Any:
        return self.worker.model_runner.input_batch


@dataclass(frozen=True, kw_only=True)
class Here:
    """Where the hook of one request runs.

    Attributes:
        worker: The worker of vLLM.
        request: The request.
    """

    worker: Any
    request: str

    @classmethod
    def of(cls, ctx: Any) -> "Here":
        """What surrounds a hook that is called with the context `ctx`, which belongs to one request until it ends."""
        worker = _worker_of(ctx.model)
        return cls(worker=worker, request=_request_of(worker, ctx))

    def now(self, n: int) -> Pass:
        """The pass that runs, in which the hook is given the states of `n` tokens."""
        runner = self.worker.model_runner
        row = runner.input_batch.req_id_to_index[self.request]
        return Pass(
            worker=self.worker,
            row=row,
            start=int(runner.input_batch.num_computed_tokens_cpu[row]),
            first=int(runner.query_start_loc.np[row]),
            n=n,
        )

    def is_pre(self, ctx: Any) -> bool:
        """Whether the context belongs to a hook on the input of a layer."""
        place = next(i for i, known in self.worker._hook_contexts[self.request].items() if known is ctx)
        named = (hooks for key, hooks in self.worker._hook_data.items() if self.request.startswith(f"{key}-"))
        hooks: Sequence[Any] = next(named, ())
        return bool(hooks and hooks[place].pre)


def _worker_of(model: Any) -> Any:
    """The worker of vLLM, which vllm-lens' hooks on the layers know; hooks themselves are given the model only."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            for cell in getattr(hook, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "model_runner") and hasattr(cell.cell_contents, "_hook_contexts"):
                    return cell.cell_contents
    raise RuntimeError("no hook of vllm-lens knows the worker; this version of vllm-lens is not known")


def _request_of(worker: Any, ctx: Any) -> str:
    """The request whose context this is."""
    for request, contexts in worker._hook_contexts.items():
        if any(known is ctx for known in contexts.values()):
            return str(request)
    raise RuntimeError("the request of this context is not known to the worker")
