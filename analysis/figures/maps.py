"""Maps of heads, and of sentences against sentences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reasonscope.analysis.figures.theme import ORANGE, Figure, panel_gap, short_label, styled, titled
from reasonscope.analysis.results import Result


def head_grid(values: NDArray[np.float64], *, title: str, measure: str) -> Figure:
    """Scores (layer, head) as a map, white at 0 if they have a sign.

    A square on each cell takes the click, because a map itself does not report clicks.
    """
    layers, heads = values.shape
    figure = go.Figure()
    figure.add_heatmap(
        z=values, colorbar={"title": {"text": measure, "side": "right"}}, hoverinfo="skip", **_scale(values)
    )
    rows, columns = np.mgrid[:layers, :heads]
    figure.add_scatter(
        x=columns.ravel(),
        y=rows.ravel(),
        mode="markers",
        marker={"symbol": "square", "size": min(22, 300 // layers), "color": "rgba(0,0,0,0)"},
        customdata=values.ravel(),
        hovertemplate="layer %{y}, head %{x}<br>" + measure + " %{customdata:.4g}<extra></extra>",
        showlegend=False,
    )
    figure = styled(figure, title, "head", "layer")
    return figure.update_xaxes(**_counted(heads)).update_yaxes(**_counted(layers))


def _counted(n: int) -> dict[str, Any]:
    """An axis from 0 to n − 1, with at most sixteen labels."""
    return {"range": [-0.5, n - 0.5], "dtick": -(-n // 16)}


def square_map(
    matrix: NDArray[np.float64],
    *,
    title: str,
    measure: str,
    rows: str,
    columns: str,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
    named: bool = True,
    clickable: bool = False,
) -> Figure:
    """A matrix of sentences or tokens against others; cells that were not measured stay empty.

    `names` of the rows and columns appear under the pointer and, if they are `named` and few, at the axes. `clickable`
    puts a square on each of the 2,000 strongest cells, because a map itself does not report clicks.
    """
    signed = bool((matrix < 0).any())
    down, across = names or tuple([str(i) for i in range(n)] for n in matrix.shape)
    hover = [
        [f"{short_label(down[i])} → {short_label(across[j])}" for j in range(matrix.shape[1])]
        for i in range(len(matrix))
    ]
    figure = go.Figure()
    figure.add_heatmap(
        z=matrix,
        x=np.arange(matrix.shape[1]),
        y=np.arange(matrix.shape[0]),
        customdata=hover,
        colorscale="RdBu_r" if signed else "Viridis",
        zmid=0 if signed else None,
        colorbar={"title": {"text": measure, "side": "right"}},
        hovertemplate=f"{rows} %{{y}}, {columns} %{{x}}<br>%{{customdata}}<br>%{{z:.4g}}<extra></extra>",
    )
    if clickable:
        strength = np.nan_to_num(np.abs(matrix))
        order = np.argsort(-strength, axis=None, kind="stable")[:2000]
        y, x = np.unravel_index(order[strength.ravel()[order] > 0], matrix.shape)
        side = max(3, min(22, 420 // max(matrix.shape)))
        figure.add_scatter(
            x=x, y=y, mode="markers", showlegend=False, customdata=[(hover[i][j], matrix[i, j]) for i, j in zip(y, x, strict=True)],
            hovertemplate=f"{rows} %{{y}}, {columns} %{{x}}<br>%{{customdata[0]}}<br>%{{customdata[1]:.4g}}<extra></extra>",
            marker={"symbol": "square", "size": side, "color": "rgba(0,0,0,0)"},
        )  # fmt: skip
    figure = styled(figure, title, columns, rows).update_layout(height=520)
    if names and named and max(matrix.shape) <= 40:
        figure.update_xaxes(
            tickvals=np.arange(matrix.shape[1]), ticktext=[short_label(name) for name in across], tickangle=-90
        )
        figure.update_yaxes(tickvals=np.arange(matrix.shape[0]), ticktext=[short_label(name) for name in down])
    return figure.update_yaxes(autorange="reversed")


def sentence_map(result: Result, name: str, measure: str) -> Figure:
    """An array (target, source) of a result as a map; white means no effect, empty means not measured."""
    matrix = np.asarray(result.arrays[name], dtype=np.float64)
    reach = float(np.nanmax(np.abs(matrix))) if np.isfinite(matrix).any() else 1.0
    texts = result.numbers.get("texts") or [str(i) for i in range(len(matrix))]
    figure = go.Figure()
    figure.add_heatmap(
        z=matrix,
        colorscale="RdBu_r",
        zmin=-(reach or 1.0),
        zmax=reach or 1.0,
        colorbar={"title": measure},
        customdata=[[f"{source} → {target}" for source in texts] for target in texts],
        hovertemplate="%{customdata}<br>%{z:.3f}<extra></extra>",
    )
    figure = styled(figure, titled(result, measure), "source sentence", "target sentence").update_layout(height=560)
    return figure.update_yaxes(autorange="reversed")


def value_maps(result: Result) -> Figure:
    """A result's last two axes as a map, one panel for each position on the axes before, each with its own scale.

    White is 0 if values have a sign. A cross marks a value outside its null; a null with a single number for the whole
    panel is given in its title, and marks what lies below it.
    """
    vertical, across = result.axes[-2:]
    panels = result.values.reshape(-1, len(vertical), len(across))
    names = result.axes[0].labels if len(result.axes) == 3 else (result.quantity,) * len(panels)
    tall = max(240, 26 * len(vertical))
    gap = panel_gap(len(panels), tall)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        vertical_spacing=gap,
        subplot_titles=[_named(n, result, i) for i, n in enumerate(names)],
    )
    share = (1 - gap * (len(panels) - 1)) / len(panels)
    for row, (name, panel) in enumerate(zip(names, panels, strict=True), start=1):
        middle = 1 - (row - 1) * (share + gap) - share / 2
        figure.add_heatmap(
            z=panel,
            x=list(across.labels),
            y=list(vertical.labels),
            colorbar={"title": result.unit_of(name), "len": share, "y": middle},
            row=row,
            col=1,
            hovertemplate=f"{vertical.name} %{{y}}, {across.name} %{{x}}<br>%{{z:.4g}}<extra></extra>",
            **_scale(panel),
        )
        _mark_outside(figure, result, row)
    figure = styled(figure, titled(result), "", "").update_layout(height=160 + round(tall / share))
    few = {"dtick": 1} if len(across) <= 30 else {}
    figure.update_yaxes(title=vertical.name, type="category", autorange="reversed")
    below = (
        f"<br>null: {result.null.what}"
        if result.null is not None and _constant((result.null.low, result.null.high))
        else ""
    )
    figure.update_xaxes(type="category", **few)
    return figure.update_xaxes(title=f"{across.name}{below}", row=len(panels))


def _scale(panel: NDArray[np.float64]) -> dict[str, object]:
    """Colours: from blue to red around 0 for values with a sign, else from dark to light."""
    reach = float(np.nanmax(np.abs(panel))) if np.isfinite(panel).any() else 1.0
    signed = bool((panel < 0).any())
    return {"colorscale": "RdBu_r", "zmin": -reach, "zmax": reach} if signed else {"colorscale": "Viridis"}


def _null_of(result: Result, panel: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    if result.null is None:
        return None
    shape = (-1, len(result.axes[-2]), len(result.axes[-1]))
    return result.null.low.reshape(shape)[panel], result.null.high.reshape(shape)[panel]


def _constant(null: tuple[NDArray[np.float64], NDArray[np.float64]]) -> bool:
    """Whether the null of each panel is a single number."""
    ends = np.reshape(null, (2, -1, *null[0].shape[-2:]))
    return bool((np.ptp(ends, axis=(0, 2, 3)) == 0).all())


def _named(name: str, result: Result, panel: int) -> str:
    """The title of a panel, with its null if that is one number."""
    null = _null_of(result, panel)
    own = "" if name == result.quantity else name
    if null is None or not _constant(null):
        return own
    return f"{own} (null {null[0].flat[0]:.3g})".strip()


def _mark_outside(figure: Figure, result: Result, row: int) -> None:
    """A cross on each value of panel `row` that lies outside its null."""
    null = _null_of(result, row - 1)
    if null is None or _constant(null):
        return
    assert result.null is not None
    vertical, across = result.axes[-2:]
    panel = result.values.reshape(-1, len(vertical), len(across))[row - 1]
    down, right = np.nonzero((panel < null[0]) | (panel > null[1]))
    figure.add_scatter(
        x=[across.labels[i] for i in right],
        y=[vertical.labels[i] for i in down],
        mode="markers",
        marker={"symbol": "x", "size": 5, "color": ORANGE, "line": {"width": 1, "color": "black"}},
        hoverinfo="skip",
        row=row,
        col=1,
        name=f"outside the null: {result.null.what}",
        showlegend=row == 1,
    )
