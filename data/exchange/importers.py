"""Traces that others published or wrote: Thought Anchors folders, and dumps of servers, trainers and evaluations."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.dump_files import dump_rows, inspect_samples
from reasonscope.data.exchange.imported import ChatRenderer, Imported, TraceMaker
from reasonscope.data.exchange.streams import join_streams
from reasonscope.data.storage.untrusted import json_lines, parse_json
from reasonscope.data.text.parse import THINK, ThinkTags, trace_from_text
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Problem, Trace

KINDS = ("auto", "thought-anchors", "jsonl", "inspect")
PUBLISHED_EFFECTS = (
    "step_importance",
    "step_importance_supp",
)  # effects by resampling and by attention suppression, in files with these names


def import_traces(
    path: str | Path,
    *,
    kind: str = "auto",
    turn: int | Literal["last", "all"] = "last",
    renderer: ChatRenderer | None = None,
    tokenizer: Tokenizer | None = None,
    thinking: Thinking | None = None,
) -> Imported:
    """The traces in whatever servers, trainers and evaluations dump; each line or file says by its keys what it is.

    Known are chat completions and completions (OpenAI, vLLM, SGLang, OpenRouter, LM Studio, llama.cpp), the Responses
    API, messages of Anthropic, Ollama, saved chats of LM Studio, batches, streams, outputs of vLLM and SGLang, rollouts
    of TRL and verl, logs of Inspect and lm-eval, folders of Thought Anchors, and lines with `messages`, or with `prompt`
    and `completion`. A file may be JSON, JSON lines, server-sent events, Parquet, or an Inspect log.

    Args:
        path: A file, or a folder whose files are read together.
        kind: One of `KINDS`: with "thought-anchors" only such folders are read, with any other each row says what it is.
        turn: Which of the assistant's turns in a conversation becomes the trace: the last one, the one with this number
            (from 1), or each of them ("all"), as traces of one group.
        renderer: Renders prompts by the chat template of the model that wrote the text, and encodes them.
        tokenizer: Encodes the text if no renderer is given; without both the traces have no tokens.
        thinking: How thinking is found in texts that do not part it, if no renderer is given; by default between think tags.

    Returns:
        The traces, and what could not be understood, with places and reasons.

    Raises:
        InputError: If the path cannot be read, or nothing in it is understood.

    Example:
        found = rs.data.import_traces("dump.jsonl")
        found.traces[0].thinking
        [(left_out.where, left_out.reason) for left_out in found.not_understood]
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}; choose {', '.join(KINDS)}")
    source = Path(path)
    published = source.is_dir() and next(source.rglob("base_solution.json"), None) is not None
    if kind == "thought-anchors" or (kind == "auto" and published):
        return Imported.of_kind("Thought Anchors", import_thought_anchors(source, tokenizer=tokenizer))
    maker = TraceMaker(turn=turn, renderer=renderer, tokenizer=tokenizer, thinking=thinking)
    maker.add_all(dump_rows(source))
    return maker.imported(str(source))


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
    """The traces of a JSONL file, each line of which has to be understood.

    A line is `{"prompt", "completion"}`, or `{"messages"}` that end with the assistant's, or any other that
    `import_traces` knows. It may have `id`, `problem_id`, `answer`, `group`, `difficulty`, `sample`, `finish_reason`,
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
    maker = TraceMaker(tokenizer=tokenizer, thinking=None if tags == THINK else Thinking(tags=tags), strict=True)
    maker.add_all(join_streams(json_lines(Path(path))))
    return list(maker.imported(str(path)).traces)


def import_inspect(path: str | Path, *, tokenizer: Tokenizer | None = None, tags: ThinkTags = THINK) -> list[Trace]:
    """The samples of an Inspect log (`.eval`: a zip archive with `samples/*.json`); epochs are samples of one problem.

    A sample that failed before the model wrote anything is skipped. Nothing is unpacked to disk, and names in the archive are never
    used as paths. Raises InputError for what cannot be read, and above 64 MiB a sample or 512 MiB in all.
    """
    maker = TraceMaker(tokenizer=tokenizer, thinking=None if tags == THINK else Thinking(tags=tags), strict=True)
    maker.add_all((where, row) for where, row in inspect_samples(Path(path)) if not _failed_early(row))
    if not maker.n_rows:
        raise InputError(f"{path} has no sample with an output")
    return list(maker.imported(str(path)).traces)


def _failed_early(row: Any) -> bool:
    """Whether a sample of an Inspect log ended before the model wrote anything."""
    output = row.get("output") if isinstance(row, Mapping) else None
    return (isinstance(output, Mapping) and output.get("choices") in (None, [])) or (
        isinstance(row, Mapping) and not output
    )


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


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value
