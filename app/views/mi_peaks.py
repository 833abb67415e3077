"""MI peaks: how much each token's state says of the answer, with the band of chance, and the words that stand at the peaks."""

import streamlit as st

from reasonscope.analysis import figures
from reasonscope.analysis.results import Result
from reasonscope.app import components, measurements, readings, state
from reasonscope.app.runs import Run
from reasonscope.app.state import BOUND, Key

_NAME = "results/mi_peaks/*"


def show(run: Run) -> None:
    components.heading(
        "MI peaks", "How much the state behind each token says of the answer; grey is what chance gives."
    )
    components.damage(measurements.damaged(run, "mi_peaks"))
    found = measurements.results(run, "mi_peaks")
    words = found.pop("all", None)
    if not found:
        components.missing("MI peaks", measurements.command(run, _NAME))
        return
    id = st.selectbox("Trace", list(found), key=Key.TRACE, bind=BOUND)
    result = found[id]
    if not result.measured:
        st.warning(components.as_text(f"Not measured on this trace: {result.reason}"))
        return
    _curve(run, id, result)
    if words is not None:
        _words(run, words)


def _curve(run: Run, id: str, result: Result) -> None:
    sites = result.axes[0].labels
    site = st.selectbox("Site", sites, index=len(sites) - 1, key=Key.SITE, bind=BOUND)
    figure = figures.along(result, only=[site])
    command = f"{measurements.command(run, _NAME)} --trace {id}"
    st.caption("A click on the curve opens its sentence.")
    clicked = components.show_figure(figure, name="mi_peaks", command=command, key="mi-curve", clickable=True)
    numbers = result.numbers.get(site)
    if isinstance(numbers, dict):
        components.show_numbers(numbers, key="mi-numbers")
    components.provenance(result)
    if clicked:
        token = int(result.axes[-1].labels[int(clicked[0]["x"])])
        _open_at(run, id, token, f"result:mi_peaks:{site}")


def _open_at(run: Run, id: str, token: int, colour: str) -> None:
    """The trace at the sentence that holds the token."""
    read = readings.reading(run, id)
    before = [one.index for one in read.sentences if one.tokens.start <= token]
    state.go("trace", **{Key.TRACE: id, Key.SENTENCE: before[-1] if before else 0, Key.COLOUR: colour})


def _words(run: Run, words: Result) -> None:
    st.subheader("Words at the peaks", anchor=False)
    told = words.numbers.get("words")
    if isinstance(told, dict):
        rows = [{"word": word, **{k: v for k, v in row.items() if k != "word"}} for word, row in told.items()]
        st.dataframe(rows, hide_index=True, key="mi-words")
    components.provenance(words)
    with st.expander("As a figure"):
        figure = figures.along(words)
        components.show_figure(figure, name="mi_words", command=measurements.command(run, _NAME), key="mi-words-figure")
