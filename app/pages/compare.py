"""Compare two runs on the problems that both answered, or two traces sentence by sentence."""

from collections.abc import Callable
from difflib import SequenceMatcher
from html import escape

import numpy as np
import streamlit as st

from reasonscope.analysis.runs.opened_run import OpenRun, open_run
from reasonscope.analysis.traces.run_difference import paired_difference
from reasonscope.app.page_parts import components, readings, state
from reasonscope.app.page_parts.reader import KINDS
from reasonscope.app.page_parts.readings import TraceRow
from reasonscope.app.page_parts.state import BOUND, Key
from reasonscope.data.sentence_cut import CutTrace
from reasonscope.data.summary import plural


def show(run: OpenRun) -> None:
    """Show the comparison that the reader chooses."""
    components.heading("Compare", "Two runs on the problems that both answered, or two traces sentence by sentence.")
    names = state.offered_runs()
    other_name = st.selectbox("With run", list(names), key=Key.OTHER_RUN, bind=BOUND)
    other = open_run(names[other_name]) if names else run
    ours, theirs = ({row.id: row for row in readings.trace_rows(one)} for one in (run, other))
    if not ours or not theirs:
        st.info("One of the two runs is empty: there is nothing to compare yet.")
        return
    if other != run:
        _runs(run, other)
    left, right = st.columns(2)
    pairs_first = sorted(ours, key=lambda id: id not in theirs)
    one = left.selectbox(components.as_text(f"Trace of {run.name}"), pairs_first, key=Key.TRACE, bind=BOUND)
    ids = list(theirs)
    same = ids.index(one) if one in theirs else 0
    same = (same + 1) % len(ids) if other == run else same  # comparing a trace with itself says nothing
    two = right.selectbox(
        components.as_text(f"Trace of {other.name}"), ids, index=same, key=Key.OTHER_TRACE, bind=BOUND
    )
    first, second = readings.cut_of(run, one), readings.cut_of(other, two)
    columns = st.columns(2)
    for column, row in zip(columns, (ours[one], theirs[two]), strict=True):
        column.caption(components.as_text(f"{row.outcome} · answer {row.answer or 'none'} · {readings.length_of(row)}"))
    st.html(_aligned(first, second))


def _runs(run: OpenRun, other: OpenRun) -> None:
    """Outcomes and lengths of the traces that both runs have, with the interval and the chance of each difference."""
    ours, theirs = ({row.id: row for row in readings.trace_rows(one)} for one in (run, other))
    both = [id for id in ours if id in theirs]
    said = f"In both: {plural(len(both), 'trace')} (n = {len(ours)} in {run.name}, {len(theirs)} in {other.name})."
    st.caption(components.as_text(said))
    if not both:
        return
    judged = [id for id in both if {ours[id].outcome, theirs[id].outcome} <= {"right", "wrong"}]
    asked = [id for id in both if ours[id].kind != "problem"]
    told = [id for id in both if None not in (ours[id].thinking_tokens, theirs[id].thinking_tokens)]
    measured: dict[str, tuple[list[str], Callable[[TraceRow], float]]] = {
        "right": (judged, lambda row: float(row.outcome == "right")),
        "refused": (asked, lambda row: float(row.outcome == "refused")),
        "thinking tokens": (told, lambda row: float(row.thinking_tokens or 0)),
    }
    rows = []
    for name, (ids, value) in measured.items():
        if not ids:
            continue
        first, second = (np.array([value(one[id]) for id in ids]) for one in (ours, theirs))
        groups = [ours[id].group for id in ids]
        found = paired_difference(first, second, groups, verdicts=name in ("right", "refused"))
        rows.append(
            {
                "mean": name,
                run.name if run.name != other.name else "this run": f"{found.ours:.4g}",
                other.name if run.name != other.name else "the other": f"{found.theirs:.4g}",
                "difference": f"{found.difference:+.4g}",
                "95 % interval": components.ends(found.interval),
                "chance": components.ends(found.chance),
                "n": f"{found.n} of {found.n_groups} problems",
            }
        )
    st.dataframe(rows, hide_index=True, key="compare-runs")
    st.caption("Interval: over problems. Chance: the runs exchanged problem by problem, seed 0.")


def _aligned(first: CutTrace, second: CutTrace) -> str:
    """The sentences of two traces in rows; sentences with the same words are in the same row."""
    a, b = ([sentence.text for sentence in read.sentences] for read in (first, second))
    rows = []
    for what, start, stop, from_, to in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for k in range(max(stop - start, to - from_)):
            cells = (
                _cell(read, at + k if at + k < end else None, same=what == "equal")
                for read, at, end in ((first, start, stop), (second, from_, to))
            )
            rows.append("".join(cells))
    style = "display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:.3rem 1rem"
    return f"<div style='{style}'>{''.join(rows)}</div>"


def _cell(read: CutTrace, index: int | None, *, same: bool) -> str:
    if index is None:
        return "<div></div>"
    sentence = read.sentences[index]
    word, colour = KINDS.get(sentence.tag, ("other", "#7A7A7A"))
    style = f"border-left:.35rem solid {colour};padding-left:.5rem;overflow-wrap:anywhere;opacity:{0.6 if same else 1}"
    sign = "=" if same else "≠"
    return (
        f"<div style='{style}'><small>{sign} {sentence.index} {escape(word)}</small><br>{escape(sentence.text)}</div>"
    )
