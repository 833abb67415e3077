"""MI peaks: how much each token's state says about the answer, with the band of chance, and the words at the peaks."""

import shlex

import streamlit as st

from reasonscope.analysis import figures
from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements, readings, state
from reasonscope.app.page_parts.colourings import colouring_name
from reasonscope.app.page_parts.state import BOUND, Key
from reasonscope.data.sentence_cut import sentence_at

_NAME = "results/mi/*"


def show(run: OpenRun) -> None:
    """Show the MI of a trace of the run."""
    components.heading(
        "MI peaks", "How much the state at each token says about the answer; grey is the range of chance."
    )
    components.damage(measurements.damaged(run, "mi"))
    found = measurements.results(run, "mi")
    words = found.pop("all", None)
    if not found:
        components.missing("MI peaks", measurements.command_for(run, _NAME))
    else:
        id = st.selectbox("Trace", list(found), key=Key.TRACE, bind=BOUND)
        if found[id].measured:
            _curve(run, id, found[id])
        else:
            st.warning(components.as_text(f"Not measured on this trace: {found[id].reason}"))
    _models(run)
    if words is not None:
        _words(run, words)


def _curve(run: OpenRun, id: str, result: Result) -> None:
    sites = result.axes[0].labels
    site = st.selectbox("Site", sites, index=len(sites) - 1, key=Key.SITE, bind=BOUND)
    base = measurements.results(run, "mi_base").get(id)
    beside = {}
    if base is not None and base.measured and site in base.axes[0].labels and base.axes[-1] == result.axes[-1]:
        beside["base model"] = base.at(site=site)
    figure = figures.along(result, only=[site], beside=beside)
    command = f"{measurements.command_for(run, _NAME)} --trace {shlex.quote(id)} --sites {site}"
    st.caption(
        "Click on the curve to open its sentence."
        + ("" if beside else " The base model's curve was not stored at this site.")
    )
    clicked = components.show_figure(figure, name="mi_peaks", command=command, key="mi-curve", clickable=True)
    numbers = result.numbers.get(site)
    if isinstance(numbers, dict):
        components.show_numbers(numbers, key="mi-numbers")
    components.provenance(result)
    picked = int(clicked[0]["x"]) if clicked else None
    if components.is_new("mi-curve", picked) and picked is not None:
        _open_at(run, id, picked, colouring_name("mi", site))


def _models(run: OpenRun) -> None:
    """The reasoning model compared with its base, on the same traces."""
    st.subheader("Reasoner minus base", anchor=False)
    found = measurements.results(run, "mi_compare").get("all")
    if found is None:
        components.missing("MI of the base model", measurements.command_for(run, "results/mi_compare/*"))
        return
    traces = found.numbers.get("traces") or {}
    rows = [
        {
            "number": name.replace("_", " "),
            "reasoner minus base": components.number(float(found.values[i])),
            "95 % interval": components.between(found.interval, i),
            "chance": components.between(found.null, i),
            "traces": traces.get(name),
        }
        for i, name in enumerate(found.axes[-1].labels)
    ]
    st.dataframe(rows, hide_index=True, key="mi-models")
    components.provenance(found)


def _open_at(run: OpenRun, id: str, token: int, colour: str) -> None:
    """The trace, at the sentence that holds the token."""
    sentence = sentence_at(readings.cut_of(run, id), token)
    state.go("trace", **{Key.TRACE: id, Key.SENTENCE: sentence, Key.COLOUR: colour})


def _words(run: OpenRun, words: Result) -> None:
    st.subheader("Words at the peaks", anchor=False)
    told = words.numbers.get("words")
    if isinstance(told, dict):
        rows = [
            {"word": word, **{k.replace("_", " "): v for k, v in row.items() if k != "word"}}
            for word, row in told.items()
        ]
        st.dataframe(rows, hide_index=True, key="mi-words")
        st.caption(
            "p: peaks at random places of the same traces. q: the same over all words. Listed: published as a thinking token."
        )
    components.provenance(words)
    with st.expander("As a figure"):
        figure = figures.points(words)
        components.show_figure(
            figure, name="mi_words", command=measurements.command_for(run, _NAME), key="mi-words-figure"
        )
