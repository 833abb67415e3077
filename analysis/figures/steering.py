"""What steering does to length and accuracy, arm by arm and strength by strength."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from reasonscope.analysis.figures.theme import BLUE, GREY, PURPLE, SYMBOLS, Figure, colours_of, error_bars, styled

if TYPE_CHECKING:  # its module loads torch
    from reasonscope.steering.dose import Arm, DoseResponse


def steering_plane(arms: Sequence[Arm]) -> Figure:
    """Mean thinking tokens against accuracy of each arm, 95 % intervals over problems."""
    colours = {"base": GREY, "random": PURPLE}
    figure = go.Figure()
    for arm, symbol in zip(arms, cycle(SYMBOLS), strict=False):
        colour = next((c for name, c in colours.items() if arm.name.startswith(name)), BLUE)
        figure.add_scatter(
            x=[arm.tokens.value],
            y=[arm.accuracy.value],
            mode="markers",
            name=arm.name,
            marker={"color": colour, "size": 11, "symbol": symbol},
            error_x=error_bars([arm.tokens], colour),
            error_y=error_bars([arm.accuracy], colour),
        )
    return styled(figure, "What steering does", "mean thinking tokens", "accuracy").update_yaxes(range=[0, 1.05])


def steering_front(responses: Sequence[DoseResponse], others: Sequence[Arm] = ()) -> Figure:
    """Mean thinking tokens against accuracy at every strength, all methods on one plane, 95 % intervals over problems.

    `others` are arms without strengths, such as controls of the decoding.

    Shaded is where the random vectors lie, from the lowest to the highest of their means; the dashed line is the Pareto front: no other
    point has both fewer tokens and a higher accuracy.
    """
    figure = go.Figure()
    nulls = [arm for response in responses for dose in response.doses for arm in dose.random]
    _region(figure, [arm.tokens.value for arm in nulls], [arm.accuracy.value for arm in nulls], "random vectors")
    for response, colour, symbol in zip(responses, colours_of(len(responses)), cycle(SYMBOLS), strict=False):
        for arms, name, hollow in (
            ([dose.steered for dose in response.doses], response.name, ""),
            ([dose.reversed for dose in response.doses], f"{response.name} reversed", "-open"),
        ):
            figure.add_scatter(
                x=[arm.tokens.value for arm in arms],
                y=[arm.accuracy.value for arm in arms],
                mode="markers+text",
                name=name,
                text=[f"{arm.multiplier:g}" for arm in arms],
                textposition="top center",
                marker={"color": colour, "size": 10, "symbol": f"{symbol}{hollow}"},
                error_x=error_bars([arm.tokens for arm in arms], colour),
                error_y=error_bars([arm.accuracy for arm in arms], colour),
            )
    for arm, symbol in zip(others, cycle(SYMBOLS), strict=False):
        figure.add_scatter(
            x=[arm.tokens.value],
            y=[arm.accuracy.value],
            mode="markers",
            name=arm.name,
            marker={"color": PURPLE, "size": 9, "symbol": f"{symbol}-open"},
            error_x=error_bars([arm.tokens], PURPLE),
            error_y=error_bars([arm.accuracy], PURPLE),
        )
    base = responses[0].base
    figure.add_scatter(
        x=[base.tokens.value],
        y=[base.accuracy.value],
        mode="markers",
        name="unsteered",
        marker={"color": GREY, "size": 12, "symbol": "x"},
        error_x=error_bars([base.tokens], GREY),
        error_y=error_bars([base.accuracy], GREY),
    )
    points = [
        base,
        *others,
        *(arm for response in responses for dose in response.doses for arm in (dose.steered, dose.reversed)),
    ]
    front = _pareto([(arm.tokens.value, arm.accuracy.value) for arm in points])
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        name="Pareto front",
        line={"color": GREY, "dash": "dash", "shape": "hv"},
        hoverinfo="skip",
    )
    figure = styled(figure, "What steering costs and saves", "mean thinking tokens", "accuracy")
    return figure.update_yaxes(range=[0, 1.08]).update_layout(height=520)


def _region(figure: Figure, x: Sequence[float], y: Sequence[float], name: str) -> None:
    """A filled rectangle from the lowest to the highest of the points, and the points in it."""
    left, right, low, high = min(x), max(x), min(y), max(y)
    figure.add_scatter(
        x=[left, right, right, left, left],
        y=[low, low, high, high, low],
        fill="toself",
        fillcolor="rgba(122, 122, 122, 0.2)",
        mode="lines",
        line={"color": GREY, "width": 0.5},
        name=f"{name} (n = {len(x)})",
        legendgroup=name,
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=list(x),
        y=list(y),
        mode="markers",
        marker={"color": GREY, "size": 4},
        name=name,
        legendgroup=name,
        showlegend=False,
    )


def _pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both, fewer of the first and more of the second; in ascending order."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
