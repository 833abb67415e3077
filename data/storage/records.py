"""Traces as rows of an Arrow table, and back, without loss. Other tools see a store or a Parquet export by these
columns."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pyarrow as pa

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.storage.untrusted import wrap_errors
from reasonscope.data.trace import Message, Problem, Regions, Sampling, Span, Trace

_REGION_NAMES = [item.name for item in fields(Regions)]
_REGIONS = pa.struct([(name, pa.list_(pa.int64(), 2)) for name in _REGION_NAMES])

# `problem`, `sampling`, `model` and `meta` are JSON; `problem_id` to `difficulty` repeat what users filter by. The spans
# of the regions are [start, stop) pairs; `token_start` and `token_stop` are the character offsets of the tokens.
TRACE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sample", pa.int64()),
        ("problem_id", pa.string()),
        ("group", pa.string()),
        ("gold", pa.string()),
        ("difficulty", pa.float64()),
        ("state", pa.string()),
        ("finish_reason", pa.string()),
        ("final_answer", pa.string()),
        ("correct", pa.bool_()),
        ("text", pa.string()),
        ("n_prompt_tokens", pa.int64()),
        ("token_ids", pa.list_(pa.int64())),
        ("token_start", pa.list_(pa.int64())),
        ("token_stop", pa.list_(pa.int64())),
        ("chars", _REGIONS),
        ("tokens", _REGIONS),
        ("logprobs", pa.list_(pa.float32())),
        ("entropies", pa.list_(pa.float32())),
        ("problem", pa.string()),
        ("sampling", pa.string()),
        ("model", pa.string()),
        ("meta", pa.string()),
    ]
)


def traces_to_table(traces: Sequence[Trace]) -> pa.Table:
    """One row per trace, columns as in `TRACE_SCHEMA`. Raises InputError if a trace's `meta` or `model` is not JSON."""
    rows = [_row(trace) for trace in traces]
    try:
        return pa.Table.from_pylist(rows, schema=TRACE_SCHEMA)
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text holds half a surrogate pair, which is invalid Unicode: {error}; repair the source"
        ) from error


def traces_of_table(table: pa.Table) -> Iterator[Trace]:
    """The traces in a table with the columns of `TRACE_SCHEMA` (others are ignored). Raises StoreError for an invalid
    row."""
    for batch in table.select(TRACE_SCHEMA.names).to_batches():
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for i in range(batch.num_rows):
            with wrap_errors(f"row {i} of a table of traces", StoreError):
                trace = _trace({name: column[i] for name, column in columns.items()})
            yield trace


def _problem_to_json(problem: Problem) -> dict[str, Any]:
    """A problem as JSON values, with every field."""
    return asdict(problem)


def problem_of_json(values: Mapping[str, Any]) -> Problem:
    """The inverse of `_problem_to_json`."""
    return Problem(**{**values, "messages": tuple(Message(**message) for message in values["messages"])})


def _row(trace: Trace) -> dict[str, Any]:
    problem = trace.problem
    return {
        "id": trace.id,
        "sample": trace.sample,
        "problem_id": problem.id,
        "group": problem.group,
        "gold": problem.answer,
        "difficulty": problem.difficulty,
        "state": trace.state,
        "finish_reason": trace.finish_reason,
        "final_answer": trace.final_answer,
        "correct": trace.correct,
        "text": trace.text,
        "n_prompt_tokens": trace.n_prompt_tokens,
        "token_ids": trace.token_ids,
        "token_start": trace.offsets[:, 0],
        "token_stop": trace.offsets[:, 1],
        "chars": _spans(trace.chars),
        "tokens": _spans(trace.tokens),
        "logprobs": trace.logprobs,
        "entropies": trace.entropies,
        "problem": _dump(trace, _problem_to_json(problem)),
        "sampling": None if trace.sampling is None else _dump(trace, asdict(trace.sampling)),
        "model": _dump(trace, dict(trace.model)),
        "meta": _dump(trace, dict(trace.meta)),
    }


def _trace(row: Mapping[str, Any]) -> Trace:
    sampling = row["sampling"].as_py()
    return Trace(
        id=row["id"].as_py(),
        problem=problem_of_json(json.loads(row["problem"].as_py())),
        text=row["text"].as_py(),
        token_ids=_array(row["token_ids"], np.int64),
        offsets=np.stack([_array(row["token_start"], np.int64), _array(row["token_stop"], np.int64)], axis=1),
        n_prompt_tokens=row["n_prompt_tokens"].as_py(),
        chars=_regions(row["chars"].as_py()),
        tokens=_regions(row["tokens"].as_py()),
        state=row["state"].as_py(),
        finish_reason=row["finish_reason"].as_py(),
        final_answer=row["final_answer"].as_py(),
        correct=row["correct"].as_py(),
        sample=row["sample"].as_py(),
        sampling=None if sampling is None else Sampling(**json.loads(sampling)),
        model=json.loads(row["model"].as_py()),
        logprobs=_array(row["logprobs"], np.float32) if row["logprobs"].is_valid else None,
        entropies=_array(row["entropies"], np.float32) if row["entropies"].is_valid else None,
        meta=json.loads(row["meta"].as_py()),
    )


def _spans(regions: Regions) -> dict[str, list[int]]:
    return {name: [getattr(regions, name).start, getattr(regions, name).stop] for name in _REGION_NAMES}


def _regions(spans: Mapping[str, Sequence[int]]) -> Regions:
    return Regions(**{name: Span(*spans[name]) for name in _REGION_NAMES})


def _array(scalar: Any, dtype: type) -> Any:
    return np.array(scalar.values.to_numpy(), dtype=dtype)


def _dump(trace: Trace, values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"trace {trace.id!r}: its problem, model and meta must be JSON values: {error}") from error
