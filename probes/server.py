"""Completions by a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, transformers serve): ids where it knows them, checked."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError, MissingExtraError
from reasonscope.data.trace import FinishReason, Sampling
from reasonscope.probes.branches import Branch
from reasonscope.probes.decoding import Completion
from reasonscope.probes.prompting import Prompting

_FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}
# vLLM's names: give ids back, and leave special tokens in the text.
_IDS = MappingProxyType({"return_token_ids": True, "skip_special_tokens": False})
_KEY = "REASONSCOPE_SERVER_KEY"
_Ask = Callable[[str | list[int], int, Sampling], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ServerWriter:
    """The model that a server at `url` (without /v1) calls `model`; `workers` requests at a time, each asked again up to `retries`
    times, ever later, where the server is busy, fails or is away for a moment.

    Each request carries the prompt as token ids and its own seed. The server is asked to return ids (`return_token_ids`, vLLM);
    where it does not know that, its text is encoded with `tokenizer`, and `stop` put behind a completion that it says has ended.
    A server that refuses ids (transformers serve) gets the prompt as text, if that text makes the very same ids again. What
    comes back is checked: other prompt ids or another number of them than were sent, ids outside the vocabulary or ids that do
    not spell the text are an error; so is a text where `needs_ids` says that the think tags are special tokens, which servers
    leave out of texts. Log-probabilities and entropies are NaN: nobody measured them here.

    Departures: ids that are encoded from text are those that the tokenizer would write, which sampling may have spelled otherwise.
    """

    url: str
    model: str
    tokenizer: Tokenizer
    stop: int | None = None
    needs_ids: bool = False
    workers: int = 8
    timeout: float = 600.0
    retries: int = 6
    key: str | None = None

    def __call__(self, token_ids: Sequence[int], branches: Sequence[Branch], sampling: Sampling) -> list[Completion]:
        """As `Writer` says. Raises InputError for a server that cannot be reached, refuses, or gives back wrong ids."""
        prompts = [[*map(int, token_ids[: branch.cut]), *branch.stub] for branch in branches]
        return self.complete(prompts, sampling, [branch.seed for branch in branches])

    def complete(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """A completion of each of `prompts` (token ids) with its seed, in their order; errors as above."""
        asked = [list(map(int, prompt)) for prompt in prompts]
        sent = [prompt if self.takes_ids else self._spelled(prompt) for prompt in asked]
        with self._client() as ask, ThreadPoolExecutor(self.workers) as pool:
            tasks = [
                pool.submit(self._completion, ask, prompt, form, seed, sampling)
                for prompt, form, seed in zip(asked, sent, seeds, strict=True)
            ]
            try:
                return [task.result() for task in tasks]
            except InputError:
                pool.shutdown(cancel_futures=True)
                raise

    @cached_property
    def takes_ids(self) -> bool:
        """Whether the server takes token ids; asked once, for a single token."""
        from openai import BadRequestError, UnprocessableEntityError

        with self._client() as ask:
            try:
                ask([0], 0, Sampling(temperature=0, max_new_tokens=1))
            except _Refused as refusal:
                if isinstance(refusal.__cause__, BadRequestError | UnprocessableEntityError):
                    return False
                raise
        return True

    def _completion(
        self, ask: _Ask, prompt: list[int], sent: str | list[int], seed: int, sampling: Sampling
    ) -> Completion:
        reply = ask(sent, seed, sampling)
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not _is_choice(choices[0]):
            raise InputError(f"{self.url} answered without one choice with a text: {json.dumps(reply)[:200]}")
        choice = choices[0]
        told = reply.get("usage")
        usage = told if isinstance(told, dict) else {}
        self._check_prompt(prompt, choice.get("prompt_token_ids", reply.get("prompt_token_ids")), usage)
        finish = _FINISH.get(str(choice.get("finish_reason")), "unknown")
        written = self._written(choice, finish)
        return Completion(
            token_ids=np.asarray([*prompt, *written], dtype=np.int64),
            n_prompt_tokens=len(prompt),
            finish_reason=finish,
            logprobs=np.full(len(written), np.nan, dtype=np.float32),
            entropies=np.full(len(written), np.nan, dtype=np.float32),
        )

    def _spelled(self, prompt: list[int]) -> str:
        """The text that a server with this tokenizer reads as `prompt`, with the BOS that it adds or without."""
        for ids in (prompt, prompt[1:]):
            text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
            if self.tokenizer.encode(text).ids == prompt:
                return text
        raise InputError(
            f"{self.url} takes no token ids, and no text makes these again: {prompt[-8:]}; "
            "cut where a token ends, or use a server that takes ids (vLLM, SGLang, llama.cpp)"
        )

    def _check_prompt(self, prompt: list[int], read: Sequence[int] | None, usage: Mapping[str, Any]) -> None:
        ids = read if isinstance(read, list) else None if read is None else []
        n = len(ids) if ids is not None else usage.get("prompt_tokens", len(prompt))
        if n != len(prompt) or (ids is not None and ids != prompt):
            raise InputError(
                f"{self.url} says that it read {n} tokens other than the {len(prompt)} that were sent; "
                "it runs another tokenizer, or adds tokens of its own"
            )

    def _written(self, choice: Mapping[str, Any], finish: FinishReason) -> list[int]:
        """The ids of a completion, proved to spell its text."""
        text = choice["text"]
        ids = choice.get("token_ids")
        if ids is None:
            if self.needs_ids:
                raise InputError(
                    f"{self.url} gives back texts without ids, and the think tags are special tokens that such texts lack; "
                    "use a server that returns ids (vLLM)"
                )
            ended = [self.stop] if finish == "stop" and self.stop is not None else []
            return [*self.tokenizer.encode(text, add_special_tokens=False).ids, *ended]
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise InputError(f"{self.url} gave token ids outside the vocabulary of {size}; it runs another tokenizer")
        spellings = {self.tokenizer.decode(ids, skip_special_tokens=skip).strip() for skip in (False, True)}
        if text.strip() not in spellings and not any(text.strip() and s.startswith(text.strip()) for s in spellings):
            raise InputError(
                f"{self.url} gave ids that spell {sorted(spellings)[0][:60]!r}, but the text {text[:60]!r}; "
                "it runs another tokenizer"
            )
        return list(ids)

    @contextmanager
    def _client(self) -> Iterator[_Ask]:
        """Inside, the server can be asked: (prompt, seed, sampling) to the JSON object of its reply."""
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"{self.url!r} is no address of a server; it has to begin with http:// or https://")
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError(f'a server needs openai ({error}): pip install "reasonscope[scale]"') from error
        address = f"{self.url.rstrip('/')}/v1"

        def ask(prompt: str | list[int], seed: int, sampling: Sampling) -> Mapping[str, Any]:
            try:
                raw = client.completions.with_raw_response.create(
                    model=self.model,
                    prompt=prompt,
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=seed % 2**31,
                    extra_body=None if isinstance(prompt, str) else dict(_IDS),
                )
                found = json.loads(raw.text)
            except openai.APIStatusError as error:
                raise _Refused(f"{address} refused ({error.status_code}): {error.response.text[:200]}") from error
            except (openai.OpenAIError, ValueError, RecursionError) as error:
                raise InputError(f"cannot read {address}: {error}; is the server up, and its address right?") from error
            if not isinstance(found, dict):
                raise InputError(f"{address} answered with a {type(found).__name__}; a JSON object is needed")
            return found

        # A key of OpenAI in the environment is not for a server of anybody else.
        with openai.OpenAI(
            base_url=address, api_key=self.key or "none", max_retries=self.retries, timeout=self.timeout
        ) as client:
            yield ask


def server_writer(url: str, model: Prompting, *, served_as: str | None = None, workers: int = 8) -> ServerWriter:
    """The writer for `model` behind `url`, where it is called `served_as` (its own name where not given).

    A server that wants a key gets the one in the environment variable REASONSCOPE_SERVER_KEY.
    """
    special = set(model.tokenizer.all_special_tokens)
    return ServerWriter(
        url=url,
        model=served_as or model.name,
        tokenizer=model.tokenizer_backend,
        stop=model.tokenizer.eos_token_id,
        needs_ids=model.tags is not None and bool({model.tags.open, model.tags.close} & special),
        workers=workers,
        key=os.environ.get(_KEY),
    )


def _is_choice(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str)


class _Refused(InputError):
    """A server that answered with an error."""
