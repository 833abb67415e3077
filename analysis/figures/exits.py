"""Early exits: tokens against accuracy of every rule, beside fixed budgets."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from reasonscope.analysis.figures.theme import GREY, SYMBOLS, Figure, colours_of, error_bars, styled

if TYPE_CHECKING:  # its modules import torch
    from reasonscope.analysis.exits.evaluation import ExitReport


def exit_frontier(report: ExitReport) -> Figure:
    """Mean tokens of thinking against accuracy, 95 % intervals over problems: one point per rule and tolerance. The line is every fixed
    budget."""
    figure = go.Figure()
    ordered = sorted(report.budgets)
    figure.add_scatter(
        x=[tokens for tokens, _ in ordered],
        y=[accuracy for _, accuracy in ordered],
        mode="lines",
        name="every fixed budget",
        line={"color": GREY},
    )
    names = list(dict.fromkeys(point.rule for point in report.points))
    for name, colour, symbol in zip(names, colours_of(len(names)), cycle(SYMBOLS), strict=False):
        points = [point for point in report.points if point.rule == name]
        figure.add_scatter(
            x=[point.tokens.value for point in points],
            y=[point.accuracy.value for point in points],
            mode="markers",
            name=name,
            customdata=[[point.threshold, point.tolerance] for point in points],
            hovertemplate="threshold %{customdata[0]:.4g}, tolerance %{customdata[1]}<br>%{x:.4g} tokens, accuracy %{y:.3g}",
            marker={"color": colour, "size": 10, "symbol": symbol},
            error_x=error_bars([point.tokens for point in points], colour),
            error_y=error_bars([point.accuracy for point in points], colour),
        )
    accuracy, tokens = report.whole
    figure.add_scatter(
        x=[tokens.value],
        y=[accuracy.value],
        mode="markers",
        name="whole thinking",
        marker={"color": GREY, "size": 12, "symbol": "x"},
    )
    title = f"Early exits ({report.n_groups} held-out problems)"
    return (
        styled(figure, title, "mean tokens of thinking", "accuracy")
        .update_yaxes(range=[0, 1.05])
        .update_layout(height=520)
    )
