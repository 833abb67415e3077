"""The figures of any result, chosen by its axes."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reasonscope.analysis.figures.maps import sentence_map, value_maps
from reasonscope.analysis.figures.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SHADE,
    SYMBOLS,
    Figure,
    colours_of,
    panel_gap,
    short_label,
    styled,
    titled,
)
from reasonscope.analysis.results import Band, Result

_CLICKABLE = 2000  # up to so many places of a line take clicks, by invisible marks; in a longer one only the peaks do
_MAPS = (("layer", "head"), ("target", "source"))
_RUNNING = ("token", "sentence", "step", "cut", "bin", "site", "layer")
_ARRAYS = {
    "effects": "effect on appearing",
    "suppression": "effect of suppression",
}


def of_result(result: Result) -> dict[str, Figure]:
    """The figures of a result by name.

    Maps of layers by heads and of targets by sources; else lines along a last axis that is ordered (tokens, sentences,
    cuts, layers; one panel for each unit); else points. Results with maps of sentence on sentence have these too.
    """
    names = tuple(axis.name for axis in result.axes[-2:])
    drawn: dict[str, Figure] = {}
    if names in _MAPS:
        drawn["map"] = value_maps(result)
    elif names == ("arm", "metric") and ", " not in result.unit:  # a single unit
        drawn["arms"] = arm_outcomes(result)
    elif names[-1] in _RUNNING and len(result.axes[-1]) > 1:
        drawn["lines"] = along(result)
    elif result.values.size > 1:
        drawn["points"] = points(result)
    for name, measure in _ARRAYS.items():
        if name in result.arrays:
            drawn[name] = sentence_map(result, name, measure)
    return drawn


def along(
    result: Result, *, only: Sequence[str] = (), beside: Mapping[str, NDArray[np.float64]] | None = None
) -> Figure:
    """Every line of a result along its last axis, one panel per line: intervals as bars, the null shaded, peaks marked.

    `only` are the labels of the first axis to draw, by default all. `beside` are other lines over the same places, by
    name, drawn dashed in each panel. Tokens are placed by their number in the trace; sentences show their text under
    the pointer.
    """
    places = list(result.axes[-1].labels)
    first = result.axes[0].labels if len(result.axes) > 1 else (result.quantity,)
    chosen = [name for name in first if not only or name in only]
    rows = {name: np.reshape(result.values, (len(first), -1))[first.index(name)] for name in chosen}
    figure = make_subplots(
        rows=len(rows), cols=1, shared_xaxes=True, subplot_titles=_panel_titles(list(rows), result),
        vertical_spacing=panel_gap(len(rows), 180),
    )  # fmt: skip
    numbered = all(place.isdigit() for place in places)
    x = np.array([int(place) for place in places]) if numbered else np.arange(len(places))
    hover = [short_label(str(text)) for text in result.numbers.get("texts") or places]
    told = shaded = False  # whether the legend has an entry for peaks and for the null
    for panel, (name, line) in enumerate(rows.items(), start=1):
        at, shown = first.index(name), panel == 1
        if result.null is not None:
            shaded = _shade(figure, x, result.null, at, panel, not shaded) or shaded
        error = None if result.interval is None else _between(line, result.interval, at)
        few = len(places) <= 80
        figure.add_scatter(
            x=x, y=line, mode="lines+markers" if len(places) <= _CLICKABLE else "lines", line={"color": BLUE}, name="measured",
            marker={} if few else {"opacity": 0, "size": 9}, error_y=error if few else None, text=hover,
            hovertemplate="%{text}<br>%{y:.4g}<extra></extra>", showlegend=shown, row=panel, col=1,
        )  # fmt: skip
        for (other, values), colour in zip((beside or {}).items(), (GREEN, PURPLE, ORANGE), strict=False):
            figure.add_scatter(
                x=x, y=values, mode="lines", line={"color": colour, "dash": "dot", "width": 1.5}, name=other, legendgroup=other,
                hovertemplate=f"{escape(other)} %{{y:.4g}}<extra></extra>", showlegend=shown, row=panel, col=1,
            )  # fmt: skip
        if "peaks" in result.arrays:
            peaks = np.flatnonzero(np.reshape(result.arrays["peaks"], (len(first), -1))[at])
            figure.add_scatter(
                x=x[peaks], y=line[peaks], mode="markers", marker={"color": ORANGE, "symbol": "diamond", "size": 9},
                name="peak", text=[hover[i] for i in peaks], hovertemplate="%{text}<br>peak, %{y:.4g}<extra></extra>",
                showlegend=not told and len(peaks) > 0, row=panel, col=1,
            )  # fmt: skip
            told = told or len(peaks) > 0
    figure = styled(figure, titled(result), "", "").update_layout(height=200 + 180 * len(rows))
    for panel, name in enumerate(rows, start=1):
        figure.update_yaxes(title=result.unit_of(name), row=panel)
    ticks = {} if numbered and len(places) > 30 else {"tickvals": x, "ticktext": places}
    return figure.update_xaxes(title=result.axes[-1].name, row=len(rows), **ticks)


def points(result: Result) -> Figure:
    """Values of things without an order (words, arms, rules): a point each with its interval, its null a grey bar.

    One panel; for a result with two axes, one for each position on the last, which may differ in unit.
    """
    things = result.axes[0].labels
    panels = result.axes[1].labels if len(result.axes) == 2 else (result.quantity,)
    shape = len(things), len(panels)
    figure = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, subplot_titles=_panel_titles(panels, result))
    for at, name in enumerate(panels):
        place, values = {"row": 1, "col": at + 1}, np.reshape(result.values, shape)[:, at]
        if result.null is not None:
            low, high = (np.reshape(end, shape)[:, at] for end in (result.null.low, result.null.high))
            gaps = np.full(len(things), np.nan)
            figure.add_scatter(
                x=np.stack([low, high, gaps], axis=1).ravel(), y=np.repeat(things, 3), mode="lines+markers",
                line={"color": SHADE, "width": 9}, marker={"size": 9, "symbol": "line-ns", "line": {"width": 2, "color": GREY}},
                name=f"null: {result.null.what}", showlegend=not at, legendgroup="null", hoverinfo="skip", **place,
            )  # fmt: skip
        bars = None if result.interval is None else _bars(values, result.interval, shape, at)
        figure.add_scatter(
            x=values, y=list(things), mode="markers", marker={"color": BLUE, "size": 9}, error_x=bars, name="measured",
            showlegend=not at, hovertemplate="%{y}<br>%{x:.4g}<extra></extra>", **place,
        )  # fmt: skip
        figure.update_xaxes(title=result.unit_of(name), **place)
    figure = styled(figure, titled(result), "", "").update_layout(height=200 + 26 * len(things))
    for at, name in enumerate(panels):
        figure.update_xaxes(title=result.unit_of(name), row=1, col=at + 1)
    return figure.update_yaxes(autorange="reversed", automargin=True)


def _panel_titles(names: Sequence[str], result: Result) -> list[str]:
    """The title of each panel; a plain number gets the name of what it counts. A single panel has no title, since
    the figure has one."""
    counted = result.axes[0].name if len(result.axes) > 1 else ""
    return (
        [] if list(names) == [result.quantity] else [f"{counted} {name}" if name.isdigit() else name for name in names]
    )


def _bars(values: NDArray[np.float64], band: Band, shape: tuple[int, int], at: int) -> dict[str, object]:
    low, high = (np.reshape(end, shape)[:, at] for end in (band.low, band.high))
    return {"type": "data", "symmetric": False, "array": high - values, "arrayminus": values - low, "color": GREY}


def _null_boxes(figure: Figure, places: NDArray[np.intp], null: Band | None) -> None:
    """A grey box from the low to the high end of the null at each place."""
    if null is None:
        return
    for place, low, high in zip(places, null.low[-1], null.high[-1], strict=True):
        figure.add_scatter(
            x=[place - 0.35, place + 0.35, place + 0.35, place - 0.35], y=[low, low, high, high], fill="toself", mode="lines",
            fillcolor="rgba(122,122,122,.3)", line={"width": 1, "color": GREY}, hoverinfo="skip", name=null.what,
            legendgroup="null", showlegend=bool(place == 0),
        )  # fmt: skip


def arm_outcomes(result: Result) -> Figure:
    """A result over (arm, metric): a point for each arm next to the others, with its interval; grey is the range of
    the null."""
    arms, metrics = (axis.labels for axis in result.axes)
    figure = go.Figure()
    places = np.arange(len(metrics))
    _null_boxes(figure, places, result.null)
    spread = np.linspace(-0.15, 0.15, len(arms))
    for i, (arm, colour, symbol) in enumerate(zip(arms, colours_of(len(arms)), cycle(SYMBOLS), strict=False)):
        figure.add_scatter(
            x=places + spread[i], y=result.values[i], mode="markers", name=arm, customdata=metrics,
            marker={"color": colour, "symbol": symbol, "size": 11},
            error_y=None if result.interval is None else _between(result.values[i], result.interval, i),
            hovertemplate=f"{escape(arm)}, %{{customdata}}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    figure = styled(figure, titled(result), "", result.quantity)
    return figure.update_xaxes(tickvals=places, ticktext=list(metrics))


def _shade(figure: Figure, x: NDArray[np.intp], null: Band, row: int, panel: int, shown: bool) -> bool:
    """Draw the null as an area, one for each stretch of places that have one; returns whether there is any."""
    low, high = (np.reshape(end, (-1, len(x)))[row] for end in (null.low, null.high))
    known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    for stretch in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        if not len(stretch):
            continue
        if len(stretch) == 1:  # an area without width would be invisible
            at, ends = x[stretch[0]] + np.array([-0.25, 0.25]), [np.repeat(end[stretch], 2) for end in (low, high)]
        else:
            at, ends = x[stretch], [end[stretch] for end in (low, high)]
        line = {"width": 1 if np.array_equal(ends[0], ends[1]) else 0, "color": GREY}  # a band without width is a line
        style = {"mode": "lines", "line": line, "hoverinfo": "skip", "legendgroup": "null", "row": panel, "col": 1}
        figure.add_scatter(x=at, y=ends[0], showlegend=False, **style)
        figure.add_scatter(
            x=at, y=ends[1], fill="tonexty", fillcolor=SHADE, name=f"null: {null.what}", showlegend=shown, **style,
        )  # fmt: skip
        shown = False
    return len(known) > 0


def _between(line: NDArray[np.float64], band: Band, row: int) -> dict[str, object]:
    n = len(line)
    return _bars(
        line,
        Band(low=band.low.reshape(-1, n).T, high=band.high.reshape(-1, n).T, what=""),
        (n, band.low.size // n),
        row,
    )
