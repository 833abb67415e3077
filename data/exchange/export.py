"""Traces for other tools: JSONL, Parquet, and the files of Thought Anchors."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.exchange.importers import PUBLISHED_EFFECTS
from reasonscope.data.storage.durable import write_durably, write_text_durably
from reasonscope.data.storage.records import traces_to_table
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Sentence, Trace


def export_jsonl(traces: Iterable[Trace], path: str | Path) -> int:
    """Write one JSON object per line, in the form that `import_jsonl` reads, with the thinking and its fields.

    Args:
        traces: The traces.
        path: The file to write.

    Returns:
        The number of traces.

    Raises:
        StoreError: If the file cannot be written.

    Example:
        store = rs.open_run("runs/mine").store
        rs.data.export_jsonl(store, "traces.jsonl")
        traces = rs.import_jsonl("traces.jsonl")
    """
    count = 0

    def write(target: Path) -> None:
        nonlocal count
        with target.open("w", encoding="utf-8") as file:
            for trace in traces:
                file.write(json.dumps(_flat(trace)) + "\n")
                count += 1

    write_durably(Path(path), write)
    return count


def export_parquet(traces: Iterable[Trace], path: str | Path) -> int:
    """Write one table with the columns of a store (`records.TRACE_SCHEMA`); lossless.

    Args:
        traces: The traces.
        path: The file to write.

    Returns:
        The number of traces.

    Raises:
        InputError: If a trace's `meta` is not JSON.
        StoreError: If the file cannot be written.

    Example:
        store = rs.open_run("runs/mine").store
        rs.data.export_parquet(store, "traces.parquet")
        frame = pandas.read_parquet("traces.parquet")
    """
    table = traces_to_table(list(traces))
    write_durably(Path(path), lambda file: pq.write_table(table, file, compression="zstd"))
    return int(table.num_rows)


def export_thought_anchors(traces: Iterable[Trace], folder: str | Path) -> int:
    """Write one folder per trace in the format that Thought Anchors (arXiv 2506.19143) published.

    A folder is named by the trace's id, which may hold slashes. It has `base_solution.json`, `problem.json`,
    `chunks_labeled.json`, and, if the trace's `meta` has them, the published effects and resampled sentences. The
    chunks are `meta["chunks"]` if the trace was imported with them; otherwise they are the sentences of the published
    splitter with our labels, without dependencies or importances.

    Args:
        traces: The traces.
        folder: The folder to write into.

    Returns:
        The number of traces.

    Raises:
        InputError: If an id leads out of `folder`.
        StoreError: If a file cannot be written.

    Example:
        store = rs.open_run("runs/mine").store
        rs.data.export_thought_anchors(store, "anchors")
        traces = rs.data.import_thought_anchors("anchors")
    """
    count = 0
    for trace in traces:
        place = PurePosixPath(trace.id)
        if place.is_absolute() or ".." in place.parts or not place.parts or "\0" in trace.id:
            raise InputError(f"trace {trace.id!r}: its id cannot be the name of a folder below {folder}")
        target = Path(folder, *place.parts)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {target}: {error}; choose another folder") from error
        for name, values in _anchor_files(trace).items():
            write_text_durably(target / name, json.dumps(values, indent=2))
        count += 1
    return count


def _split_text(trace: Trace) -> tuple[str, str]:
    """Prompt and completion. Imported text without tokens is cut before its opening tag, since the boundary was not
    kept."""
    cut = trace.chars.prompt.stop
    if len(trace.token_ids):
        begins = [*trace.offsets[:, 0].tolist(), len(trace.text)]
        cut = begins[trace.n_prompt_tokens]
    return trace.text[:cut], trace.text[cut:]


def _flat(trace: Trace) -> dict[str, Any]:
    prompt, completion = _split_text(trace)
    return {
        "id": trace.id,
        "problem_id": trace.problem.id,
        "group": trace.problem.group,
        "difficulty": trace.problem.difficulty,
        "answer": trace.problem.answer,
        "sample": trace.sample,
        "prompt": prompt,
        "completion": completion,
        "thinking": trace.thinking,
        "state": trace.state,
        "finish_reason": trace.finish_reason,
        "final_answer": trace.final_answer,
        "correct": trace.correct,
        "n_thinking_tokens": trace.n_thinking_tokens,
        "sampling": None if trace.sampling is None else asdict(trace.sampling),
        "model": dict(trace.model),
        "meta": {**trace.problem.meta, **trace.meta},
    }


def _anchor_files(trace: Trace) -> dict[str, Any]:
    prompt, completion = _split_text(trace)
    files: dict[str, Any] = {
        "base_solution.json": {
            "prompt": prompt,
            "solution": completion,
            "full_cot": trace.text,
            "answer": trace.final_answer,
            "is_correct": trace.correct,
        },
        "problem.json": {"problem": _question(trace), "gt_answer": trace.problem.answer, **trace.problem.meta},
        "chunks_labeled.json": trace.meta.get("chunks")
        or [_chunk(s) for s in sentences(trace, splitter="thought_anchors")],
    }
    kept = (*PUBLISHED_EFFECTS, "chunks_resampled")
    return files | {f"{name}.json": trace.meta[name] for name in kept if trace.meta.get(name)}


def _question(trace: Trace) -> str:
    problem = trace.problem
    return problem.prompt if problem.prompt is not None else problem.messages[-1].content


def _chunk(sentence: Sentence) -> Mapping[str, Any]:
    return {"chunk": sentence.text, "chunk_idx": sentence.index, "function_tags": [sentence.tag], "depends_on": []}
