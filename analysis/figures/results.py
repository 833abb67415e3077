"""The figures that any result has, by the axes that it has."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reasonscope.analysis.figures.maps import sentence_map, value_maps
from reasonscope.analysis.figures.theme import BLUE, GREY, ORANGE, Figure, short, styled, titled
from reasonscope.analysis.results import Band, Result

_MAPS = (("layer", "head"), ("target", "source"))


def of_result(result: Result) -> dict[str, Figure]:
    """The figures of a result by name: maps of layers by heads and of targets by sources, else its lines along the last axis; and the
    map of sentence on sentence where it has one."""
    names = tuple(axis.name for axis in result.axes[-2:])
    drawn: dict[str, Figure] = {}
    if names in _MAPS:
        drawn["map"] = value_maps(result)
    elif len(result.axes[-1]) > 1:
        drawn["lines"] = along(result)
    if "effects" in result.arrays:
        drawn["effects"] = sentence_map(result, "effects", "how much a sentence (below) brings another (left)")
    return drawn


def along(result: Result, *, only: Sequence[str] = ()) -> Figure:
    """Every line of a result along its last axis, one panel a line: interval as bars or a band, the null shaded, peaks marked.

    `only` are the labels of the first axis to draw; all where not given. Sentences are named by their text under the pointer.
    """
    places = list(result.axes[-1].labels)
    first = result.axes[0].labels if len(result.axes) > 1 else (result.quantity,)
    chosen = [name for name in first if not only or name in only]
    rows = {name: np.reshape(result.values, (len(first), -1))[first.index(name)] for name in chosen}
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, subplot_titles=list(rows), vertical_spacing=0.06)
    x = np.arange(len(places))
    hover = [short(str(text)) for text in result.numbers.get("texts") or places]
    for panel, (name, line) in enumerate(rows.items(), start=1):
        at, shown = first.index(name), panel == 1
        if result.null is not None:
            _shade(figure, x, result.null, at, panel, shown)
        error = None if result.interval is None else _between(line, result.interval, at)
        few = len(places) <= 80
        figure.add_scatter(
            x=x, y=line, mode="lines+markers" if few else "lines", line={"color": BLUE}, name="measured",
            error_y=error if few else None, text=hover, hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
            showlegend=shown, row=panel, col=1,
        )  # fmt: skip
        if "peaks" in result.arrays:
            peaks = np.flatnonzero(np.reshape(result.arrays["peaks"], (len(first), -1))[at])
            figure.add_scatter(
                x=peaks, y=line[peaks], mode="markers", marker={"color": ORANGE, "symbol": "diamond", "size": 9},
                name="peak", showlegend=shown, hoverinfo="skip", row=panel, col=1,
            )  # fmt: skip
    name = result.axes[-1].name
    figure = styled(figure, titled(result), "", "").update_layout(height=200 + 180 * len(rows))
    figure.update_yaxes(title=result.unit)
    ticks = {"tickvals": x, "ticktext": places} if len(places) <= 30 else {}
    return figure.update_xaxes(title=name, row=len(rows), **ticks)


def _shade(figure: Figure, x: NDArray[np.intp], null: Band, row: int, panel: int, shown: bool) -> None:
    low, high = (np.reshape(end, (-1, len(x)))[row] for end in (null.low, null.high))
    style = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": "null", "row": panel, "col": 1}
    figure.add_scatter(x=x, y=low, showlegend=False, **style)
    figure.add_scatter(
        x=x,
        y=high,
        fill="tonexty",
        fillcolor="rgba(122,122,122,.25)",
        name=f"null: {null.what}",
        showlegend=shown,
        **style,
    )


def _between(line: NDArray[np.float64], band: Band, row: int) -> dict[str, object]:
    low, high = (np.reshape(end, (-1, len(line)))[row] for end in (band.low, band.high))
    return {"type": "data", "symmetric": False, "array": high - line, "arrayminus": line - low, "color": GREY}
