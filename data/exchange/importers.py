"""Traces that others published or wrote: Thought Anchors folders, JSONL of completions, Inspect logs."""

import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import json_lines, parse_json
from reasonscope.data.text.parse import THINK, ThinkTags, trace_from_text
from reasonscope.data.trace import FinishReason, Problem, Trace

_LARGEST_SAMPLE = 64 * 2**20  # bytes of one unpacked sample of an Inspect log; a larger one is a bomb, not a transcript
_LARGEST_LOG = 512 * 2**20  # bytes of all its samples together; one at a time is in memory as JSON
PUBLISHED_EFFECTS = (
    "step_importance",
    "step_importance_supp",
)  # effects by resampling and by attention suppression, in files with these names
_FINISH: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
}


def import_thought_anchors(folder: str | Path, *, tokenizer: Tokenizer | None = None) -> list[Trace]:
    """The traces below a folder of Thought Anchors (arXiv 2506.19143).

    Any nesting of model/correct|incorrect/problem_N works, and so does a single problem. A problem has
    `base_solution.json` and, as far as they were published, `problem.json`, `chunks_labeled.json`,
    `step_importance.json`, `step_importance_supp.json` and `chunks_resampled.json`.

    Args:
        folder: A problem's folder, or one above it.
        tokenizer: Encodes the text; without it the traces have no tokens.

    Returns:
        Traces whose id is the path below `folder` and whose group is the problem. Published correctness is kept, not
        judged again. `meta` has what was published about the sentences: `chunks` unchanged (chunk, function_tags,
        depends_on, importances); `PUBLISHED_EFFECTS`, the effects of sentence i on sentence j, as lists of
        {source_chunk_idx, target_impacts}; and `chunks_resampled`, what rollouts wrote instead of a sentence, by its
        number.

    Raises:
        InputError: If no trace is found, or a file is damaged.

    Example:
        traces = rs.data.import_thought_anchors("deepseek-r1-distill-qwen-14b")
        cut = rs.data.cut_trace(traces[0])
        cut.labels  # "published"
    """
    root = Path(folder)
    found = [_anchor_trace(path.parent, root, tokenizer) for path in sorted(root.rglob("base_solution.json"))]
    if not found:
        raise InputError(f"{root} has no base_solution.json; give a problem's folder or one above it")
    return found


def import_jsonl(path: str | Path, *, tokenizer: Tokenizer | None = None, tags: ThinkTags = THINK) -> list[Trace]:
    """The traces of a JSONL file, one per line, in either of two forms.

    A line is `{"prompt", "completion"}`, or `{"messages"}` that end with the assistant's, whose reasoning is in
    `reasoning_content` or between inline tags. Both may have `id`, `answer`, `group`, `difficulty`, `finish_reason`,
    `model` and `meta`. Messages become a plain prompt (role: content), since the file does not contain the chat
    template.

    Args:
        path: The file.
        tokenizer: Encodes the text; without it the traces have no tokens.
        tags: What opens and closes thinking.

    Returns:
        The traces, in the order of the lines.

    Raises:
        InputError: If a line is invalid (its number is named), an id comes twice, or the file is empty.

    Example:
        traces = rs.import_jsonl("completions.jsonl", tokenizer=model.tokenizer)
        [trace.state for trace in traces]
        rs.sentences(traces[0])
    """
    source = Path(path)
    found: dict[str, Trace] = {}
    for where, value in json_lines(source):
        row = _object(value, where)
        trace = _completion_trace(row, f"{source.stem}-{where.rpartition(' ')[2]}", where, tokenizer, tags)
        if trace.id in found:
            raise InputError(f"{where}: the id {trace.id!r} came before; ids must be unique")
        found[trace.id] = trace
    if not found:
        raise InputError(f"{source} has no completions")
    return list(found.values())


