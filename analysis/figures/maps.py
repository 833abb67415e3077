"""Maps of heads and of sentences against sentences."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reasonscope.analysis.figures.theme import ORANGE, Figure, short, styled, titled
from reasonscope.analysis.results import Result


def head_grid(values: NDArray[np.float64], *, title: str, measure: str) -> Figure:
    """Scores (layer, head) as a map; a square on each cell takes the click, for a map itself tells nobody of one."""
    layers, heads = values.shape
    figure = go.Figure()
    figure.add_heatmap(
        z=values, colorscale="Viridis", colorbar={"title": {"text": measure, "side": "right"}}, hoverinfo="skip"
    )
    rows, columns = np.mgrid[:layers, :heads]
    figure.add_scatter(
        x=columns.ravel(),
        y=rows.ravel(),
        mode="markers",
        marker={"symbol": "square", "size": 22, "color": "rgba(0,0,0,0)"},
        customdata=values.ravel(),
        hovertemplate="layer %{y}, head %{x}<br>" + measure + " %{customdata:.4g}<extra></extra>",
        showlegend=False,
    )
    return styled(figure, title, "head", "layer").update_xaxes(dtick=1).update_yaxes(dtick=1)


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
    """A matrix of sentences or tokens against others; what was not measured stays empty.

    `names` of the rows and columns stand under the pointer and, where they are `named` and few, at the axes. `clickable` lays a square
    on each of the 2,000 strongest cells, for a map itself tells nobody of a click.
    """
    signed = bool((matrix < 0).any())
    down, across = names or tuple([str(i) for i in range(n)] for n in matrix.shape)
    hover = [[f"{short(down[i])} → {short(across[j])}" for j in range(matrix.shape[1])] for i in range(len(matrix))]
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
            x=x, y=y, mode="markers", hoverinfo="skip", showlegend=False,
            marker={"symbol": "square", "size": side, "color": "rgba(0,0,0,0)"},
        )  # fmt: skip
    figure = styled(figure, title, columns, rows).update_layout(height=520)
    if names and named and max(matrix.shape) <= 40:
        figure.update_xaxes(
            tickvals=np.arange(matrix.shape[1]), ticktext=[short(name) for name in across], tickangle=-90
        )
        figure.update_yaxes(tickvals=np.arange(matrix.shape[0]), ticktext=[short(name) for name in down])
    return figure.update_yaxes(autorange="reversed")


def sentence_map(result: Result, name: str, measure: str) -> Figure:
    """An array (target, source) of a result as a map; white is no effect, empty what was not measured."""
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
    figure = styled(figure, titled(result), "source sentence", "target sentence").update_layout(height=560)
    return figure.update_yaxes(autorange="reversed")


def value_maps(result: Result) -> Figure:
    """A result's last two axes as a map, one panel for each place on the axes before; a cross marks what lies outside of its null."""
    vertical, across = result.axes[-2:]
    panels = result.values.reshape(-1, len(vertical), len(across))
    titles = result.axes[0].labels if len(result.axes) == 3 else ("",) * len(panels)
    figure = make_subplots(rows=len(panels), cols=1, subplot_titles=list(titles), vertical_spacing=0.08)
    for row, panel in enumerate(panels, start=1):
        figure.add_heatmap(
            z=panel,
            x=list(across.labels),
            y=list(vertical.labels),
            colorscale="Viridis",
            showscale=len(panels) == 1,
            colorbar={"title": result.unit},
            row=row,
            col=1,
            hovertemplate=f"{vertical.name} %{{y}}, {across.name} %{{x}}<br>%{{z:.4g}}<extra></extra>",
        )
        if result.null is not None:
            low, high = (np.reshape(end, panels.shape)[row - 1] for end in (result.null.low, result.null.high))
            down, right = np.nonzero((panel < low) | (panel > high))
            figure.add_scatter(
                x=[across.labels[i] for i in right],
                y=[vertical.labels[i] for i in down],
                mode="markers",
                marker={"symbol": "x", "size": 4, "color": ORANGE},
                hoverinfo="skip",
                row=row,
                col=1,
                name=f"outside of the null: {result.null.what}",
                showlegend=row == 1,
            )
    figure = styled(figure, titled(result), "", "").update_layout(height=160 + 320 * len(panels))
    figure.update_yaxes(title=vertical.name, type="category", autorange="reversed")
    return figure.update_xaxes(title=across.name, type="category")
