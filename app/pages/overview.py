"""Overview of a run: its traces, how long and how well it thought, and what was measured on it."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import streamlit as st

from reasonscope.analysis import figures
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements, readings, state
from reasonscope.app.page_parts.readings import TraceRow
from reasonscope.app.page_parts.state import BOUND, Key

_SIGNS = {
    "right": "✓ right",
    "wrong": "✗ wrong",
    "refused": "⊘ refused",
    "complied": "→ complied",
    "unclear": "? unclear",
}
_MANY = 5000  # marks in a figure
_FEW = 8  # a table with up to so many rows is shown without scrolling


def show(run: OpenRun) -> None:
    """Show the overview of the run."""
    components.heading(f"Run {run.name}", "What the run is, its traces, and what was measured on them.")
    _card(run)
    found = readings.trace_rows(run)
    if not found:
        st.info("The run is empty: no trace was stored yet.")
        st.code(f"reasonscope record --out {run.path}", language="bash")
        return
    _table(run, found)
    _figures(run, found)
    _analyses(run)


def _card(run: OpenRun) -> None:
    meta = run.store.meta
    found = readings.trace_rows(run)
    outcomes = Counter(row.outcome for row in found)
    judged = outcomes["right"] + outcomes["wrong"]
    asked = sum(row.kind != "problem" for row in found)
    shares = {
        "Right": (outcomes["right"], judged),
        "Refused": (outcomes["refused"], asked),
        "Cut off": (sum(row.state == "truncated" for row in found), len(found)),
    }
    first, *others = st.columns(1 + len(shares))
    first.metric("Traces", str(len(found)))
    first.caption(f"of {len({row.group for row in found})} problems")
    for column, (name, (part, n)) in zip(others, shares.items(), strict=True):
        column.metric(name, f"{part} of {n}" if n else "–")
        given_up = f"; {outcomes['not decided']} not decided" if name == "Right" and outcomes["not decided"] else ""
        column.caption(
            f"share {part / n:.2f}, 95 %: {components.share_interval(part, n)}{given_up}" if n else "none of this kind"
        )
    model: Any = meta.get("model") or {}
    imported: Any = meta.get("imported") or {}
    sampling: Any = meta.get("sampling") or {}
    lines = {
        "Model": model.get("name") or (f"unknown: imported from {imported.get('from')}" if imported else "unknown"),
        "Sites": ", ".join(run.store.sites) or "none: text only",
        "Seed": sampling.get("seed", "–"),
        "Sampling": ", ".join(f"{key} {value}" for key, value in sampling.items() if key != "seed") or "–",
        "Weights": str(model.get("weights", "–"))[:16],
        "Versions": ", ".join(f"{name} {value}" for name, value in (model.get("versions") or {}).items()) or "–",
    }
    if steered := meta.get("steered"):
        lines["Steered by"] = f"{steered.get('name')} ({steered.get('hash')})"
    if meta.get("note"):
        lines["Note"] = meta["note"]
    with st.expander("The run's card", expanded=False):
        st.table(
            [{"what": name, "value": components.as_text(str(value))} for name, value in lines.items()], hide_index=True
        )


def _table(run: OpenRun, found: tuple[TraceRow, ...]) -> None:
    st.subheader("Traces", anchor=False)
    search, outcome, asked = st.columns([2, 1, 1])
    words = search.text_input("Search ids, questions and answers", key=Key.SEARCH, bind=BOUND).lower()
    outcomes = outcome.multiselect("Outcome", sorted({row.outcome for row in found}), key=Key.OUTCOME, bind=BOUND)
    kinds = asked.multiselect("Asked", sorted({row.kind for row in found}), key=Key.ASKED, bind=BOUND)
    length, difficulty = _ranges(found)
    kept = [
        row
        for row in found
        if length(row.thinking_tokens)
        and difficulty(row.difficulty)
        and words in f"{row.id} {row.question} {row.answer}".lower()
        and (not outcomes or row.outcome in outcomes)
        and (not kinds or row.kind in kinds)
    ]
    st.caption(f"{len(kept)} of {len(found)} traces. Choose a row to read it; click on a heading to sort.")
    table = [
        {
            "trace": row.id,
            "outcome": _SIGNS[row.outcome],
            "thinking tokens": row.thinking_tokens,
            "difficulty": row.difficulty,
            "asked": row.kind,
            "answer": row.answer,
            "thinking": row.state,
            "question": row.question,
        }
        for row in kept
    ]
    chosen = st.dataframe(
        table,
        hide_index=True,
        placeholder="",
        on_select="rerun",
        selection_mode="single-row",
        key="traces-table",
        height=320 if len(table) > _FEW else "content",
    )
    picked = chosen["selection"]["rows"]
    if picked and picked[0] < len(kept):
        state.go("trace", **{Key.TRACE: kept[picked[0]].id})


def _ranges(found: tuple[TraceRow, ...]) -> list[Callable[[float | None], bool]]:
    """Whether a length and a difficulty lie between the chosen ends."""
    measures = {
        Key.LENGTH: ("Thinking tokens", [row.thinking_tokens for row in found if row.thinking_tokens is not None]),
        Key.DIFFICULTY: ("Difficulty", [math.ceil(row.difficulty) for row in found if row.difficulty is not None]),
    }
    chosen = []
    for column, (key, (title, values)) in zip(st.columns(2), measures.items(), strict=True):
        whole = (min(values, default=0), max(values, default=0))
        varies = whole[0] < whole[1]
        chosen.append(_within(whole, column.slider(title, *whole, whole, key=key, bind=BOUND) if varies else whole))
    return chosen


def _within(whole: tuple[int, int], ends: tuple[int, int]) -> Callable[[float | None], bool]:
    """A filter for a range; an unknown value passes until the range excludes something."""
    return lambda value: ends == whole or (value is not None and ends[0] <= math.ceil(value) <= ends[1])


def _figures(run: OpenRun, found: tuple[TraceRow, ...]) -> None:
    shown = [row for row in found if row.difficulty is not None][:_MANY]
    if not shown:
        return
    st.subheader("Length and accuracy by difficulty", anchor=False)
    command = f"reasonscope app {run.path}"
    left, right = st.columns(2)
    with left:
        traces = [trace for trace in readings.all_traces(run)[:_MANY] if trace.problem.difficulty is not None]
        figure = figures.thinking_by_difficulty(traces)
        components.show_figure(figure, name="thinking_by_difficulty", command=command, key="length-figure")
    with right:
        judged = [(row.difficulty or 0.0, row.outcome == "right") for row in shown if row.outcome in ("right", "wrong")]
        figure = figures.accuracy_by_difficulty(judged)
        components.show_figure(figure, name="accuracy_by_difficulty", command=command, key="accuracy-figure")


def _analyses(run: OpenRun) -> None:
    st.subheader("What was measured", anchor=False)
    measured = measurements.run_measurements(run)
    st.dataframe(
        [
            {
                "measured": one.title,
                "there": f"✓ {one.there}" if one.there else "no",
                "command": one.command,
            }
            for one in measured
        ],
        hide_index=True,
        key="analyses-table",
        height="content",
        column_config={
            "measured": st.column_config.TextColumn(width="medium"),
            "there": st.column_config.TextColumn(width="small"),
        },
    )
    components.damage(measurements.damaged(run))
