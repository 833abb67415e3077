"""Trace: one trace as it was written, sentence by sentence, coloured by what a method says of it."""

import shlex

import numpy as np
import streamlit as st

from reasonscope.app import colourings, components, measurements, readings, state
from reasonscope.app.alternatives import Alternatives, alternatives
from reasonscope.app.reader import show_reader
from reasonscope.app.runs import Run
from reasonscope.app.state import BOUND, Key
from reasonscope.data.align import token_strings
from reasonscope.data.trace import Sentence


def show(run: Run) -> None:
    components.heading(
        "Trace", "One trace as it was written. Colour it by what a method says of its tokens or sentences."
    )
    found = readings.rows(run)
    if not found:
        st.info("The run is empty: there is no trace to read.")
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


def _forget_sentence() -> None:
    state.remember(Key.SENTENCE, None)


@st.fragment  # type: ignore[untyped-decorator]
def _read(run: Run, id: str, colour: str) -> None:
    """The reader and what it says of the chosen sentence; only this part runs again when another one is chosen."""
    read = readings.reading(run, id)
    with components.told():
        colouring = colourings.colouring(run, id, colour)
        other = alternatives(run, id)
        row = next(row for row in readings.rows(run) if row.id == id)
        facts = (
            f"{row.outcome} · answer {row.answer or 'none'} · {row.thinking_tokens} thinking tokens · {len(read.sentences)} sentences"
            f" · thinking {row.state} · {read.labels} sentence labels"
        )
        st.caption(components.as_text(facts))
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


def _chosen(
    run: Run, read: readings.Reading, colouring: colourings.Colouring | None, other: Alternatives | None
) -> None:
    """The chosen sentence: where it stands, its values, what else could have stood there, its formulas set."""
    wanted = state.recall_number(Key.SENTENCE)
    sentence = next((one for one in read.sentences if one.index == wanted), None)
    if sentence is None:
        st.caption("Choose a sentence to see its values.")
        return
    what = sentence.tag.replace("_", " ")
    st.markdown(f"**Sentence {sentence.index}** · {what} · tokens {sentence.tokens.start} to {sentence.tokens.stop}")
    if colouring is not None:
        place = sentence.tokens.slice if colouring.per == "token" else slice(sentence.index, sentence.index + 1)
        known = colouring.values[place]
        known = known[np.isfinite(known)]
        if len(known):
            said = (
                f"{colouring.title}: mean {known.mean():.4g}, lowest {known.min():.4g}, highest {known.max():.4g} {colouring.unit} "
                f"(n = {len(known)}). {colouring.about}"
            )
            st.caption(components.as_text(said))
    _others(run, read, sentence, other)
    components.formulas(sentence.text)


def _others(run: Run, read: readings.Reading, sentence: Sentence, other: Alternatives | None) -> None:
    """The tokens of a sentence, how likely each was, and what else the model could have written there."""
    if not len(sentence.tokens):
        return
    with st.expander("What else could have stood here"):
        if other is None:
            command = f"{measurements.command(run, 'results/alternatives/*')} --trace {shlex.quote(read.trace.id)}"
            components.missing("the likeliest tokens at each place", command)
            return
        st.caption("Read again at temperature 1. Hover over a token above, or click on it, for the same.")
        pieces = token_strings(read.trace.text, read.trace.offsets)
        rows = [
            {
                "token": token,
                "written": components.visible(pieces[token]),
                "probability": other.chance(token),
                "likeliest": "  ".join(f"{components.visible(text)} {share:.1%}" for text, share in other.at(token)),
            }
            for token in range(sentence.tokens.start, sentence.tokens.stop)
        ]
        st.dataframe(rows, hide_index=True, key="alternatives")
