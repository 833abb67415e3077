"""How every figure looks, in one place: palette, layout, error bars, titles, and text under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, TypeAlias

import plotly.graph_objects as go

from reasonscope.analysis.results import Result

if TYPE_CHECKING:  # its module loads torch, which the app does without until a model is asked for
    from reasonscope.probes.evaluate import Estimate

Figure: TypeAlias = go.Figure

# Okabe and Ito's palette: told apart by all kinds of colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#7A7A7A"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def styled(figure: Figure, title: str, x: str, y: str) -> Figure:
    lines = wrap(title, 44) or [""]  # as much as a phone shows in a line
    return figure.update_layout(
        title={"text": "<br>".join(escape(line, quote=False) for line in lines), "font": {"size": 15}},
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 40 + 20 * len(lines), "b": 90},
        legend={"orientation": "h", "y": -0.2, "x": 0, "xanchor": "left", "yanchor": "top"},
        height=420,
    )


def colours_of(n: int) -> list[str]:
    """`n` colours, the four of the palette in turn."""
    return [(ORANGE, BLUE, GREEN, PURPLE)[i % 4] for i in range(n)]


def error_bars(estimates: Sequence[Estimate], colour: str) -> dict[str, object]:
    """The intervals of estimates, as Plotly has them."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [estimate.high - estimate.value for estimate in estimates],
        "arrayminus": [estimate.value - estimate.low for estimate in estimates],
        "color": colour,
        "thickness": 1,
    }


def titled(result: Result) -> str:
    trace = result.provenance.get("trace")
    return result.quantity if trace in (None, "all") else f"{result.quantity}, {trace}"


def short(text: str) -> str:
    """A sentence for a hover label, whose markup is disarmed."""
    return escape(text if len(text) <= 90 else f"{text[:89]}…")
