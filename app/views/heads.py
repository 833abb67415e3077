"""Attention heads: every head by a score, then what the chosen one looks at, sentence by sentence."""

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from reasonscope.analysis import figures
from reasonscope.analysis.results import Result
from reasonscope.app import components, measurements, state
from reasonscope.app.runs import Run
from reasonscope.app.state import BOUND, Key

_NAME = "results/heads/*"


def show(run: Run) -> None:
    components.heading(
        "Attention heads", "Each square is a head, its colour a score; a click on one shows what it looks at."
    )
    grids, matrices = _grids(run), _matrices(run)
    components.damage(measurements.damaged(run))
    if not grids:
        components.missing("scores of heads", measurements.command(run, _NAME))
        return
    name = st.selectbox("Score", list(grids), key=Key.METRIC, bind=BOUND)
    result, values = grids[name]
    figure = figures.head_grid(values, title=name, measure=result.unit)
    clicked = components.show_figure(
        figure, name="heads", command=measurements.command(run, _NAME), key="heads-grid", clickable=True
    )
    picked = next((f"{int(point['y'])}.{int(point['x'])}" for point in clicked), None)
    if picked:
        state.remember(Key.HEAD, picked)
    components.provenance(result)
    _head(run, picked or state.recall(Key.HEAD), grids, matrices)


def _grids(run: Run) -> dict[str, tuple[Result, NDArray[np.float64]]]:
    """Every score (layer, head) among the results of the run, by method, metric and trace."""
    found: dict[str, tuple[Result, NDArray[np.float64]]] = {}
    for method in sorted(folder.name for folder in run.where.analyses.glob("*") if folder.is_dir()):
        for trace, result in measurements.results(run, method).items():
            axes = [axis.name for axis in result.axes]
            if axes[-2:] != ["layer", "head"] or not result.measured or len(axes) > 3:
                continue
            label = f"{method.replace('_', ' ')} · {trace}"
            if len(axes) == 2:
                found[label] = result, result.values
            else:
                named = zip(result.axes[0].labels, result.values, strict=True)
                found |= {f"{metric} · {label}": (result, values) for metric, values in named}
    return found


def _matrices(run: Run) -> dict[str, tuple[Result, NDArray[np.float64]]]:
    """Attention (layer, head, target, source) among the results, as values or as the array `matrix`."""
    found = {}
    for method in sorted(folder.name for folder in run.where.analyses.glob("*") if folder.is_dir()):
        for trace, result in measurements.results(run, method).items():
            for values in (result.values, result.arrays.get("matrix")):
                if values is not None and values.ndim == 4 and values.shape[-1] == values.shape[-2]:
                    found[f"{method.replace('_', ' ')} · {trace}"] = result, np.asarray(values, dtype=np.float64)
    return found


def _head(
    run: Run,
    head: str,
    grids: dict[str, tuple[Result, NDArray[np.float64]]],
    matrices: dict[str, tuple[Result, NDArray[np.float64]]],
) -> None:
    layer, _, index = head.partition(".")
    if not (layer.isdigit() and index.isdigit()):
        st.caption("Choose a head to see all its scores and what it looks at.")
        return
    place = int(layer), int(index)
    st.subheader(f"Layer {layer}, head {index}", anchor=False)
    scores = [
        {
            "score": name,
            "value": float(values[place]),
            "rank": 1 + int((values > values[place]).sum()),
            "of": values.size,
        }
        for name, (_, values) in grids.items()
        if place[0] < values.shape[0] and place[1] < values.shape[1]
    ]
    st.dataframe(scores, hide_index=True, key="head-scores")
    if not matrices:
        st.caption("No sentence-by-sentence attention was kept with this run.")
        return
    name = st.selectbox("Attention of", list(matrices))
    _, values = matrices[name]
    if place[0] < values.shape[0] and place[1] < values.shape[1]:
        figure = figures.square_map(
            values[place], title=f"What it looks at, {name}", measure="attention", rows="target", columns="source"
        )
        components.show_figure(figure, name="head", command=measurements.command(run, _NAME), key="head-matrix")
