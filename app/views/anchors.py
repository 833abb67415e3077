"""Thought anchors: which sentences the answer hangs on, as a graph, with a pane for the sentence that is chosen."""

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from reasonscope.analysis import figures
from reasonscope.analysis.figures import AnchorGraph
from reasonscope.analysis.results import Result
from reasonscope.app import components, measurements, readings, state
from reasonscope.app.reader import KINDS
from reasonscope.app.readings import Reading
from reasonscope.app.runs import Run
from reasonscope.app.state import BOUND, Key

_NAME = "results/anchors/*"


def show(run: Run) -> None:
    components.heading(
        "Thought anchors",
        "Size is importance, colour and word the kind of a sentence; lines are its strongest effects.",
    )
    components.damage([*measurements.damaged(run, "anchors"), *measurements.damaged(run, "suppression")])
    found, suppressed = measurements.results(run, "anchors"), measurements.results(run, "suppression")
    received = measurements.results(run, "receiver_scores")
    ids = list(dict.fromkeys(id for id in [*found, *suppressed, *received] if id != "all"))
    if not ids:
        components.missing("the importance of sentences", measurements.command(run, _NAME))
        return
    id = st.selectbox("Trace", ids, key=Key.TRACE, bind=BOUND)
    measured = found.get(id), suppressed.get(id), received.get(id)
    metrics = _metrics(*measured)
    if not metrics:
        reason = next((one.reason for one in measured if one is not None), "")
        st.warning(components.as_text(f"Not measured on this trace: {reason}"))
        return
    metric = st.selectbox("Metric", list(metrics), key=Key.METRIC, bind=BOUND)
    result, importance, effects = metrics[metric]
    _graph(run, id, metric, result, importance, effects)


Measured = tuple[Result, NDArray[np.float64], NDArray[np.float64] | None]


def _metrics(anchors: Result | None, suppression: Result | None, received: Result | None) -> dict[str, Measured]:
    """What the importance of a sentence can be, by name: its result, the values, and the effects of sentence on sentence."""
    found: dict[str, Measured] = {}
    if anchors is not None and anchors.measured and [axis.name for axis in anchors.axes] == ["metric", "sentence"]:
        effects = anchors.arrays.get("effects")
        square = None if effects is None else np.asarray(effects, dtype=np.float64)
        named = dict(zip(anchors.axes[0].labels, anchors.values, strict=True))
        for name in sorted(named, key=lambda name: name in ("accuracy", "published_accuracy")):  # no importance: last
            found[name.replace("_", " ")] = anchors, named[name], square
    if suppression is not None and suppression.measured and suppression.values.ndim == 2:
        known = np.isfinite(suppression.values)
        total = np.where(known, suppression.values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        found["suppression"] = suppression, total, suppression.values
    if received is not None and received.measured and [axis.name for axis in received.axes] == ["sentence"]:
        found["attention received"] = received, received.values, None
    return found


def _graph(
    run: Run,
    id: str,
    metric: str,
    result: Result,
    importance: NDArray[np.float64],
    effects: NDArray[np.float64] | None,
) -> None:
    read = readings.reading(run, id)
    tags, texts = _sentences(result, read, len(importance))
    truth = result.numbers.get("depends_on") or (read.depends_on if len(read.sentences) == len(importance) else None)
    graph = AnchorGraph(importance=importance, effects=effects, tags=tags, texts=texts, truth=truth)
    chosen = state.recall_number(Key.SENTENCE)
    chosen = chosen if chosen is not None and chosen < len(importance) else None
    left, right = st.columns([1, 3])
    with left:
        layout = st.segmented_control("Layout", ["circle", "tree"], default="circle", key=Key.LAYOUT, bind=BOUND)
        links = st.slider("Links of a sentence, each way", 0, 10, 3, key=Key.LINKS, bind=BOUND)
        least = st.slider("Least importance, % of the highest", 0, 100, 0, key=Key.LEAST, bind=BOUND)
        direction = st.radio("Tree of what it", ["brings about", "hangs on"], disabled=layout != "tree")
        depth = st.slider("Depth of the tree", 1, 5, 2, key=Key.DEPTH, bind=BOUND, disabled=layout != "tree")
        overlay = truth is not None and st.toggle("True dependencies", value=False)
    with right:
        root = None if layout != "tree" else chosen if chosen is not None else int(np.nanargmax(np.abs(importance)))
        figure = figures.anchor_graph(
            graph,
            KINDS,
            title=f"{metric}, {len(importance)} sentences",
            measure=metric,
            per_node=links,
            least=least / 100,
            root=root,
            direction="out" if direction == "brings about" else "in",
            depth=depth,
            truth=overlay,
        )
        command = f"{measurements.command(run, _NAME)} --trace {id}"
        clicked = components.show_figure(figure, name="anchors", command=command, key="anchors-graph", clickable=True)
    picked = next((int(point["customdata"][0]) for point in clicked if point.get("customdata")), None)
    if picked is not None and picked != chosen:
        state.remember(Key.SENTENCE, picked)
        chosen = picked
    _pane(run, id, graph, result, metric, chosen)
    components.provenance(result)


def _sentences(result: Result, read: Reading, n: int) -> tuple[list[str], list[str]]:
    """Tags and texts as the result holds them, else of the trace as it is read here."""
    tags, texts = result.numbers.get("tags"), result.numbers.get("texts")
    if isinstance(tags, list) and isinstance(texts, list) and len(tags) == len(texts) == n:
        return [str(tag) for tag in tags], [str(text) for text in texts]
    own = list(read.sentences) if len(read.sentences) == n else []
    return [s.tag for s in own] or ["unknown"] * n, [s.text for s in own] or [f"sentence {i}" for i in range(n)]


def _pane(run: Run, id: str, graph: AnchorGraph, result: Result, metric: str, chosen: int | None) -> None:
    """The chosen sentence: its text, its importance with interval and chance, and its links, each of which can be followed."""
    if chosen is None:
        st.caption("Choose a sentence in the graph to see its links.")
        return
    st.subheader(f"Sentence {chosen}", anchor=False)
    st.text(graph.texts[chosen])
    row: dict[str, object] = {"importance": float(graph.importance[chosen])}
    line = next((i for i, label in enumerate(result.axes[0].labels) if label.replace("_", " ") == metric), None)
    at = (chosen,) if result.values.ndim == 1 else None if line is None else (line, chosen)
    for name, band in (("95 % interval", result.interval), ("chance", result.null)):
        if band is not None and at is not None and result.values.shape[-1] == len(graph.importance):
            row[name] = f"{band.low[at]:.3g} … {band.high[at]:.3g}"
    st.dataframe([{"kind": graph.tags[chosen].replace("_", " "), **row}], hide_index=True, key="anchor-row")
    links = graph.links(5)
    given = [(s, e) for s, t, e in links if t == chosen]
    made = [(t, e) for s, t, e in links if s == chosen]
    for column, title, ends in zip(st.columns(2), ("It hangs on", "It brings about"), (given, made), strict=True):
        with column:
            st.caption(title if ends else f"{title}: nothing measured")
            for other, effect in sorted(ends, key=lambda end: -abs(end[1]))[:5]:
                text = components.as_text(f"{other} ({effect:+.3g}) {graph.texts[other][:90]}")
                if st.button(text, key=f"link-{title}-{other}", type="tertiary"):
                    state.remember(Key.SENTENCE, other)
                    st.rerun()
    if st.button("Read it in the trace", icon=":material/article:"):
        state.go("trace", **{Key.TRACE: id, Key.SENTENCE: chosen})
