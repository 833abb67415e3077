"""Completions by vLLM with the activations that it had while it wrote, as they are finished, and no more of them than the store takes."""

import asyncio
import json
import queue
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.trace import FinishReason, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.server.completions import ServerWriter, completion, server_writer
from reasonscope.probes.vllm.address import check_address
from reasonscope.probes.vllm.steering import InEngine, Look
from reasonscope.probes.vllm.wire import check_shape, decode, inline

# A finished completion: its number, its tokens, and its activations by site.
Written: TypeAlias = tuple[int, Completion, dict[Site, Tensor]]
_ByLayer: TypeAlias = tuple[int, Completion, dict[int, Tensor]]
_HANDLE = re.compile(r"[\w-]{1,200}")
_PAUSE = 0.005  # seconds between two looks at a full queue
_LONGEST_PAUSE = 8.0


@dataclass(frozen=True, kw_only=True)
class Seen(Completion):
    """A completion with what a hook that read along reported, in JSON."""

    report: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class VllmWriter(ServerWriter):
    """Writes with vLLM, and reads the residual stream while it writes, by the plugin vllm-lens; it can steer by a recipe, too.

    A prompt is read without the prefix cache if its activations are wanted or a recipe acts, so every row is there, also of tokens that
    the cache holds. Requests with a recipe get a cache salt of their own, because the keys and values that they leave in the prefix
    cache are steered. At most `workers` completions are being written, and as many wait to be taken.

    Attributes:
        n_layers: Layers of the model.
        width: Width of its residual stream.
        steering: A recipe in the engine, or None.
        look: A hook that reads along, or None; what it reports is that of the completion.
    """

    n_layers: int
    width: int
    steering: InEngine | None = None
    look: Look | None = None

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], sites: Sequence[Site] = ()
    ) -> Iterator[Written]:
        """Completions in the order in which they are finished, each with its activations (prompt + generated − 1, width).

        Raises:
            SiteError: For a site that vllm-lens does not read.
            InputError: If the server cannot be reached, lies, or loses activations again and again.
        """
        layers = self.layers(sites)
        asked = [list(map(int, prompt)) for prompt in prompts]
        if not asked:
            return
        tokens = max(map(len, asked)) + sampling.max_new_tokens
        if self.look is not None:
            tokens += self.look.reply_bytes // 1024

        async def written(put: Callable[[_ByLayer], Any]) -> None:
            room = asyncio.Semaphore(self.workers)

            async def one(i: int) -> None:
                async with room:
                    await put((i, *await self._read(ask, fetch, asked[i], seeds[i], sampling, layers)))

            async with self._client(tokens) as ask, self._fetching() as fetch, asyncio.TaskGroup() as tasks:
                for i in range(len(asked)):
                    tasks.create_task(one(i))

        for i, done, states in _taken(written, self.workers):
            yield i, done, {site: states[at] for site, at in layers.items()}

    def layers(self, sites: Sequence[Site]) -> dict[Site, int]:
        """The layer whose output is each site. Raises SiteError for a site that vllm-lens does not read."""
        found = {}
        for site in sites:
            layer = {"resid_post": site.layer, "resid_pre": site.layer - 1}.get(site.point, -1)
            if not 0 <= layer < self.n_layers:
                raise SiteError(
                    f"vLLM gives no {site}: it gives resid_post.0 to resid_post.{self.n_layers - 1} and resid_pre from layer 1; "
                    "read others with --backend hooks"
                )
            found[site] = layer
        return found

    @property
    def plain(self) -> "VllmWriter":
        """The same writer without a recipe, and with nothing that reads along."""
        return replace(self, steering=None, look=None)

    @cached_property
    def takes_ids(self) -> bool:
        """vLLM does."""
        return True

    @property
    def _setting(self) -> tuple[str, ...]:
        return () if self.steering is None else (str(self.steering.meta["hash"]),)

    async def _one(
        self, ask: Any, prompt: list[int], sent: str | list[int], seed: int, sampling: Sampling
    ) -> tuple[list[int], FinishReason]:
        reply = await ask(sent, seed, sampling, self._more(prompt, ()))
        found = self._checked(prompt, reply, sampling)
        self._check_steering(reply, len(prompt) + len(found[0]) - 1)
        return found

    def _more(self, prompt: list[int], layers: Sequence[int]) -> dict[str, Any]:
        """What a request says besides OpenAI's fields."""
        told: dict[str, str] = {} if self.steering is None else self.steering.fields
        if hooks := self._hooks(prompt):
            told = {**told, "apply_hooks": json.dumps(hooks)}
        if layers:
            told |= {"output_residual_stream": json.dumps(sorted(set(layers))), "activations_transport": "binary"}
        salt = {} if self.steering is None else {"cache_salt": f"reasonscope {self.steering.meta['hash']}"}
        return {**({"vllm_xargs": told} if told else {}), **salt}

    def _hooks(self, prompt: list[int]) -> list[dict[str, Any]]:
        steering = [] if self.steering is None else self.steering.hooks(prompt)
        return steering + ([] if self.look is None else self.look.hooks(len(prompt)))

    def _reported(self, reply: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the hook that reads along reports."""
        if self.look is None:
            return {}
        n_before = 0 if self.steering is None else self.steering.n_hooks
        return self.look.report(reply.get("hook_results"), n_before, self.url)

    def _check_steering(self, reply: Mapping[str, Any], rows: int) -> None:
        if self.steering is not None:
            self.steering.check(reply.get("hook_results"), rows, self.url)

    async def _read(
        self, ask: Any, fetch: Any, prompt: list[int], seed: int, sampling: Sampling, layers: Mapping[Site, int]
    ) -> tuple[Completion, dict[int, Tensor]]:
        """One completion with the outputs of layers; asked for again if its activations were lost or are not its own."""
        wanted = sorted(set(layers.values()))
        lost = ""
        for attempt in range(1 + self.retries):
            if attempt:
                await asyncio.sleep(min(0.5 * 2**attempt, _LONGEST_PAUSE))
            reply = await ask(prompt, seed, sampling, self._more(prompt, wanted))
            written, finish = self._checked(prompt, reply, sampling)
            rows = len(prompt) + len(written) - 1
            self._check_steering(reply, rows)
            done = _seen(completion(prompt, written, finish), self._reported(reply))
            if not wanted:
                return done, {}
            try:
                states = await self._states(fetch, reply, (len(wanted), rows, self.width))
            except _LostError as error:
                lost = str(error)
                continue
            if not _begins_again(states[0], [*prompt, *written]):
                return done, dict(zip(wanted, states, strict=True))
            lost = "the engine ran out of cache memory and read a sequence again, whose rows vllm-lens then mixes"
        raise InputError(
            f"{self.url} gave no activations in {1 + self.retries} tries: {lost}; send fewer requests at a time (--requests), or give the "
            "server more memory (VLLM_LENS_ACT_MAX_BYTES, the cache of keys and values)"
        )

    async def _states(self, fetch: Any, reply: Mapping[str, Any], shape: tuple[int, int, int]) -> Tensor:
        found = reply.get("activations")
        told = found.get("residual_stream") if isinstance(found, dict) else None
        if not isinstance(told, dict):
            raise InputError(
                f"{self.url} sent no activations; install vllm-lens in the environment of the server (see docs/scale.md)"
            )
        size = check_shape(told, shape, self.url)
        packed = await fetch(told["handle"], size) if "handle" in told else inline(told, self.url)
        return decode(told, packed, shape, self.url)

    @asynccontextmanager
    async def _fetching(self) -> AsyncIterator[Any]:
        """A function from a handle and the size of what it stands for to its bytes."""
        import httpx2

        headers = {"Accept-Encoding": "identity", "Authorization": f"Bearer {self.key or 'none'}"}
        async with httpx2.AsyncClient(headers=headers, timeout=self.timeout) as client:

            async def fetch(handle: Any, size: int) -> bytes:
                if not isinstance(handle, str) or not _HANDLE.fullmatch(handle):
                    raise InputError(f"{self.url} sent an invalid handle {handle!r:.60}")
                packed = bytearray()
                try:
                    async with client.stream("GET", f"{self.url.rstrip('/')}/v1/activations/{handle}") as reply:
                        if reply.status_code != 200:
                            raise _LostError(f"it has no activations for its own handle any more ({reply.status_code})")
                        async for piece in reply.aiter_raw():
                            packed += piece
                            if len(packed) > size + size // 64 + 2**16:
                                raise InputError(f"{self.url} sent more bytes of activations than were asked for")
                except httpx2.HTTPError as error:
                    raise _LostError(f"the connection broke ({error or type(error).__name__})") from error
                return bytes(packed)

            yield fetch


def vllm_writer(
    url: str,
    model: Prompting,
    *,
    steering: InEngine | None = None,
    look: Look | None = None,
    trusted: bool = False,
    **how: Any,
) -> VllmWriter:
    """The writer for `model` in vLLM at `url`, with the options of `server_writer`.

    Args:
        url: Address of the server, without /v1.
        model: What is known of the model here; its weights are not needed.
        steering: A recipe in the engine.
        look: A hook that reads along.
        trusted: Send hooks, which the server runs as code, to an address that is not of this machine.
        **how: Options of `server_writer`.

    Returns:
        A writer.

    Raises:
        InputError: For an address outside this machine, if `steering` or `look` sends code and it is not `trusted`.
    """
    if look is not None or (steering is not None and steering.is_code):
        check_address(url, trusted=trusted)
    plain = server_writer(url, model, **how)
    text = model.config.get_text_config()
    known = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return VllmWriter(**known, n_layers=model.n_layers, width=int(text.hidden_size), steering=steering, look=look)


def _seen(done: Completion, report: Mapping[str, Any]) -> Completion:
    known = {told.name: getattr(done, told.name) for told in fields(done)}
    return Seen(**known, report=report) if report else done


class _LostError(Exception):
    """Activations that the server promised and no longer has."""


def _begins_again(states: Tensor, ids: Sequence[int]) -> bool:
    """Whether the first three rows come a second time although they belong to other tokens, as after a preemption.

    vllm-lens appends the rows of every pass, so those of a sequence that was read twice come twice, and the last ones are cut off.
    """
    n = 3
    if len(states) <= n:
        return False
    rows = states.float()
    near = [((rows[i:] - rows[i]).abs().amax(dim=1) <= 1e-4 * rows[i].abs().max()) for i in range(n)]
    room = len(rows) - n
    again = torch.stack([row[1 : room + 1] for row in near]).all(dim=0)
    return any(list(ids[at : at + n]) != list(ids[:n]) for at in (again.nonzero()[:, 0] + 1).tolist())


def _taken(work: Callable[[Any], Any], room: int) -> Iterator[Any]:
    """What `work` puts, one by one, from an event loop in a thread of its own; it waits while `room` of them are not taken."""
    out: queue.Queue[Any] = queue.Queue(maxsize=room)
    stopped = threading.Event()

    async def put(found: Any) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                out.put_nowait((True, found))
                return
            await asyncio.sleep(_PAUSE)

    async def until_stopped() -> None:
        task = asyncio.ensure_future(work(put))
        while not stopped.is_set() and not task.done():
            await asyncio.wait([task], timeout=0.2)
        if not task.done():
            task.cancel()
        await task

    def run() -> None:
        end: BaseException | None = None
        try:
            asyncio.run(until_stopped())
        except BaseException as error:  # noqa: BLE001  # handed to the thread that reads
            end = error
        while not stopped.is_set():
            with suppress(queue.Full):
                out.put((False, end), timeout=0.2)
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            more, found = out.get()
            if not more:
                break
            yield found
    finally:
        stopped.set()
        thread.join()
    if found is not None:
        raise _first(found)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