def import_inspect(path: str | Path, *, tokenizer: Tokenizer | None = None, tags: ThinkTags = THINK) -> list[Trace]:
    """The samples of an Inspect log (`.eval`: a zip archive with `samples/*.json`); epochs are samples of one problem.

    Reasoning is read from content parts of type `reasoning`, or from inline tags. A sample that failed before the model
    wrote anything is skipped. Nothing is unpacked to disk and names in the archive are never used as paths.

    Args:
        path: The log.
        tokenizer: Encodes the text; without it the traces have no tokens.
        tags: What opens and closes thinking.

    Returns:
        The traces; `meta["scores"]` has the log's scores.

    Raises:
        InputError: If the log or a sample (which is named) cannot be read; if a sample has more than 64 MiB, or all
            together more than 512 MiB, unpacked.

    Example:
        traces = rs.data.import_inspect("logs/2025-06-01_gpqa.eval")
        traces[0].meta["scores"]
        traces[0].thinking
    """
    source = Path(path)
    found = []
    for name, row in _inspect_samples(source):
        where = f"{source}, {name}"
        output = _object(row.get("output") or {}, f"{where}: output")
        choices = output.get("choices") or []
        if not isinstance(choices, list):
            raise InputError(f"{where}: choices must be a list")
        if choices:
            choice = _object(choices[0], f"{where}: choice")
            found.append(_inspect_trace(row, output, choice, where, tokenizer, tags))
    if not found:
        raise InputError(f"{source} has no sample with an output")
    return found


def _anchor_trace(folder: Path, root: Path, tokenizer: Tokenizer | None) -> Trace:
    where = str(folder / "base_solution.json")
    base = _object(_beside(folder, "base_solution.json", {}), where)
    for key in ("prompt", "solution"):
        if not isinstance(base.get(key), str):
            raise InputError(f"{where}: {key} is missing or not text")
    about = _object(_beside(folder, "problem.json", {}), str(folder / "problem.json"))
    chunks = _beside(folder, "chunks_labeled.json", [])
    if not isinstance(chunks, list) or not all(map(_is_chunk, chunks)):
        raise InputError(f"{folder / 'chunks_labeled.json'}: must be a list of objects with chunk and function_tags")
    gold = about.get("gt_answer")
    problem = Problem(id=folder.name, prompt=base["prompt"], answer=None if gold is None else str(gold), meta=about)
    trace = trace_from_text(
        id=folder.name if folder == root else folder.relative_to(root).as_posix(),
        problem=problem,
        prompt=base["prompt"],
        completion=base["solution"],
        tokenizer=tokenizer,
        meta={"chunks": chunks}
        | {name: _beside(folder, f"{name}.json", []) for name in PUBLISHED_EFFECTS}
        | _resampled(folder),
    )
    published: dict[str, Any] = {}
    if isinstance(base.get("is_correct"), bool):
        published["correct"] = base["is_correct"]
    if base.get("answer") is not None:
        published["final_answer"] = str(base["answer"])
    return replace(trace, **published)


def _is_chunk(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("chunk"), str)
        and isinstance(value.get("chunk_idx", 0), int)
        and isinstance(value.get("function_tags"), list)
        and all(isinstance(tag, str) for tag in value["function_tags"])
    )


def _completion_trace(
    row: Mapping[str, Any], id: str, where: str, tokenizer: Tokenizer | None, tags: ThinkTags
) -> Trace:
    id = str(_given(row, "id", id))
    if "messages" in row:
        *asked, answered = _message_list(row["messages"], where)
        if answered["role"] != "assistant":
            raise InputError(f"{where}: the last message is the {answered['role']}'s; it must be the assistant's")
        prompt, completion = _plain_prompt(asked), _assistant_text(answered, where, tags)
    else:
        prompt, completion = (
            _text(row.get(key, default), key, where) for key, default in (("prompt", ""), ("completion", None))
        )
    gold = row.get("answer")
    problem = Problem(
        id=str(_given(row, "problem_id", id)),
        prompt=prompt,
        answer=None if gold is None else str(gold),
        group=str(_given(row, "group", "")),
        difficulty=None if row.get("difficulty") is None else _number(row["difficulty"], "difficulty", where),
    )
    model = row.get("model") or {}
    return trace_from_text(
        id=id,
        problem=problem,
        prompt=prompt,
        completion=completion,
        tokenizer=tokenizer,
        tags=tags,
        finish_reason=_FINISH.get(str(row.get("finish_reason")), "unknown"),
        sample=int(_number(_given(row, "sample", 0), "sample", where)),
        model=model if isinstance(model, dict) else {"name": str(model)},
        meta=_object(row.get("meta") or {}, f"{where}: meta"),
    )


