"""Trace: one trace as it was written, sentence by sentence, coloured by what a method says about it."""

import math
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import streamlit as st

from reasonscope.analysis import figures
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import colourings, components, measurements, readings, state
from reasonscope.app.page_parts.alternatives import ShownAlternatives, shown_alternatives
from reasonscope.app.page_parts.colourings import Colouring
from reasonscope.app.page_parts.reader import show_reader
from reasonscope.app.page_parts.state import BOUND, Key
from reasonscope.data.sentence_cut import CutTrace
from reasonscope.data.summary import plural
from reasonscope.data.text.align import token_strings
from reasonscope.data.trace import Sentence


def show(run: OpenRun) -> None:
    """Show a trace of the run."""
    components.heading(
        "Trace", "One trace as it was written. Colour it by what a method says about its tokens or sentences."
    )
    found = readings.trace_rows(run)
    if not found:
        st.info("The run is empty: it has no traces to read.")
        st.code(f"reasonscope record --out {run.path}", language="bash")
        return
    by_id = {row.id: row for row in found}
    left, right = st.columns([3, 2])
    chosen = left.selectbox(
        "Trace",
        list(by_id),
        key=Key.TRACE,
        bind=BOUND,
        on_change=_forget_sentence,
    )
    names = colourings.colouring_names(run, chosen)
    colour = right.selectbox("Colour by", names, key=Key.COLOUR, bind=BOUND)
    _read(run, chosen, colour)
    _measured(run, chosen)


def _measured(run: OpenRun, id: str) -> None:
    """The figures of any saved result of the trace, including signals without a colour."""
    found = {result.method: result for result in measurements.trace_results(run, id)}
    if not found:
        return
    names = {method: method.replace("_", " ") for method in found}
    method = st.selectbox(
        "Everything measured on this trace", list(names), format_func=lambda name: names.get(name, name), index=None,
        placeholder="Choose a result to see all of it", key=Key.MEASURED, bind=BOUND,
    )  # fmt: skip
    if method not in found:
        return
    result = found[method]
    if not result.measured:
        st.warning(components.as_text(f"Not measured on this trace: {result.reason}"))
        return
    command = f"{measurements.command_of(run, method)} --trace {shlex.quote(id)}"
    for name, figure in figures.of_result(result).items():
        components.show_figure(figure, name=f"{method}_{name}", command=command, key=f"measured-{name}")
    if numbers := {name: value for name, value in result.numbers.items() if _is_number(value)}:
        components.show_numbers(numbers, key="measured-numbers")
    components.provenance(result)


def _is_number(value: object) -> bool:
    """Excludes texts, texts by name, and lists, which describe sentences or tokens and are long."""
    texts = isinstance(value, Mapping) and all(isinstance(inner, str) for inner in value.values())
    return not texts and not isinstance(value, list | str)


def _forget_sentence() -> None:
    state.remember(Key.SENTENCE, None)


@st.fragment  # type: ignore[untyped-decorator]
def _read(run: OpenRun, id: str, colour: str) -> None:
    """The reader and the details of the chosen sentence; only this part runs again when another one is chosen."""
    read = readings.cut_of(run, id)
    with components.show_errors():
        colouring = colourings.colouring(run, id, colour)
        other = shown_alternatives(run, id)
        st.caption(components.as_text(_facts(run, read)))
        show_reader(
            read,
            colouring,
            other,
            key="reader",
            sentence=state.recall_number(Key.SENTENCE),
            query=state.recall(Key.QUERY),
            dark=state.is_dark(),
            on_sentence=lambda: state.remember(Key.SENTENCE, st.session_state["reader"]["sentence"]),
            on_query=lambda: state.remember(Key.QUERY, st.session_state["reader"]["query"]),
        )
        _chosen(run, read, colouring, other)


def _chosen(run: OpenRun, read: CutTrace, colouring: Colouring | None, other: ShownAlternatives | None) -> None:
    """The chosen sentence: its position, its values, alternatives to its tokens, and its formulas."""
    wanted = state.recall_number(Key.SENTENCE)
    sentence = next((one for one in read.sentences if one.index == wanted), None)
    if sentence is None:
        st.caption("Choose a sentence to see its values.")
        return
    what = components.as_text(sentence.tag.replace("_", " "))
    st.markdown(f"**Sentence {sentence.index}** · {what} · tokens {sentence.tokens.start} to {sentence.tokens.stop}")
    if colouring is not None:
        st.caption(components.as_text(f"{colouring.title}: {_value(sentence, colouring)}. {colouring.about}"))
    _others(run, read, sentence, other)
    components.formulas(sentence.text)


def _value(sentence: Sentence, colouring: Colouring) -> str:
    """The sentence's value with interval and chance, or the mean and range over its tokens."""
    unit = f" {colouring.unit}" if colouring.unit else ""
    if colouring.per == "token":
        known = colouring.values[sentence.tokens.slice]
        known = known[np.isfinite(known)]
        if not len(known):
            return "not measured here"
        ends = components.ends((float(known.min()), float(known.max())))
        return f"mean {known.mean():.4g}{unit}, lowest and highest {ends} (n = {plural(len(known), 'token')})"
    value = float(colouring.values[sentence.index])
    said = [f"{components.number(value)}{unit}"]
    for name, band in (("95 % interval", colouring.interval), ("chance", colouring.null)):
        low, high = (math.nan, math.nan) if band is None else band[:, sentence.index].tolist()
        said.append(f"{name} {components.ends((low, high))}")
    return ", ".join(said)


def _facts(run: OpenRun, read: CutTrace) -> str:
    row = next(row for row in readings.trace_rows(run) if row.id == read.trace.id)
    steered = run.store.meta.get("steered")
    by = f" · steered by {steered.get('name')}" if steered else ""
    return (
        f"{row.outcome} · answer {row.answer or 'none'} · {readings.length_of(row)} · {plural(len(read.sentences), 'sentence')}"
        f" · thinking {row.state} · {read.labels} sentence labels{by}"
    )


def _others(run: OpenRun, read: CutTrace, sentence: Sentence, other: ShownAlternatives | None) -> None:
    """The tokens of a sentence, how likely each was, and what else the model could have written."""
    if not len(sentence.tokens):
        return
    with st.expander("What else could have been written here"):
        if other is None:
            command = f"{measurements.command_for(run, 'results/alternatives/*')} --trace {shlex.quote(read.trace.id)}"
            components.missing("the likeliest tokens at each place", command)
            return
        st.caption(
            "From reading the trace again at temperature 1. Hover over a token above, or click on it, to see the same."
        )
        st.dataframe(_other_rows(read, sentence, other), hide_index=True, key="alternatives")


def _other_rows(read: CutTrace, sentence: Sentence, other: ShownAlternatives) -> list[dict[str, Any]]:
    pieces = token_strings(read.trace.text, read.trace.offsets)
    return [
        {
            "token": token,
            "written": components.visible(pieces[token]),
            "probability": other.chance(token),
            "likeliest": "  ".join(f"{components.visible(text)} {share:.1%}" for text, share in other.at(token)),
        }
        for token in range(sentence.tokens.start, sentence.tokens.stop)
    ]
