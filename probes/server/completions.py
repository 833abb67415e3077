"""Completions by a server with the protocol of OpenAI (vLLM, SGLang, llama.cpp, transformers serve), with their token ids checked."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.progress import Work, count_tokens, working
from reasonscope.data.storage.response_cache import ResponseCache
from reasonscope.data.storage.untrusted import parse_json
from reasonscope.data.text.parse import ThinkTags
from reasonscope.data.trace import FinishReason, Sampling
from reasonscope.probes.generation.branches import Branch
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.models.tags import with_reasoning
from reasonscope.probes.server.connection import Refused, metrics, open_client, run_to_end, server_key

_FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}
# Names of vLLM: return ids, and leave special tokens in the text.
_IDS = MappingProxyType({"return_token_ids": True, "skip_special_tokens": False})
# Where a server with a reasoning parser puts the reasoning: vLLM and SGLang, and OpenRouter and vLLM of today.
_REASONING = ("reasoning_content", "reasoning")
_Ask = Callable[[str | list[int], int, Sampling, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
# Whether a server gets the seeds of the traces: auto asks it what it is.
Seeds: TypeAlias = Literal["auto", "send", "none"]


@dataclass(frozen=True, kw_only=True)
class ServerWriter:
    """Writes completions with a model on a server.

    Each request carries the prompt as token ids and its own seed. The server is asked to return ids (`return_token_ids` of vLLM). If it
    does not know that option, its text is encoded with `tokenizer`, and `stop` is appended to a completion that ended by itself. A server
    that refuses ids (transformers serve) gets the prompt as text, if that text encodes to the same ids again. Replies are checked: it is
    an error if the prompt that the server read has other ids or another length, or if ids lie outside the vocabulary or do not spell the
    text. A reply that is compressed or far too long is not read. Log-probabilities and entropies are NaN: `record` measures them as it
    reads the activations.

    Departures: ids that are encoded from text are those of the tokenizer; the model may have sampled another spelling.

    Attributes:
        url: Address of the server, without /v1.
        model: Name of the model on the server.
        tokenizer: The tokenizer of the model.
        tags: The think tags, put around reasoning that the server has parted from the text.
        stop: The stop token, appended to completions that ended by themselves if the server returns no ids.
        needs_ids: Refuse texts without ids, because the think tags are special tokens, which servers leave out of texts.
        workers: Requests at a time.
        timeout: Seconds that a request may take in all.
        retries: How often a request is repeated, after longer and longer pauses, if the server is busy, fails or does not answer in time.
        key: Sent to a server that asks for a key.
        keep: A folder for the replies; one that is there is not asked for again.
        seeds: "send" and "none" say whether requests carry seeds; "auto" leaves them out if the server looks like vLLM on CPUs, which dies
            of a seed once a prompt is read in parts.
    """

    url: str
    model: str
    tokenizer: Tokenizer
    tags: ThinkTags | None = None
    stop: int | None = None
    needs_ids: bool = False
    workers: int = 8
    timeout: float = 600.0
    retries: int = 6
    key: str | None = None
    keep: Path | None = None
    seeds: Seeds = "auto"

    def __call__(self, token_ids: Sequence[int], branches: Sequence[Branch], sampling: Sampling) -> list[Completion]:
        """As `Writer` says. Raises InputError if the server cannot be reached, refuses, or returns wrong ids."""
        prompts = [[*map(int, token_ids[: branch.cut]), *branch.stub] for branch in branches]
        return self.complete(prompts, sampling, [branch.seed for branch in branches])

    def complete(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """One completion per prompt (token ids) and seed, in their order. Raises InputError as above."""
        asked = [list(map(int, prompt)) for prompt in prompts]
        keys = [self._key(prompt, sampling, seed) for prompt, seed in zip(asked, seeds, strict=True)]
        known = [self._kept.get(key) if self._kept else None for key in keys]
        todo = [i for i, found in enumerate(known) if found is None]
        sent = {i: asked[i] if self.takes_ids else self._spelled(asked[i]) for i in todo}

        async def all_written(work: Work) -> None:
            room = asyncio.Semaphore(self.workers)

            async def one(i: int) -> None:
                async with room:
                    known[i] = found = await self._one(ask, asked[i], sent[i], seeds[i], sampling)
                work.advance()
                count_tokens(len(found[0]))
                if self._kept:
                    self._kept.put(keys[i], found)

            tokens = max(map(len, asked)) + sampling.max_new_tokens
            async with self._client(tokens) as ask, asyncio.TaskGroup() as tasks:
                for i in todo:
                    tasks.create_task(one(i))

        if todo:
            with working("asking the server", total=len(todo), unit="completions") as work:
                run_to_end(all_written(work))
        return [completion(prompt, *found) for prompt, found in zip(asked, known, strict=True) if found is not None]

    async def _one(
        self, ask: _Ask, prompt: list[int], sent: str | list[int], seed: int, sampling: Sampling
    ) -> tuple[list[int], FinishReason]:
        return self._checked(prompt, await ask(sent, seed, sampling, {}), sampling)

    @cached_property
    def takes_ids(self) -> bool:
        """Whether the server takes token ids. This is tried once, for a single token."""

        async def once() -> None:
            async with self._client(2) as ask:
                await ask([0], 0, Sampling(temperature=0, max_new_tokens=1), {})

        try:
            run_to_end(once())
        except Refused as refusal:
            if getattr(refusal.__cause__, "status_code", None) in (400, 422):
                return False
            raise
        return True

    def seeded(self, sampling: Sampling) -> bool:
        """Whether completions follow from their seeds; greedy ones need none, so the seed is sent and changes nothing."""
        return not sampling.temperature or self._sends_seeds

    @cached_property
    def _sends_seeds(self) -> bool:
        return self.seeds == "send" or (self.seeds == "auto" and not _runs_vllm_on_cpus(self.url, self.key))

    @cached_property
    def _kept(self) -> ResponseCache | None:
        return None if self.keep is None else ResponseCache(self.keep)

    def _key(self, prompt: list[int], sampling: Sampling, seed: int) -> str:
        fields = asdict(sampling)
        # What older replies did not know stays out of the key at its default, so that they are found again.
        later = {
            name: fields.pop(name) for name in ("top_k", "min_p", "repetition_penalty", "presence_penalty", "stop")
        }
        unlike = {name: value for name, value in later.items() if value != getattr(Sampling(), name)}
        asked = json.dumps([self.model, prompt, {**fields, **unlike}, seed, *self._setting])
        return hashlib.sha256(asked.encode()).hexdigest()

    @property
    def _setting(self) -> tuple[str, ...]:
        """What else changes the replies."""
        return ()

    def _checked(
        self, prompt: list[int], reply: Mapping[str, Any], sampling: Sampling | None = None
    ) -> tuple[list[int], FinishReason]:
        """The ids that were written, and why they ended."""
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not _is_choice(choices[0]):
            raise InputError(f"{self.url} answered without one choice with a text: {json.dumps(reply)[:200]}")
        choice = choices[0]
        told = reply.get("usage")
        usage = told if isinstance(told, dict) else {}
        self._check_prompt(prompt, choice.get("prompt_token_ids", reply.get("prompt_token_ids")), usage)
        finish = _FINISH.get(str(choice.get("finish_reason")), "unknown")
        by_text = isinstance(choice.get("stop_reason"), str) or bool(sampling and sampling.stop)
        return self._written(prompt, choice, by_token=finish == "stop" and not by_text), finish

    def _spelled(self, prompt: list[int]) -> str:
        """The text that a server with this tokenizer encodes as `prompt`, whether or not it adds a BOS."""
        for ids in (prompt, prompt[1:]):
            text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
            if self.tokenizer.encode(text).ids == prompt:
                return text
        raise InputError(
            f"{self.url} takes no token ids, and no text encodes to {prompt[-8:]}; "
            "cut where a token ends, or use a server that takes ids (vLLM, SGLang, llama.cpp)"
        )

    def _check_prompt(self, prompt: list[int], read: Sequence[int] | None, usage: Mapping[str, Any]) -> None:
        ids = read if isinstance(read, list) else None if read is None else []
        n = len(ids) if ids is not None else usage.get("prompt_tokens", len(prompt))
        if n != len(prompt) or (ids is not None and ids != prompt):
            raise InputError(
                f"{self.url} read {n} tokens, and not the {len(prompt)} that were sent; "
                "it has another tokenizer, or adds tokens of its own"
            )

    def _written(self, prompt: list[int], choice: Mapping[str, Any], *, by_token: bool) -> list[int]:
        """The ids of a completion, which a stop token ended if `by_token`, after a check that they spell its text.

        Its reasoning is put back if the server has parted them.
        """
        text, reasoning = choice["text"] or "", _reasoning(choice)
        ids = choice.get("token_ids")
        if ids is None:
            if reasoning:
                text = self._joined(prompt, reasoning, text)
            elif self.needs_ids:
                raise InputError(
                    f"{self.url} returns texts without ids, and texts lack the think tags, which are special tokens; "
                    "use a server that returns ids (vLLM)"
                )
            ended = [self.stop] if by_token and self.stop is not None else []
            return [*self.tokenizer.encode(text, add_special_tokens=False).ids, *ended]
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise InputError(f"{self.url} gave token ids outside the vocabulary of {size}; it has another tokenizer")
        if reasoning:
            spelled = self.tokenizer.decode(ids, skip_special_tokens=False)
            if all(part.strip() in spelled for part in (reasoning, text)):
                return list(ids)
        spellings = {self.tokenizer.decode(ids, skip_special_tokens=skip).strip() for skip in (False, True)}
        if text.strip() not in spellings and not any(text.strip() and s.startswith(text.strip()) for s in spellings):
            raise InputError(
                f"{self.url} gave ids that spell {sorted(spellings)[0][:60]!r}, but the text {text[:60]!r}; "
                "it has another tokenizer"
            )
        return list(ids)

    def _joined(self, prompt: list[int], reasoning: str, text: str) -> str:
        """Reasoning and text as the model wrote them, between the think tags."""
        if self.tags is None:
            raise InputError(
                f"{self.url} returns the reasoning apart from the text, and the model here has no think tags to put around it; "
                "start the server without its reasoning parser"
            )
        return with_reasoning(self.tokenizer.decode(prompt, skip_special_tokens=False), reasoning, text, self.tags)

    @asynccontextmanager
    async def _client(self, tokens: int) -> AsyncIterator[_Ask]:
        """A function from (prompt, seed, sampling) to the JSON object of the reply, for `tokens` tokens at most."""
        address = f"{self.url.rstrip('/')}/v1"
        client = open_client(address, self.key, tokens=tokens, retries=self.retries)
        import openai  # after `open_client`, which says what to install

        async def ask(
            prompt: str | list[int], seed: int, sampling: Sampling, more: Mapping[str, Any]
        ) -> Mapping[str, Any]:
            for _ in range(1 + self.retries):
                # The time limit of the library is between two bytes, so a server that sends one per second never reaches it.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.timeout):
                        return await answered(prompt, seed, sampling, more)
            raise InputError(
                f"{address} gave no complete answer within {self.timeout:g} seconds in {1 + self.retries} tries; give it more time, "
                "fewer requests at once, or fewer tokens to write"
            )

        async def answered(
            prompt: str | list[int], seed: int, sampling: Sampling, more: Mapping[str, Any]
        ) -> Mapping[str, Any]:
            fields = _fields(prompt, sampling, self.stop)
            if more:
                fields["extra_body"] = {**(fields["extra_body"] or {}), **more}
            try:
                raw = await client.completions.with_raw_response.create(
                    model=self.model,
                    prompt=prompt,
                    seed=seed % 2**31 if self.seeded(sampling) else openai.omit,
                    **fields,
                )
                found = parse_json(raw.content, address)
            except openai.APIStatusError as error:
                raise Refused(f"{address} refused ({error.status_code}): {error.response.text[:200]}") from error
            except (openai.OpenAIError, InputError) as error:
                raise InputError(
                    f"cannot read {address}: {error}; is the server running, and is the address right?"
                ) from error
            if not isinstance(found, dict):
                raise InputError(f"{address} answered with a {type(found).__name__}; a JSON object is needed")
            return found

        async with client:
            yield ask


def _fields(prompt: str | list[int], sampling: Sampling, stop: int | None) -> dict[str, Any]:
    """Every field of the sampling, because a server fills what is not sent, often from the model's own generation configuration."""
    common: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop": list(sampling.stop) or None,
    }
    if isinstance(prompt, str):
        return {**common, "extra_body": _for_texts(sampling, stop)}
    fields = {
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "repeat_penalty": sampling.repetition_penalty,  # the name of llama.cpp
    }
    penalties = {"presence_penalty": sampling.presence_penalty, "frequency_penalty": 0.0}
    return {**common, **penalties, "extra_body": {**_IDS, **fields}}