def _inspect_samples(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, left = "the archive", _LARGEST_LOG
    try:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if not re.fullmatch(r"samples/[^/]+\.json", name):
                    continue
                with archive.open(name) as file:
                    raw = file.read(min(_LARGEST_SAMPLE, left) + 1)  # the size that the archive states may be false
                if len(raw) > min(_LARGEST_SAMPLE, left):
                    raise InputError(
                        f"{source}, {name}: more than {_LARGEST_SAMPLE // 2**20} MiB unpacked, or {_LARGEST_LOG // 2**20} MiB with "
                        "the samples before it; split the log"
                    )
                left -= len(raw)
                yield name, _object(parse_json(raw, f"{source}, {name}"), f"{source}, {name}")
    # zipfile raises these for a damaged member (the first five), an unknown compression, an encrypted member, and a name
    # that is not text.
    except (
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        UnicodeDecodeError,
    ) as error:
        raise InputError(f"{source}, {name}: not a readable Inspect log: {error}") from error


def _inspect_trace(
    row: Mapping[str, Any],
    output: Mapping[str, Any],
    choice: Mapping[str, Any],
    where: str,
    tokenizer: Tokenizer | None,
    tags: ThinkTags,
) -> Trace:
    asked = row.get("input")
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else _message_list(asked, where)
    target = row.get("target")
    gold = next(iter(target), None) if isinstance(target, list) else target
    id, epoch = str(_given(row, "id", Path(where).stem)), int(_number(_given(row, "epoch", 1), "epoch", where))
    prompt = _plain_prompt(asked)
    return trace_from_text(
        id=f"{id}-{epoch}",
        problem=Problem(id=id, prompt=prompt, answer=None if gold in (None, "") else str(gold)),
        prompt=prompt,
        completion=_assistant_text(_object(choice.get("message"), f"{where}: message"), where, tags),
        tokenizer=tokenizer,
        tags=tags,
        finish_reason=_FINISH.get(str(choice.get("stop_reason")), "unknown"),
        sample=epoch - 1,
        model={"name": str(output.get("model", ""))},
        meta={"scores": row.get("scores") or {}},
    )


def _message_list(values: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: messages must be a list of at least one message")
    messages = [_object(value, f"{where}: message") for value in values]
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str | list):
            raise InputError(f"{where}: a message needs role and content, got {message!s:.80}")
    return messages


def _plain_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    turns = [f"{message['role']}: {_content(message, 'text')}\n\n" for message in messages]
    return "".join(turns) + "assistant: "


def _assistant_text(message: Mapping[str, Any], where: str, tags: ThinkTags) -> str:
    """The completion as one text, with the reasoning between tags even if the message stores it separately."""
    if not isinstance(message.get("content"), str | list):
        raise InputError(f"{where}: the assistant's message has no content")
    reasoning = message.get("reasoning_content") or _content(message, "reasoning")
    said = _content(message, "text")
    return f"{tags.open}\n{reasoning}\n{tags.close}\n\n{said}" if reasoning else said


def _content(message: Mapping[str, Any], kind: str) -> str:
    """The text of a message, or of its parts of one kind (`text` or `reasoning`)."""
    content = message["content"]
    if isinstance(content, str):
        return content if kind == "text" else ""
    return "\n".join(str(part.get(kind, "")) for part in content if isinstance(part, dict) and part.get("type") == kind)


def _resampled(folder: Path) -> dict[str, Any]:
    """The published sentences that rollouts wrote instead of others; empty if none were published."""
    path = folder / "chunks_resampled.json"
    found = _object(_beside(folder, path.name, {}), str(path))
    if any(not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) for texts in found.values()):
        raise InputError(f"{path}: each sentence needs a list of texts")
    return {"chunks_resampled": found} if found else {}


def _beside(folder: Path, name: str, default: Any) -> Any:
    path = folder / name
    return parse_json(path.read_bytes(), str(path)) if path.is_file() else default


def _given(row: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of `key`, or `default` if it is missing or null."""
    return default if row.get(key) is None else row[key]


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is missing or not text; give prompt and completion, or messages")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or not abs(value) < 2**63:  # false for NaN too
        raise InputError(f"{where}: {key} must be a finite number below 2^63, got {value!r:.60}")
    return value


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value
