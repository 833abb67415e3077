"""The traces of a run as they are cut: one row of a table each, and one trace sentence by sentence. No model, no Streamlit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.data.sentence_cut import CutTrace, cut_trace
from reasonscope.data.text.answers import CONTROL
from reasonscope.data.text.behaviour import answer_behaviour
from reasonscope.data.text.published_chunks import published_numbers
from reasonscope.data.trace import Trace


@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """A trace in the table.

    Attributes:
        id: The trace.
        group: Its problem.
        kind: What was asked: a problem, a harmful request …
        difficulty: Of the problem, if it is known.
        outcome: right, wrong, not decided, refused, complied or unclear.
        thinking_tokens: Length of the thinking; None if its tokens are not known.
        state: Whether the thinking is closed.
        answer: The final answer, or the start of what was answered.
        question: The start of what was asked.
    """

    id: str
    group: str
    kind: str
    difficulty: float | None
    outcome: str
    thinking_tokens: int | None
    state: str
    answer: str
    question: str


@lru_cache(maxsize=8)
def trace_rows(run: OpenRun) -> tuple[TraceRow, ...]:
    """Every trace of the run, in the order in which they were stored."""
    columns = [
        "id",
        "group",
        "difficulty",
        "gold",
        "correct",
        "state",
        "final_answer",
        "text",
        "chars",
        "tokens",
        "problem",
    ]
    found = []
    for row in run.store.table().select(columns).to_pylist():
        problem = json.loads(row["problem"])
        text, chars = row["text"], row["chars"]
        answer = text[slice(*chars["answer"])]
        start, stop = row["tokens"]["thinking"]
        untold = start == stop and chars["thinking"][0] < chars["thinking"][1]
        found.append(
            TraceRow(
                id=row["id"],
                group=row["group"],
                kind=_kind(problem),
                difficulty=row["difficulty"],
                outcome=_outcome(row["correct"], row["gold"], answer, row["state"]),
                thinking_tokens=None if untold else stop - start,
                state=row["state"],
                answer=(row["final_answer"] or CONTROL.sub(" ", answer).strip())[:80],
                question=_question(problem)[:160],
            )
        )
    return tuple(found)


def length_of(row: TraceRow) -> str:
    """How long the trace thought, in words."""
    known = row.thinking_tokens
    return "thinking tokens not known" if known is None else f"{known} thinking tokens"


@lru_cache(maxsize=4)
def all_traces(run: OpenRun) -> tuple[Trace, ...]:
    return tuple(run.store)


@lru_cache(maxsize=32)
def cut_of(run: OpenRun, id: str) -> CutTrace:
    """The trace `id` of the run, cut as the analyses cut it. Raises InputError for an unknown id."""
    return cut_trace(run.store.trace(id))


def places_of(cut_trace: CutTrace, result: Result) -> list[int]:
    """The token or sentence of the trace that each label of a result's last axis means, −1 for a sentence that is not in the trace.

    Published importances name sentences by their published numbers; all other results count. Empty for a result over other tokens or
    another cut than this one.
    """
    axis = result.axes[-1]
    if result.provenance.get("source") == "published":
        known = {str(number): place for place, number in enumerate(published_numbers(cut_trace.trace))}
        return [known.get(label, -1) for label in axis.labels]
    if axis.name in ("sentence", "source") and not is_over(cut_trace, result):
        return []
    n = len(cut_trace.trace.token_ids) if axis.name == "token" else len(cut_trace.sentences)
    places = [int(label) if label.isdigit() else -1 for label in axis.labels]
    return places if all(0 <= place < n for place in places) else []


def is_over(cut_trace: CutTrace, result: Result) -> bool:
    """Whether a result says that it was measured over these very sentences."""
    return bool(result.provenance.get("cut") == cut_trace.cut_hash)


def _kind(problem: Mapping[str, Any]) -> str:
    meta = problem.get("meta") or {}
    if "harmful" not in meta:
        return "problem"
    return "benign request" if not meta["harmful"] else "jailbreak" if meta.get("jailbreak") else "harmful request"


def _outcome(correct: bool | None, gold: str | None, answer: str, state: Any) -> str:
    if correct is not None:
        return "right" if correct else "wrong"
    if gold is not None:
        return "not decided"
    return answer_behaviour(answer, state)


def _question(problem: Mapping[str, Any]) -> str:
    messages = problem.get("messages") or ()
    return str(messages[-1]["content"] if messages else problem.get("prompt") or "")
