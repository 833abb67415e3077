"""The shapes in which servers, trainers and evaluations dump what a model wrote: each is recognised by its keys."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.exchanges import (
    Asked,
    Exchange,
    completed,
    finish_of,
    given_or,
    ids_of,
    number,
    object_of,
    replied,
    replied_in_chat,
)
from reasonscope.data.exchange.messages import Said, joined_turns, read_items, read_message, read_messages
from reasonscope.data.storage.untrusted import parse_json, wrap_errors

# What a row may say about itself beside the conversation, in whatever shape that is.
_GOLD = ("answer", "gold", "ground_truth", "gts", "target")
_KNOWN = ("id", "problem_id", "group", "difficulty", "sample", "finish_reason", "model", "meta", "prompt", "completion")


_Reader = Callable[[Mapping[str, Any], Asked, str], list[Exchange]]


def exchanges_of(row: Any, where: str, requests: Mapping[str, Mapping[str, Any]] | None = None) -> list[Exchange]:
    """What a model wrote in one row of a dump, one per sample; `requests` are those of a batch, by their custom ids.

    Raises InputError if the row cannot be understood.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a line must be a JSON object, got {type(row).__name__}")
    request, reply = _unwrapped(row, where, requests or {})
    reader = next((read for holds, read in _SHAPES if holds(reply)), None)
    if reader is None:
        if isinstance(reply.get("error"), str | Mapping):
            raise InputError(f"{where}: the server answered with an error: {reply['error']!s:.120}")
        if "results" in reply and "n-samples" in reply:
            raise InputError(
                f"{where}: these are the scores of lm-eval; the texts are in samples_*.jsonl, if it ran with --log_samples"
            )
        raise InputError(f"{where}: no known shape has these keys: {', '.join(map(str, reply))[:120] or 'none at all'}")
    with wrap_errors(where):
        asked = Asked() if reader is _lm_studio else _asked({**row, **request}, where)
        found = reader(reply, asked, where)
    own = {**_about(row, where), **({"id": str(row["custom_id"])} if row.get("custom_id") is not None else {})}
    own |= {"prompt_ids": asked.prompt_ids} if asked.prompt_ids else {}
    return [_described(one, own, i if len(found) > 1 else None) for i, one in enumerate(found)]


def _described(one: Exchange, own: Mapping[str, Any], number: int | None) -> Exchange:
    """With what the row says about itself, unless the shape's reader knew better, and the number of a sample in its id."""
    given = {name: value for name, value in own.items() if getattr(one, name) in ("", None, {}, (), "unknown")}
    about = own.get("meta", {})
    named = replace(one, **{**given, "meta": {**one.meta, **about}, "about": about})
    if number is None:
        return named
    return replace(named, id=f"{named.id}/{number}" if named.id else "", sample=number)


