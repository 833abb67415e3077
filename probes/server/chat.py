"""Greedy replies of a chat model on a server, such as the verdicts of a judge."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.progress import Work, working
from reasonscope.data.storage.response_cache import ResponseCache
from reasonscope.data.storage.untrusted import parse_json
from reasonscope.probes.server.connection import Refused, open_client, run_to_end, server_key


def chat_replies(
    url: str,
    served_as: str,
    questions: Sequence[str],
    *,
    keep: Path | None = None,
    workers: int = 8,
    timeout: float = 120.0,
    max_tokens: int = 512,
) -> list[str]:
    """The greedy reply of a chat model on the server at `url` to each question.

    Replies are kept in the folder `keep` by the hash of model and question, and not asked for again. Raises InputError if the server
    cannot be reached, refuses, or answers with something else.
    """
    kept = ResponseCache(keep) if keep else None
    keys = [hashlib.sha256(json.dumps([served_as, max_tokens, text]).encode()).hexdigest() for text in questions]
    known: list[str | None] = [kept.get(key) if kept else None for key in keys]
    todo = [i for i, found in enumerate(known) if found is None]

    async def all_asked(work: Work) -> None:
        room = asyncio.Semaphore(workers)
        address = f"{url.rstrip('/').removesuffix('/v1')}/v1"

        async def one(i: int) -> None:
            async with room:
                known[i] = found = await _reply(client, address, served_as, questions[i], max_tokens, timeout)
            work.advance()
            if kept:
                kept.put(keys[i], found)

        async with (
            open_client(address, server_key(), tokens=max_tokens, retries=2, timeout=timeout) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for i in todo:
                tasks.create_task(one(i))

    if todo:
        with working("asking the judge", total=len(todo), unit="answers") as work:
            run_to_end(all_asked(work))
    return [found for found in known if found is not None]


async def _reply(client: Any, address: str, served_as: str, question: str, max_tokens: int, timeout: float) -> str:
    import openai

    try:
        async with asyncio.timeout(timeout):
            raw = await client.chat.completions.with_raw_response.create(
                model=served_as,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=max_tokens,
            )
        found = parse_json(raw.content, address)
    except openai.APIStatusError as error:
        raise Refused(f"{address} refused ({error.status_code}): {error.response.text[:200]}") from error
    except (openai.OpenAIError, InputError, TimeoutError) as error:
        raise InputError(
            f"cannot read {address}: {error or 'no answer in time'}; is the server running, and is the address right?"
        ) from error
    try:
        content = found["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise InputError(f"{address} answered without a message; is it a chat completion server?") from error
    return content if isinstance(content, str) else ""
