"""Continuations by a server that speaks OpenAI's completions (vLLM, SGLang, llama.cpp): token ids in, token ids out, checked."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.trace import FinishReason, Sampling
from reasonscope.probes.branches import Branch
from reasonscope.probes.decoding import Completion

_LARGEST_ANSWER = 64 * 2**20  # bytes; a completion is some kilobytes
_FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True, kw_only=True)
class ServerWriter:
    """Branches off a sequence with the model `model` of a server at `url` (without /v1), `workers` requests at a time.

    Each request carries the prompt as token ids and the branch's own seed. The server is asked to return ids
    (`return_token_ids`, vLLM); where it does not know that, its text is encoded with `tokenizer`. What comes back is checked:
    prompt ids other than those sent, ids outside the vocabulary or ids that do not spell the text are an error. Log-probabilities
    and entropies are NaN: nobody measured them here.
    """

    url: str
    model: str
    tokenizer: Tokenizer
    workers: int = 8
    timeout: float = 600.0
    key: str | None = None

    def __call__(self, token_ids: Sequence[int], branches: Sequence[Branch], sampling: Sampling) -> list[Completion]:
        """As `Writer` says. Raises InputError for a server that cannot be reached, refuses, or gives back wrong ids."""
        prompts = [[*map(int, token_ids[: branch.cut]), *branch.stub] for branch in branches]
        with ThreadPoolExecutor(self.workers) as pool:
            tasks = [
                pool.submit(self._complete, prompt, branch.seed, sampling)
                for prompt, branch in zip(prompts, branches, strict=True)
            ]
            return [task.result() for task in tasks]

    def _complete(self, prompt: list[int], seed: int, sampling: Sampling) -> Completion:
        reply = self._ask(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": seed % 2**31,
                "n": 1,
                "return_token_ids": True,
                "skip_special_tokens": False,
            }
        )
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not _is_choice(choices[0]):
            raise InputError(f"{self.url} answered without one choice with a text: {json.dumps(reply)[:200]}")
        choice = choices[0]
        sent = choice.get("prompt_token_ids", reply.get("prompt_token_ids"))
        if sent is not None and sent != prompt:
            raise InputError(
                f"{self.url} says that it read tokens other than the {len(prompt)} that were sent; "
                "it runs another tokenizer, or adds tokens of its own"
            )
        written = self._written(choice)
        return Completion(
            token_ids=np.asarray([*prompt, *written], dtype=np.int64),
            n_prompt_tokens=len(prompt),
            finish_reason=_FINISH.get(str(choice.get("finish_reason")), "unknown"),
            logprobs=np.full(len(written), np.nan, dtype=np.float32),
            entropies=np.full(len(written), np.nan, dtype=np.float32),
        )

    def _written(self, choice: Mapping[str, Any]) -> list[int]:
        """The ids of a completion, proved to spell its text."""
        text = choice["text"]
        ids = choice.get("token_ids")
        if ids is None:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
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

    def _ask(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        address = f"{self.url.rstrip('/')}/v1/completions"
        if not address.startswith(("http://", "https://")):
            raise InputError(f"{self.url!r} is no address of a server; it has to begin with http:// or https://")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(address, data=json.dumps(body).encode(), headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                found = json.loads(_body(reply, self.timeout))
        except urllib.error.HTTPError as error:
            raise InputError(
                f"{address} refused ({error.code}): {error.read()[:200].decode(errors='replace')}"
            ) from error
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            raise InputError(f"cannot read {address}: {error}; is the server up, and its address right?") from error
        if not isinstance(found, dict):
            raise InputError(f"{address} answered with a {type(found).__name__}; a JSON object is needed")
        return found


def _is_choice(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def _body(reply: http.client.HTTPResponse, seconds: float) -> bytes:
    """All of an answer. The time-out of a socket starts anew with each byte, so a server that drips has to be timed as a whole."""
    began, body = time.monotonic(), b""
    while piece := reply.read1(2**16):
        body += piece
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"the answer was not complete after {seconds:g} s")
        if len(body) > _LARGEST_ANSWER:
            raise ValueError(f"the answer is longer than {_LARGEST_ANSWER // 2**20} MiB")
    if reply.length:
        raise ConnectionError(f"the connection ended {reply.length} bytes before the answer did")
    return body