def _unwrapped(
    row: Mapping[str, Any], where: str, requests: Mapping[str, Mapping[str, Any]]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The request (empty if it is missing) and the reply, out of what batches and logs wrap around them."""
    if "custom_id" in row and isinstance(row.get("result"), Mapping):  # Anthropic's batches
        result = row["result"]
        if result.get("type") != "succeeded":
            raise InputError(f"{where}: the request {result.get('type')}: {result.get('error')!s:.120}")
        return requests.get(str(row["custom_id"]), {}), object_of(result.get("message"), f"{where}: message")
    response, request = row.get("response"), row.get("request")
    if isinstance(response, Mapping):
        if "custom_id" in row and not isinstance(request, Mapping):
            request = requests.get(str(row["custom_id"]))
        body = response.get("body", response)
        if row.get("error") or not isinstance(body, Mapping) or response.get("status_code", 200) != 200:
            raise InputError(f"{where}: the server answered with an error: {row.get('error') or body!s:.120}")
        request = request if isinstance(request, Mapping) else {}
        request = request.get("body", request)
        # SGLang calls the prompt what it calls the reply.
        return {"prompt": request.get("text"), **request} if "text" in request else request, body
    return {}, row


def _asked(request: Mapping[str, Any], where: str) -> Asked:
    tools = request.get("tools") if isinstance(request.get("tools"), list) else ()
    system = request.get("system", request.get("instructions", request.get("system_prompt")))
    first = (
        [read_message({"content": system}, where, "system")] * bool(system) if isinstance(system, str | list) else []
    )
    messages = next((request[key] for key in ("messages", "input", "prompt") if _is_messages(request.get(key))), None)
    if messages is not None:
        items = any("role" not in message for message in messages)
        said = read_items(messages, where, role="user") if items else read_messages(messages, where)
        return Asked(said=(*first, *said), tools=tuple(tools or ()))
    text = next((request[key] for key in ("prompt", "input") if isinstance(request.get(key), str)), None)
    if text is not None and (first or ("input" in request and "prompt" not in request)):
        return Asked(said=(*first, Said(role="user", text=text)), tools=tuple(tools or ()))
    ids = next((found for key in ("prompt", "input_ids") if (found := ids_of(request.get(key)))), ())
    return Asked(prompt=text, prompt_ids=ids, tools=tuple(tools or ()))


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _chat(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    """Chat completions and completions: OpenAI, vLLM, SGLang, OpenRouter, LM Studio, llama.cpp."""
    found = []
    for choice in (object_of(value, f"{where}: choice") for value in row["choices"]):
        if isinstance(choice.get("error"), Mapping):
            raise InputError(f"{where}: the server answered with an error: {choice['error']!s:.120}")
        about = {
            "finish": finish_of(choice.get("finish_reason")),
            "prompt_ids": ids_of(choice.get("prompt_token_ids") or row.get("prompt_token_ids")),
            "token_ids": ids_of(choice.get("token_ids")),
        }
        if "message" in choice:
            said = read_message(choice["message"], where, "assistant")
            found.append(replied_in_chat("chat completion", asked, said, **about))
        else:
            said = read_message({**choice, "content": choice.get("text")}, where, "assistant")
            found.append(replied("completion", asked, said, **about))
    return found


def _response(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    """The Responses API of OpenAI and others, and the chat of LM Studio; one exchange, whose last turn ends it."""
    turns = read_items(row["output"], where)
    if not turns or turns[-1].role != "assistant":
        raise InputError(f"{where}: the output does not end with what the model wrote")
    reason = row.get("incomplete_details")
    cut = reason.get("reason") if isinstance(reason, Mapping) else None
    finish = finish_of(cut or {"completed": "stop"}.get(str(row.get("status"))))
    before = replace(asked, said=(*asked.said, *turns[:-1]))
    return [replied_in_chat("response", before, turns[-1], finish=finish)]


def _anthropic(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    said = read_message(row, where, "assistant")
    return [replied_in_chat("Anthropic message", asked, said, finish=finish_of(row.get("stop_reason")))]


def _ollama(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    message = row["message"] if "message" in row else {**row, "content": row["response"]}
    said = read_message(message, where, "assistant")
    return [replied_in_chat("Ollama", asked, said, finish=finish_of(row.get("done_reason")))]


def _lm_studio(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    """A conversation that LM Studio saved; of messages that were written again it has the version that is shown."""
    told, blocks = _lm_studio_system(row, where), []
    for message in row["messages"]:
        versions, shown = message["versions"], message.get("currentlySelected", 0)
        if not isinstance(shown, int) or not 0 <= shown < len(versions):
            raise InputError(f"{where}: no version {shown!r} of a message")
        version = object_of(versions[shown], where)
        blocks = [step for step in version.get("steps", ()) if step.get("type") == "contentBlock"]
        told += [_lm_studio_block(step, where) for step in blocks] or [read_message(version, where)]
    last: Mapping[str, Any] = next(
        (block["genInfo"] for block in reversed(blocks) if isinstance(block.get("genInfo"), Mapping)), {}
    )
    name = last.get("indexedModelIdentifier") or last.get("identifier")
    return [
        Exchange(
            kind="LM Studio conversation",
            said=tuple(joined_turns(told)),
            finish=finish_of((last.get("stats") or {}).get("stopReason")),
            model={"name": str(name)} if name else {},
        )
    ]


def _lm_studio_system(row: Mapping[str, Any], where: str) -> list[Said]:
    """The system prompt: that of the conversation, which counts before that of the application."""
    fields = (row.get("perChatPredictionConfig") or {}).get("fields") or ()
    own = next((field.get("value") for field in fields if field.get("key") == "llm.prediction.systemPrompt"), None)
    text = own or row.get("systemPrompt")
    return [read_message({"content": text}, where, "system")] if isinstance(text, str) and text.strip() else []


def _lm_studio_block(step: Mapping[str, Any], where: str) -> Said:
    """A block of an assistant's message: thinking, text, calls of tools, or what a tool returned."""
    said = read_message({"content": _lm_studio_parts(step)}, where, step.get("roleOverride") or "assistant")
    thinks = isinstance(step.get("style"), Mapping) and step["style"].get("type") == "thinking"
    return replace(said, text="", reasoning=said.text, name="thinking") if thinks and said.text else said


def _lm_studio_parts(step: Mapping[str, Any]) -> list[Any]:
    """The parts of a block, with the pieces of its text together and without think tags, which are marked as structural."""
    parts: list[Any] = []
    for part in step.get("content") or ():
        if part.get("type") != "text":
            parts.append(part)
        elif parts and parts[-1].get("type") == "text":
            parts[-1] = {**parts[-1], "text": parts[-1]["text"] + part["text"] * (not part.get("isStructural"))}
        elif not part.get("isStructural"):
            parts.append(part)
    return parts


def _sglang(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    info = row["meta_info"]
    finish = info.get("finish_reason")
    reason = finish.get("type") if isinstance(finish, Mapping) else finish
    ids = ids_of(row.get("output_ids"))
    return [
        completed(
            "SGLang", asked, row["text"], where, id=str(info.get("id", "")), finish=finish_of(reason), token_ids=ids
        )
    ]


def _vllm(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    """What `LLM.generate` of vLLM returns."""
    prompt_ids = ids_of(row.get("prompt_token_ids"))
    return [
        completed(
            "vLLM outputs",
            asked,
            output.get("text"),
            where,
            id=str(row.get("request_id", "")),
            finish=finish_of(output.get("finish_reason")),
            prompt_ids=prompt_ids,
            token_ids=ids_of(output.get("token_ids")),
        )
        for output in (object_of(value, f"{where}: output") for value in row["outputs"])
    ]


def _verl(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    """A rollout of verl, which decodes prompts without their special tokens; further columns are what the reward says."""
    meta = {key: row[key] for key in row if key not in ("input", "output", *_GOLD, *_KNOWN)}
    return [completed("verl rollout", Asked(prompt=row["input"]), row["output"], where, bare=True, meta=meta)]


def _lm_eval(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    prompt, doc = _lm_eval_prompt(row["arguments"]), str(row.get("doc_id", ""))
    texts = [text for group in row["resps"] for text in (group if isinstance(group, list) else [group])]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: its responses are likelihoods, not texts; only tasks that generate have traces")
    as_json = prompt.lstrip().startswith("[{")  # chat servers get the messages as JSON
    asked = Asked(said=tuple(read_messages(parse_json(prompt, where), where))) if as_json else Asked(prompt=prompt)
    names = row.get("metrics")
    scores = {name: row[name] for name in names if name in row} if isinstance(names, list) else {}
    meta = {"scores": scores} if scores else {}
    stem = re.sub(r"^samples_|_\d{4}-\d\d-\d\dT.*$", "", where.partition(",")[0].rpartition("/")[2])
    return [
        completed("lm-eval sample", asked, text, where, problem_id=f"{stem}-{doc}", id=f"{stem}-{doc}", meta=meta)
        for text in texts
    ]


def _lm_eval_prompt(arguments: Any) -> str:
    """The text of a request, which older versions wrote as a list of lists and newer ones as named arguments."""
    while isinstance(arguments, list | Mapping) and arguments:
        arguments = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return arguments if isinstance(arguments, str) else ""


def _inspect(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    """A sample of an Inspect log. Its messages tell all turns; without them there are its input and its output."""
    output = row["output"]
    if not output["choices"]:
        error = row.get("error")
        why = f": {error.get('message', error)!s:.120}" if isinstance(error, Mapping) else ""
        raise InputError(f"{where}: the sample ended before the model wrote anything{why}")
    choice = object_of(output["choices"][0], f"{where}: choice")
    last = read_message(object_of(choice.get("message"), f"{where}: message"), where, "assistant")
    before = list(asked.said)
    if _is_messages(row.get("messages")):
        told = read_messages(row["messages"], where)
        before = told[:-1] if told[-1].role == "assistant" else told
    target = row.get("target")
    gold = next(iter(target), None) if isinstance(target, list) else target
    id, epoch = given_or(row, "id", ""), int(number(given_or(row, "epoch", 1), "epoch", where))
    stem = str(id) if id != "" else re.sub(r".*/|\.json$", "", where)
    stem = f"{row['task']}-{stem}" if isinstance(row.get("task"), str) else stem
    return [
        Exchange(
            kind="Inspect sample",
            said=(*before, last),
            id=f"{stem}-{epoch}",
            problem_id=stem,
            gold=None if gold in (None, "") else str(gold),
            sample=epoch - 1,
            finish=finish_of(choice.get("stop_reason")),
            model={"name": str(output.get("model", ""))},
            meta={"scores": row.get("scores") or {}},
        )
    ]


def _completion(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    """A prompt and a completion, each a text or messages: TRL's rollouts, and the form that this package exports."""
    written = row.get("completion")
    meta = {key: row[key] for key in ("step", "reward", "advantage") if row.get(key) is not None}
    # TRL names a column after each function that rewards.
    given = {key: value for key, value in row.items() if key not in _KNOWN and key not in meta and key not in _GOLD}
    rewards = {key: value for key, value in given.items() if isinstance(value, int | float)}
    meta |= {"rewards": rewards} if rewards else {}
    if _is_messages(written):
        return [
            Exchange(
                kind="completion", said=(*asked.said, *read_messages(written, where)), prompt=asked.prompt, meta=meta
            )
        ]
    return [completed("completion", asked, written, where, meta=meta)]


def _messages(row: Mapping[str, Any], asked: Asked, where: str) -> list[Exchange]:
    said = asked.said or tuple(read_messages(row["messages"], where))
    return [Exchange(kind="messages", said=said, tools=asked.tools)]


def _has_choices(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("choices"), list) and bool(row["choices"])


def _is_inspect(row: Mapping[str, Any]) -> bool:
    output = row.get("output")
    return isinstance(output, Mapping) and isinstance(output.get("choices"), list) and "input" in row


def _is_lm_studio(row: Mapping[str, Any]) -> bool:
    messages = row.get("messages")
    return _is_messages(messages) and all(isinstance(m.get("versions"), list) for m in messages or ())


# The first shape that fits, so those that need more keys come first.
_SHAPES: Sequence[tuple[Callable[[Mapping[str, Any]], bool], _Reader]] = (
    (_is_inspect, _inspect),
    (lambda row: isinstance(row.get("resps"), list) and "arguments" in row, _lm_eval),
    (_has_choices, _chat),
    (lambda row: isinstance(row.get("outputs"), list) and bool(row["outputs"]), _vllm),
    (lambda row: isinstance(row.get("output"), list), _response),
    (lambda row: row.get("type") == "message" and row.get("role") == "assistant", _anthropic),
    (lambda row: "done" in row and (isinstance(row.get("message"), Mapping) or "response" in row), _ollama),
    (_is_lm_studio, _lm_studio),
    (lambda row: isinstance(row.get("meta_info"), Mapping) and "text" in row, _sglang),
    (lambda row: isinstance(row.get("input"), str) and isinstance(row.get("output"), str), _verl),
    (lambda row: "completion" in row, _completion),
    (lambda row: "messages" in row, _messages),
    (
        lambda row: isinstance(row.get("prompt"), str),
        _completion,
    ),  # what it lacks is the completion, and the error says so
)


def _about(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row of any shape may say about itself."""
    found: dict[str, Any] = {key: str(row[key]) for key in ("id", "problem_id", "group") if row.get(key) is not None}
    gold = next((row[key] for key in _GOLD if isinstance(row.get(key), str | int | float) and row[key] != ""), None)
    if gold is not None:
        found["gold"] = str(gold).rpartition("####")[2].strip()  # GSM8K puts its solution before these
    if row.get("difficulty") is not None:
        found["difficulty"] = number(row["difficulty"], "difficulty", where)
    if row.get("sample") is not None:
        found["sample"] = int(number(row["sample"], "sample", where))
    if row.get("finish_reason") is not None:
        found["finish"] = finish_of(row["finish_reason"])
    replies = (row, row["response"] if isinstance(row.get("response"), Mapping) else {})
    if model := next((one[key] for one in replies for key in ("model", "model_instance_id") if one.get(key)), None):
        found["model"] = dict(model) if isinstance(model, Mapping) else {"name": str(model)}
    if row.get("meta") is not None:
        found["meta"] = object_of(row["meta"], f"{where}: meta")
    return found
