"""The look of every figure, in one place: palette, layout, error bars, titles, and text under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, TypeAlias

import plotly.graph_objects as go

from reasonscope.analysis.results import Result

if TYPE_CHECKING:  # its module imports torch, which the app avoids until a model is needed
    from reasonscope.data.intervals import Estimate

Figure: TypeAlias = go.Figure

# Okabe and Ito's palette, which all kinds of colour vision can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#7A7A7A"
SHADE = "rgba(122,122,122,.35)"  # the range of chance
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def styled(figure: Figure, title: str, x: str, y: str) -> Figure:
    """The layout of every figure: a title that wraps on a phone, panels' titles below it, the legend below the axis."""
    lines = wrap(title, 44) or [""]  # characters that fit in a line on a phone
    panels = any(one.text for one in figure.layout.annotations)
    figure.update_annotations(font={"size": 13})
    return figure.update_layout(
        title={
            "text": "<br>".join(escape(line, quote=False) for line in lines),
            "font": {"size": 15},
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 12},
        },
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 28 + 20 * len(lines) + 24 * panels, "b": 90},
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "x": 0,
            "xanchor": "left",
            "yanchor": "bottom",
            "itemsizing": "constant",
        },
        height=420,
    )


def colours_of(n: int) -> list[str]:
    """`n` colours, cycling through the four of the palette."""
    return [(ORANGE, BLUE, GREEN, PURPLE)[i % 4] for i in range(n)]


def error_bars(estimates: Sequence[Estimate], colour: str) -> dict[str, object]:
    """The intervals of estimates in Plotly's form."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [estimate.high - estimate.value for estimate in estimates],
        "arrayminus": [estimate.value - estimate.low for estimate in estimates],
        "color": colour,
        "thickness": 1,
    }


def titled(result: Result, quantity: str = "") -> str:
    """The title of a result's figure: its quantity, or another one that it holds."""
    trace = result.provenance.get("trace")
    return (quantity or result.quantity) + ("" if trace in (None, "all") else f", {trace}")


def panel_gap(panels: int, height: float) -> float:
    """The share of a figure between two of its panels of `height` pixels each, so that titles and ticks fit."""
    return 60 / (panels * (height + 60)) if panels > 1 else 0.0


def short_label(text: str) -> str:
    """A sentence for a hover label, with its markup disarmed."""
    return escape(text if len(text) <= 90 else f"{text[:89]}…")