def _for_texts(sampling: Sampling, stop: int | None) -> dict[str, Any] | None:
    """The same for transformers serve, which takes texts and a whole generation configuration, and refuses other fields."""
    if sampling.presence_penalty:
        raise InputError(
            "a server that takes texts and no token ids has no presence penalty; leave it out, or use vLLM"
        )
    if stop is None:
        return None
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    drawn |= {"min_p": sampling.min_p} if sampling.min_p else {}
    known = {
        "do_sample": sampling.temperature > 0,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": stop,
        **(drawn if sampling.temperature else {}),
    }
    return {"generation_config": json.dumps(known)}


def _runs_vllm_on_cpus(url: str, key: str | None = None) -> bool:
    """Whether the server at `url` looks like vLLM's build for CPUs, by the metrics that it publishes; False if it publishes none.

    That build sets the memory of the keys and values itself, and blocks of 128 tokens, where other builds set 16.
    """
    found = re.search(r"^vllm:cache_config_info{(.*)}", metrics(url, key), re.MULTILINE)
    told = dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if found else {}
    return told.get("block_size") == "128" and told.get("kv_cache_memory_bytes", "None") != "None"


def server_writer(
    url: str,
    model: Prompting,
    *,
    served_as: str | None = None,
    workers: int = 8,
    timeout: float = 600.0,
    keep: Path | None = None,
    seeds: Seeds = "auto",
) -> ServerWriter:
    """The writer for `model` on the server at `url`; see `ServerWriter`.

    `served_as` is the name of the model on the server, its own name if None. A key for the server is read from the environment variable
    REASONSCOPE_SERVER_KEY.
    """
    special = set(model.tokenizer.all_special_tokens)
    return ServerWriter(
        url=url,
        model=served_as or model.name,
        tokenizer=model.tokenizer_backend,
        tags=model.tags,
        stop=model.tokenizer.eos_token_id,
        needs_ids=model.tags is not None and bool({model.tags.open, model.tags.close} & special),
        workers=workers,
        timeout=timeout,
        keep=keep,
        key=server_key(),
        seeds=seeds,
    )


def completion(prompt: list[int], written: list[int], finish: FinishReason) -> Completion:
    return Completion(
        token_ids=np.asarray([*prompt, *written], dtype=np.int64),
        n_prompt_tokens=len(prompt),
        finish_reason=finish,
        logprobs=np.full(len(written), np.nan, dtype=np.float32),
        entropies=np.full(len(written), np.nan, dtype=np.float32),
    )


def _is_choice(value: object) -> bool:
    return isinstance(value, dict) and (isinstance(value.get("text"), str) or bool(_reasoning(value)))


def _reasoning(choice: Mapping[str, Any]) -> str:
    """The reasoning that a server has parted from the text; empty if it did not."""
    return next((found for name in _REASONING if isinstance(found := choice.get(name), str) and found.strip()), "")
