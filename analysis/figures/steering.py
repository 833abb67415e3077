"""Effects of steering on length and accuracy, by arm and by strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reasonscope.analysis.figures.theme import (
    BLUE,
    GREY,
    PURPLE,
    SHADE,
    SYMBOLS,
    Figure,
    colours_of,
    error_bars,
    styled,
)
from reasonscope.data.summary import plural

if TYPE_CHECKING:  # their modules import torch
    from reasonscope.data.intervals import Estimate
    from reasonscope.steering.experiments.decoding_responses import DecodingResponse
    from reasonscope.steering.experiments.dose_responses import DoseResponse
    from reasonscope.steering.experiments.experiment import Arm

_MEASURES: Mapping[str, Callable[[Arm], Estimate]] = {
    "mean thinking tokens": lambda arm: arm.tokens,
    "accuracy": lambda arm: arm.accuracy,
}

_ROOM = 0.05  # of a single strength: its random vectors are drawn so far to either side of it


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
    title = f"Effect of steering ({plural(arms[0].n_problems, 'problem')})"
    return styled(figure, title, "mean thinking tokens", "accuracy").update_yaxes(rangemode="tozero")


def steering_front(responses: Sequence[DoseResponse | DecodingResponse]) -> Figure:
    """Mean thinking tokens against accuracy at every strength, all methods on one plane, 95 % intervals over problems.

    The shaded area covers the random vectors of each method (random tokens, for a decoding method), from the lowest to
    the highest of their means. The dashed line is the Pareto front: no other point has both fewer tokens and a higher
    accuracy. Strengths are written next to the points that have room for them.
    """
    figure = go.Figure()
    for response in responses:
        if arms := response.controls:
            name = response.control_name + (f", {response.name}" if len(responses) > 1 else "")
            _region(figure, [arm.tokens.value for arm in arms], [arm.accuracy.value for arm in arms], name)
    curves = [
        (arms, name, "-open" if k else "", i)
        for i, response in enumerate(responses)
        for k, (name, arms) in enumerate(response.curves.items())
    ]
    told = _with_room([arm for arms, *_ in curves for arm in arms])
    symbols, colours = list(islice(cycle(SYMBOLS), len(responses))), colours_of(len(responses))
    for arms, name, hollow, i in curves:
        figure.add_scatter(
            x=[arm.tokens.value for arm in arms],
            y=[arm.accuracy.value for arm in arms],
            mode="markers+text",
            name=name,
            text=[f"{arm.multiplier:g}" if arm in told else "" for arm in arms],
            textposition="top center",
            customdata=[arm.multiplier for arm in arms],
            hovertemplate="strength %{customdata:g}<br>%{x:.4g} tokens, accuracy %{y:.3g}<extra>%{fullData.name}</extra>",
            marker={"color": colours[i], "size": 10, "symbol": f"{symbols[i]}{hollow}"},
            error_x=error_bars([arm.tokens for arm in arms], colours[i]),
            error_y=error_bars([arm.accuracy for arm in arms], colours[i]),
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
    points = [base, *(arm for arms, *_ in curves for arm in arms)]
    front = _pareto([(arm.tokens.value, arm.accuracy.value) for arm in points])
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        name="Pareto front",
        line={"color": GREY, "dash": "dash", "shape": "hv"},
        hoverinfo="skip",
    )
    figure = styled(
        figure,
        f"Costs and savings of steering ({base.n_problems} held-out problems)",
        "mean thinking tokens",
        "accuracy",
    )
    return figure.update_yaxes(rangemode="tozero").update_layout(height=520)


def _with_room(arms: Sequence[Arm]) -> list[Arm]:
    """The arms whose strength can be written next to them: no other point lies within a label of theirs. The pointer
    shows the others."""
    tokens = [arm.tokens.value for arm in arms]
    width, height = 0.06 * (max(tokens) - min(tokens)), 0.08

    def near(one: Arm, other: Arm) -> bool:
        across, up = one.tokens.value - other.tokens.value, one.accuracy.value - other.accuracy.value
        return abs(across) <= width and abs(up) <= height

    return [one for one in arms if not any(near(one, other) for other in arms if other is not one)]


def sweep_figures(responses: Sequence[DoseResponse | DecodingResponse]) -> dict[str, Figure]:
    """The figures of a sweep by name: all methods on one plane, and the dose-response of each."""
    curves = {f"dose_{response.name}": dose_curves(response) for response in responses}
    return {"steering_front": steering_front(responses), **curves}


def dose_curves(response: DoseResponse | DecodingResponse) -> Figure:
    """Mean thinking tokens and accuracy by strength, 95 % intervals over problems; a strength below 0 is the reverse.

    The shaded area covers the random vectors (random tokens, for a decoding method) of each strength, from the lowest
    to the highest of their means; the dashed line is the unsteered model. A single strength has an area around it.
    """
    base = response.base
    arms = sorted((arm for arms in response.curves.values() for arm in arms), key=lambda arm: arm.multiplier)
    x, across = [arm.multiplier for arm in arms], _across(response.controls)
    ends = [min([*x, *across]), max([*x, *across])]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, (name, read) in enumerate(_MEASURES.items(), start=1):
        place = {"row": row, "col": 1}
        _shade_random(figure, response, name, place)
        figure.add_scatter(
            x=x, y=[read(arm).value for arm in arms], mode="lines+markers", name=response.name, showlegend=row == 1,
            line={"color": BLUE}, marker={"size": 9}, error_y=error_bars([read(arm) for arm in arms], BLUE),
            hovertemplate="strength %{x:g}<br>%{y:.4g}<extra></extra>", **place,
        )  # fmt: skip
        figure.add_scatter(
            x=ends, y=[read(base).value] * 2, mode="lines", name="unsteered",
            line={"color": GREY, "dash": "dash"}, showlegend=row == 1, hoverinfo="skip", **place,
        )  # fmt: skip
        figure.update_yaxes(title=name, **place)
    if len(set(x)) == 1:
        figure.update_xaxes(tickvals=x[:1], range=sorted((0.7 * x[0], 1.3 * x[0])))
    title = f"{response.name}: dose and response ({base.n_problems} held-out problems)"
    figure = styled(figure, title, "", next(iter(_MEASURES))).update_layout(height=560)
    return figure.update_xaxes(title=f"strength ({response.unit})", row=2, col=1)


def _shade_random(
    figure: Figure, response: DoseResponse | DecodingResponse, measure: str, place: Mapping[str, int]
) -> None:
    """From the lowest to the highest of the means of the random vectors, at each strength."""
    across, controls, read = _across(response.controls), response.controls, _MEASURES[measure]
    if not controls:
        return
    strengths = sorted({arm.multiplier for arm in controls})
    ranges = [[read(arm).value for arm in controls if arm.multiplier == strength] for strength in strengths]
    repeated = len(across) // len(ranges)
    name = f"{response.control_name} ({len(controls) // len(strengths)} per strength)"
    for ends, fill in ((list(map(min, ranges)), None), (list(map(max, ranges)), "tonexty")):
        figure.add_scatter(
            x=across, y=ends * repeated, mode="lines", line={"color": GREY, "width": 0.5}, fill=fill, fillcolor=SHADE, hoverinfo="skip",
            name=name, legendgroup="null", showlegend=place["row"] == 1 and fill is not None, **place,
        )  # fmt: skip


def _across(controls: Sequence[Arm]) -> list[float]:
    """Where the area of the random vectors is drawn: at their strengths, and around a single one, which has no width of its own."""
    strengths = sorted({arm.multiplier for arm in controls})
    return [(1 - _ROOM) * strengths[0], (1 + _ROOM) * strengths[0]] if len(strengths) == 1 else strengths


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
    points = {"mode": "markers", "marker": {"color": GREY, "size": 4}, "showlegend": False}
    figure.add_scatter(x=list(x), y=list(y), name=name, legendgroup=name, **points)


def _pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, fewer of the first and more of the second; in ascending order."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
