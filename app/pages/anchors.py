"""Thought anchors: the sentences that the answer depends on, as a graph, with a pane for the chosen sentence."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from reasonscope.analysis import figures
from reasonscope.analysis.attention.reading import mean_effect
from reasonscope.analysis.figures import AnchorGraph
from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements, readings, state
from reasonscope.app.page_parts.reader import KINDS
from reasonscope.app.page_parts.state import BOUND, Key
from reasonscope.data.sentence_cut import CutTrace
from reasonscope.data.summary import plural

_NAME = "results/anchors/*"
# The sources of a sentence's importance and their labels: effects of sentences on later ones, and numbers per sentence.
_EFFECTS = {"suppression": "suppression", "replacement": "replacement"}
_RECEIVED = {"receiver_scores": "attention received", "close_attention": "attention at the end of the thinking"}
_METHODS = {"anchors": "rollouts", **_EFFECTS, **_RECEIVED}


def show(run: OpenRun) -> None:
    """Show the anchors of a trace of the run."""
    components.heading(
        "Thought anchors",
        "Size is importance; colour and word are the kind of a sentence; lines are its strongest effects.",
    )
    components.damage([problem for method in _METHODS for problem in measurements.damaged(run, method)])
    found = {method: measurements.results(run, method) for method in _METHODS}
    ids = list(dict.fromkeys(id for results in found.values() for id in results if id != "all"))
    if not ids:
        components.missing("the importance of sentences", measurements.command_for(run, _NAME))
        return
    id = st.selectbox("Trace", ids, key=Key.TRACE, bind=BOUND)
    measured = {method: results[id] for method, results in found.items() if id in results}
    metrics = _metrics(measured)
    if metrics:
        metric = st.selectbox("Metric", list(metrics), key=Key.METRIC, bind=BOUND)
        _graph(run, id, metric, metrics[metric])
    _not_measured(run, id, measured)


def _not_measured(run: OpenRun, id: str, measured: Mapping[str, Result]) -> None:
    """Which metrics were not measured on the trace, and the command that measures them."""
    for result in measured.values():
        if not result.measured:
            st.warning(components.as_text(f"{result.quantity}: not measured on this trace: {result.reason}"))
    if missing := [method for method in _METHODS if method not in measured]:
        with st.expander(f"Not measured on this trace: {', '.join(_METHODS[method] for method in missing)}"):
            for line in dict.fromkeys(measurements.command_of(run, method) for method in missing):
                st.code(f"{line} --trace {shlex.quote(id)}", language="bash", wrap_lines=True)


@dataclass(frozen=True, kw_only=True)
class _Metric:
    """A measure of importance: the result that it comes from, the values (sentence,), and effects (target, source)."""

    result: Result
    importance: NDArray[np.float64]
    effects: NDArray[np.float64] | None = None
    unit: str = ""


def _metrics(measured: Mapping[str, Result]) -> dict[str, _Metric]:
    """The metrics of a trace by name, those from rollouts first."""
    found: dict[str, _Metric] = {}
    for method, result in measured.items():
        axes = [axis.name for axis in result.axes]
        if not result.measured:
            continue
        if axes == ["metric", "sentence"]:
            effects = result.arrays.get("effects")
            square = None if effects is None else np.asarray(effects, dtype=np.float64)
            named = dict(zip(result.axes[0].labels, result.values, strict=True))
            for name in sorted(
                named, key=lambda name: name in ("accuracy", "published_accuracy")
            ):  # without importance, so last
                found[name.replace("_", " ")] = _Metric(
                    result=result, importance=named[name], effects=square, unit=result.unit_of(name)
                )
        elif method in _EFFECTS and result.values.ndim == 2:
            found[_EFFECTS[method]] = _Metric(
                result=result, importance=mean_effect(result.values), effects=result.values, unit=result.unit_of("")
            )
        elif axes == ["sentence"]:
            found[_RECEIVED[method]] = _Metric(result=result, importance=result.values, unit=result.unit_of(""))
    return found


def _graph(run: OpenRun, id: str, metric: str, what: _Metric) -> None:
    result, importance = what.result, what.importance
    read = readings.cut_of(run, id)
    tags, texts = _sentences(result, read, len(importance))
    truth = result.numbers.get("depends_on") or (read.depends_on if readings.is_over(read, result) else None)
    said = "Labelled" if read.labels == "published" else "True"
    graph = AnchorGraph(importance=importance, effects=what.effects, tags=tags, texts=texts, truth=truth)
    chosen = state.recall_number(Key.SENTENCE)
    chosen = chosen if chosen is not None and chosen < len(importance) else None
    left, right = st.columns([1, 3])
    with left:
        layout = st.segmented_control("Layout", ["circle", "tree"], default="circle", key=Key.LAYOUT, bind=BOUND)
        links = st.slider("Links per sentence, each way", 0, 10, 3, key=Key.LINKS, bind=BOUND)
        least = st.slider("Lowest importance, % of the highest", 0, 100, 0, key=Key.LEAST, bind=BOUND)
        direction = st.radio(
            "Tree of what it", ["affects", "depends on"], disabled=layout != "tree", key=Key.DIRECTION, bind=BOUND
        )
        depth = st.slider("Depth of the tree", 1, 5, 2, key=Key.DEPTH, bind=BOUND, disabled=layout != "tree")
        overlay = truth is not None and st.toggle(f"{said} dependencies", key=Key.TRUTH, bind=BOUND)
    with right:
        root = None if layout != "tree" else chosen if chosen is not None else int(np.nanargmax(np.abs(importance)))
        figure = figures.anchor_graph(
            graph,
            KINDS,
            title=f"{metric}, {plural(len(importance), 'sentence')}",
            measure=f"{metric} [{what.unit}]" if what.unit else metric,
            marked=chosen,
            per_node=links,
            least=least / 100,
            root=root,
            direction="out" if direction == "affects" else "in",
            depth=depth,
            truth=overlay,
        )
        if layout == "tree" and not any(root in link[:2] for link in graph.links(links)):
            st.caption(f"Sentence {root} has no link: no effect on it or of it was measured.")
        command = f"{measurements.command_of(run, result.method)} --trace {shlex.quote(id)}"
        clicked = components.show_figure(figure, name="anchors", command=command, key="anchors-graph", clickable=True)
    picked = next((int(point["customdata"][0]) for point in clicked if point.get("customdata")), None)
    if components.is_new("anchors-graph", picked):
        state.remember(Key.SENTENCE, picked)
        chosen = picked
    _pane(run, id, graph, what, metric, chosen)
    components.provenance(result)


def _sentences(result: Result, read: CutTrace, n: int) -> tuple[list[str], list[str]]:
    """Tags and texts as the result has them, else of the trace as it is split here."""
    tags, texts = result.numbers.get("tags"), result.numbers.get("texts")
    if isinstance(tags, list) and isinstance(texts, list) and len(tags) == len(texts) == n:
        return [str(tag) for tag in tags], [str(text) for text in texts]
    own = list(read.sentences) if readings.is_over(read, result) else []
    return [s.tag for s in own] or ["unknown"] * n, [s.text for s in own] or [f"sentence {i}" for i in range(n)]


def _pane(run: OpenRun, id: str, graph: AnchorGraph, what: _Metric, metric: str, chosen: int | None) -> None:
    """The chosen sentence: its text, its importance with interval and chance, what was written instead, and its
    links."""
    if chosen is None:
        st.caption("Choose a sentence in the graph to see its links.")
        return
    _walk(chosen, len(graph.texts))
    st.text(graph.texts[chosen])
    components.formulas(graph.texts[chosen])
    st.dataframe(_rows(what, metric, chosen), hide_index=True, key="anchor-row", height="content")
    st.caption(_kind(graph, what, chosen))
    _instead(measurements.results(run, "anchors").get(id), chosen)
    links = graph.links(5)
    given = [(s, e) for s, t, e in links if t == chosen]
    made = [(t, e) for s, t, e in links if s == chosen]
    for column, title, ends in zip(st.columns(2), ("It depends on", "It affects"), (given, made), strict=True):
        with column:
            st.caption(title if ends else f"{title}: nothing measured")
            for other, effect in sorted(ends, key=lambda end: -abs(end[1]))[:5]:
                pair = (chosen, other) if ends is given else (other, chosen)
                text = components.as_text(
                    f"{other} ({effect:+.3g}{_of_pair(what.result, pair)}) {graph.texts[other][:90]}"
                )
                if st.button(text, key=f"link-{title}-{other}", type="tertiary"):
                    _choose(other)
    places = readings.places_of(readings.cut_of(run, id), what.result)
    if places and places[chosen] >= 0 and st.button("Read it in the trace", icon=":material/article:"):
        state.go("trace", **{Key.TRACE: id, Key.SENTENCE: places[chosen]})


def _choose(sentence: int) -> None:
    state.remember(Key.SENTENCE, sentence)
    st.rerun()


def _walk(chosen: int, n: int) -> None:
    """The number of the sentence, and buttons to the previous and the next one."""
    heading, before, behind = st.columns([4, 1, 1], vertical_alignment="bottom")
    heading.subheader(f"Sentence {chosen}", anchor=False)
    if before.button("Previous", icon=":material/arrow_back:", disabled=chosen == 0, width="stretch"):
        _choose(chosen - 1)
    if behind.button("Next", icon=":material/arrow_forward:", disabled=chosen == n - 1, width="stretch"):
        _choose(chosen + 1)


def _kind(graph: AnchorGraph, what: _Metric, chosen: int) -> str:
    """The kind of the sentence, and how many rollouts or later sentences its numbers are means of."""
    said = [graph.tags[chosen].replace("_", " ")]
    if "n" in what.result.arrays:
        said.append(f"n = {int(what.result.arrays['n'][chosen])} rollouts from before it")
    if "replaced" in what.result.numbers:
        said.append(f"n = {what.result.numbers['replaced'][chosen]} other sentences in its place")
    if what.effects is not None and what.result.values.ndim == 2 and what.result.axes[-1].name == "source":
        said.append(f"mean over n = {int(np.isfinite(what.effects[:, chosen]).sum())} later sentences")
    return components.as_text(" · ".join(said))


def _of_pair(result: Result, pair: tuple[int, int]) -> str:
    """What chance gives for a pair (target, source), if the null has pairs."""
    if result.null is None or [axis.name for axis in result.axes] != ["target", "source"]:
        return ""
    return f", chance {components.between(result.null, pair)}"


def _rows(what: _Metric, metric: str, chosen: int) -> list[dict[str, object]]:
    """Every number of the sentence in this result, the shown metric first: value, unit, 95 % interval, chance."""
    result = what.result
    if [axis.name for axis in result.axes] != ["metric", "sentence"]:
        at: tuple[int, ...] | None = (chosen,) if result.values.ndim == 1 else None
        value = components.number(float(what.importance[chosen]))
        return [{"number": metric, "value": value, "unit": what.unit, **_bands(result, at)}]
    lines = sorted(enumerate(result.axes[0].labels), key=lambda line: line[1].replace("_", " ") != metric)
    return [
        {
            "number": name.replace("_", " "),
            "value": components.number(float(result.values[i, chosen])),
            "unit": result.unit_of(name),
            **_bands(result, (i, chosen)),
        }
        for i, name in lines
    ]


def _bands(result: Result, at: tuple[int, ...] | None) -> dict[str, object]:
    return {
        "95 % interval": components.between(result.interval, at),
        "chance": components.between(result.null, at),
    }


def _instead(result: Result | None, chosen: int) -> None:
    """What rollouts wrote instead of the sentence, and how often they were right with it."""
    written = None if result is None else result.numbers.get("resampled")
    if not isinstance(written, list) or chosen >= len(written):
        st.caption("What rollouts wrote instead of this sentence was not stored.")
        return
    if not written[chosen]:
        st.caption("Every stored rollout wrote exactly this sentence again.")
        return
    st.caption("What rollouts wrote instead")
    rows = [
        {
            "instead": row["text"],
            "rollouts": f"{row['n']} of {row['of']}",
            "right with it": f"{row['right']:.2f} ({row['ci'][0]:.2f} … {row['ci'][1]:.2f}), n = {row['judged']}"
            if row["judged"]
            else "not judged",
        }
        for row in written[chosen]
    ]
    st.dataframe(rows, hide_index=True, key="anchor-instead")
