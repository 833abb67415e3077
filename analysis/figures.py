"""Every figure of the toolkit, the same in reports, notebooks and the app; the only module that knows Plotly."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TypeAlias

import numpy as np
import plotly.graph_objects as go

from reasonscope.data.trace import Trace
from reasonscope.probes.length import LengthProbe
from reasonscope.steering.dose import Arm

_CONTROLS = {"displaylogo": False, "displayModeBar": "hover", "responsive": True}

Figure: TypeAlias = go.Figure

# Okabe and Ito's palette: told apart by all kinds of colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#7A7A7A"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
_RIGHT_WRONG = (("right", True, BLUE, "circle"), ("wrong", False, ORANGE, "x"))


def thinking_by_difficulty(traces: Sequence[Trace]) -> Figure:
    """Thinking tokens of each trace by the steps that its problem needs, right and wrong answers apart."""
    rng = np.random.default_rng(0)
    figure = go.Figure()
    for name, correct, colour, symbol in _RIGHT_WRONG:
        chosen = [trace for trace in traces if trace.correct is correct and trace.problem.difficulty is not None]
        spread = rng.uniform(-0.2, 0.2, len(chosen))
        figure.add_scatter(
            x=[(trace.problem.difficulty or 0) + shift for trace, shift in zip(chosen, spread, strict=True)],
            y=[trace.n_thinking_tokens for trace in chosen],
            mode="markers",
            name=f"{name} (n = {len(chosen)})",
            marker={"color": colour, "symbol": symbol, "opacity": 0.7},
            text=[trace.id for trace in chosen],
            hovertemplate="%{text}<br>%{y} tokens<extra></extra>",
        )
    return _styled(figure, "How long it thinks", "steps needed (spread sideways)", "thinking tokens")


def length_prediction(probe: LengthProbe) -> Figure:
    """Predicted against true thinking tokens on held-out problems."""
    figure = go.Figure()
    limits = [float(min(probe.true.min(), probe.predicted.min())), float(max(probe.true.max(), probe.predicted.max()))]
    figure.add_scatter(
        x=limits, y=limits, mode="lines", name="perfect", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=probe.true, y=probe.predicted, mode="markers", name="a held-out trace", marker={"color": BLUE, "opacity": 0.6}
    )
    title = "Thinking tokens, predicted before the first of them"
    return _styled(figure, title, "true thinking tokens", "predicted thinking tokens")


def length_scores(probe: LengthProbe) -> Figure:
    """Rank correlation of the probe and of each baseline with the true length, 95 % intervals."""
    scores = {"probe": probe.spearman, **probe.baselines}
    figure = go.Figure()
    figure.add_scatter(
        x=[score.value for score in scores.values()],
        y=[name.replace("_", " ") for name in scores],
        mode="markers",
        marker={"color": [BLUE, *[GREY] * len(probe.baselines)], "size": 11},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [score.high - score.value for score in scores.values()],
            "arrayminus": [score.value - score.low for score in scores.values()],
            "color": GREY,
        },
        showlegend=False,
    )
    figure = _styled(figure, f"Length probe and baselines ({probe.n_groups} problems)", "Spearman correlation", "")
    return figure.update_yaxes(autorange="reversed").update_xaxes(range=[-0.3, 1])


def steering_plane(arms: Sequence[Arm]) -> Figure:
    """Mean thinking tokens against accuracy of each arm, 95 % intervals over problems."""
    colours = {"base": GREY, "random": PURPLE}
    figure = go.Figure()
    for arm, symbol in zip(arms, cycle(_SYMBOLS), strict=False):
        colour = next((c for name, c in colours.items() if arm.name.startswith(name)), BLUE)
        figure.add_scatter(
            x=[arm.tokens.value],
            y=[arm.accuracy.value],
            mode="markers",
            name=arm.name,
            marker={"color": colour, "size": 11, "symbol": symbol},
            error_x=_error(arm.tokens.value, arm.tokens.interval, colour),
            error_y=_error(arm.accuracy.value, arm.accuracy.interval, colour),
        )
    return _styled(figure, "What steering does", "mean thinking tokens", "accuracy").update_yaxes(range=[0, 1.05])


def answers_by_request(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """How many requests of each kind were refused and complied with."""
    figure = go.Figure()
    outcomes = dict.fromkeys(outcome for kind in counts.values() for outcome in kind)
    for outcome, colour in zip(outcomes, (BLUE, ORANGE, GREY), strict=False):
        values = [kind.get(outcome, 0) for kind in counts.values()]
        figure.add_bar(x=list(counts), y=values, name=outcome, marker_color=colour, text=values)
    return _styled(figure, "What it does with requests", "", "requests").update_layout(barmode="stack")


def to_html(figure: Figure, *, with_library: bool) -> str:
    """The figure as a piece of HTML; `with_library` puts Plotly's script into it, so that the page needs no network."""
    html: str = figure.to_html(full_html=False, include_plotlyjs=with_library, config=_CONTROLS)
    return html


def _error(value: float, interval: tuple[float, float], colour: str) -> dict[str, object]:
    low, high = interval
    return {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low], "color": colour}


def _styled(figure: Figure, title: str, x: str, y: str) -> Figure:
    return figure.update_layout(
        title=title,
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 30, "t": 60, "b": 90},
        legend={"orientation": "h", "y": -0.2, "x": 0, "xanchor": "left", "yanchor": "top"},
        height=420,
    )
