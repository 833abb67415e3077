"""The way to a server: a client that reads bounded replies, and no key that is meant for somebody else."""

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

from reasonscope.data.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# The largest reply in bytes: this much, and as much again for each token (its id, and a text made of escapes only).
_REPLY, _REPLY_TOKEN = 2**20, 2**10
_T = TypeVar("_T")


class Refused(InputError):
    """The server answered with an error."""


def server_key() -> str | None:
    """The key for the server, if the environment has one."""
    return os.environ.get("REASONSCOPE_SERVER_KEY")


def open_client(url: str, key: str | None, *, tokens: int, retries: int, timeout: float | None = None) -> "AsyncOpenAI":
    """A client of the server at `url` (with /v1), for replies of `tokens` tokens at most."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"invalid address {url!r}: it has to begin with http:// or https://")
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError(f'a server needs openai ({error}): pip install "reasonscope[scale]"') from error
    return openai.AsyncOpenAI(
        base_url=url,
        api_key=key or "none",  # the key of OpenAI in the environment must not go to other servers
        max_retries=retries,
        timeout=timeout,
        default_headers={"Accept-Encoding": "identity"},
        http_client=_bounded(openai, _REPLY + tokens * _REPLY_TOKEN),
    )


def _bounded(openai: Any, largest: int) -> Any:
    """An HTTP client that reads at most `largest` bytes of a reply, also of an error, and unpacks nothing."""

    class Bounded(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]  # only known if openai is installed
        async def send(self, request: Any, **how: Any) -> Any:
            reply = await super().send(request, **{**how, "stream": True})
            try:
                packed = reply.headers.get("Content-Encoding", "identity")
                if packed.lower() != "identity":
                    raise openai.OpenAIError(f"its reply is compressed ({packed[:20]}), which was not asked for")
                content = bytearray()
                async for piece in reply.aiter_raw():
                    content += piece
                    if len(content) > largest:
                        raise openai.OpenAIError(
                            f"its reply has more than {largest} bytes, which is too long for what was asked"
                        )
            finally:
                await reply.aclose()
            read = type(reply)(reply.status_code, headers=reply.headers, content=bytes(content), request=request)
            read.encoding = "utf-8"  # the encoding of JSON; the server could name any codec of Python
            return read

    return Bounded()


def run_to_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` to its end, in a thread if an event loop is running already (in a notebook). Of several errors the first is raised."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        beside = False
    else:
        beside = True
    try:
        if not beside:
            return asyncio.run(work)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(copy_context().run, asyncio.run, work).result()
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__


def metrics(url: str, key: str | None = None) -> str:
    """What the server at `url` publishes about itself for Prometheus, up to a bound; empty if it does not."""
    import httpx2

    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
    lines = bytearray()
    try:
        with httpx2.stream("GET", f"{url.rstrip('/')}/metrics", headers=headers, timeout=10) as reply:
            for piece in reply.iter_raw() if reply.status_code == 200 else ():
                lines += piece
                if len(lines) > _REPLY:
                    break
    except httpx2.HTTPError:
        return ""
    return lines.decode("utf-8", "replace")
