"""Figures as HTML, JSON, rows of numbers, and in the theme of a page."""

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go

from reasonscope.analysis.figures.theme import Figure
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import write_text_durably
from reasonscope.data.storage.untrusted import parse_json

_KINDS = {"scatter", "bar", "box", "heatmap"}
_LINK = re.compile(r"<(?=\s*a\b)", re.IGNORECASE)
_PHONE = 40  # letters of a legend that fit on a phone
_CONTROLS = {"displaylogo": False, "displayModeBar": "hover", "responsive": True}


def to_html(figure: Figure, *, with_library: bool) -> str:
    """The figure as a piece of HTML; `with_library` includes Plotly's script, so that the page needs no network.

    The same figure gives the same bytes: by default Plotly draws a random id for its place in the page.
    """
    place = f"figure-{sha256(figure.to_json().encode()).hexdigest()[:16]}"
    html: str = _unlinked(figure).to_html(
        full_html=False, include_plotlyjs=with_library, config=_CONTROLS, div_id=place
    )
    return html


def write_figure(figure: Figure, path: Path) -> None:
    """Write the figure as JSON, which `read_figure` reads."""
    write_text_durably(path, figure.to_json())


def read_figure(path: Path) -> Figure:
    """Read a file of `write_figure`. Raises InputError for a file without a figure, or with one that would ask
    another host for something."""
    try:
        figure = go.Figure(parse_json(path.read_bytes(), str(path)))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read as a figure ({what}); run the analysis again") from error
    # Plotly loads images and maps from the addresses in a figure.
    if (kinds := {curve.type for curve in figure.data} - _KINDS) or figure.layout.images:
        raise InputError(
            f"{path} has {', '.join(kinds) or 'images'}, which no figure of ours has; run the analysis again"
        )
    return figure


def in_theme(figure: Figure, *, dark: bool) -> Figure:
    """A copy for a light or dark page, whose background shows through; long names in the legend are broken for a
    phone."""
    copy = _unlinked(figure).update_layout(
        template="plotly_dark" if dark else "plotly_white", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)"
    )
    return copy.for_each_trace(
        lambda curve: curve.update(name="<br>".join(wrap(curve.name or "", _PHONE)) or curve.name)
    )


def _unlinked(figure: Figure) -> Figure:
    """A copy without links in its texts: Plotly makes those of labels and names, which come from a run, clickable."""
    return go.Figure(_without_links(figure.to_dict()))


def _without_links(value: Any) -> Any:
    if isinstance(value, str):
        return _LINK.sub("&lt;", value)
    if isinstance(value, Mapping):
        return {key: _without_links(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return _without_links(value.tolist()) if value.dtype == object else value
    return [_without_links(inner) for inner in value] if isinstance(value, list | tuple) else value


def figure_data(figure: Figure) -> list[dict[str, object]]:
    """The data of the figure, one row per point: its curve, its place and value, and the ends of its interval."""
    rows: list[dict[str, object]] = []
    for curve in figure.data:
        name = curve.name or ""
        if curve.type == "heatmap":
            rows += [
                {"curve": name, "x": x, "y": y, "value": z}
                for y, line in zip(curve.y, curve.z, strict=True)
                for x, z in zip(curve.x, line, strict=True)
            ]
            continue
        ys = [] if curve.y is None else list(curve.y)
        xs = [None] * len(ys) if curve.x is None else list(curve.x)
        for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
            rows.append({"curve": name, "x": x, "y": y, **_ends(curve, index, x, y)})
    return rows


def _ends(curve: go.Scatter, index: int, x: object, y: object) -> dict[str, object]:
    """The ends of a point's intervals, if it has any."""
    ends: dict[str, object] = {}
    for axis, value in (("x", x), ("y", y)):
        error = getattr(curve, f"error_{axis}", None) if curve.type in ("scatter", "bar") else None
        if error is not None and error.array is not None:
            below = error.array if error.arrayminus is None else error.arrayminus
            ends |= {f"{axis}_low": value - below[index], f"{axis}_high": value + error.array[index]}
    return ends
