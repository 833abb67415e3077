"""Every figure of the toolkit, the same in reports, notebooks and the app; the only module that knows Plotly."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reasonscope.analysis.results import Result
from reasonscope.data.trace import Trace
from reasonscope.probes.evaluate import Estimate
from reasonscope.probes.length import LengthProbe
from reasonscope.probes.trajectory import Cliff, MeanTrajectory
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


def probe_scores(scores: Mapping[str, Estimate], *, title: str, measure: str, chance: float) -> Figure:
    """A probe, first, and its baselines: a number each with its 95 % interval, and the line of chance."""
    figure = go.Figure()
    colours = [BLUE, *[GREY] * (len(scores) - 1)]
    for (name, score), colour in zip(scores.items(), colours, strict=True):
        figure.add_scatter(
            x=[score.value],
            y=[name.replace("_", " ")],
            mode="markers",
            marker={"color": colour, "size": 11},
            error_x=_error(score.value, score.interval, colour),
            showlegend=False,
        )
    figure.add_vline(x=chance, line={"color": GREY, "dash": "dash"})
    return _styled(figure, title, measure, "").update_yaxes(autorange="reversed")


def layer_position_map(
    scores: NDArray[np.float64],
    layers: Sequence[str],
    positions: Sequence[str],
    *,
    title: str,
    measure: str,
    chance: float,
) -> Figure:
    """Held-out `scores` (layer, position) of a probe fitted at each layer and position; white is chance."""
    reach = float(np.nanmax(np.abs(scores - chance))) or 1.0
    figure = go.Figure()
    figure.add_heatmap(
        z=scores,
        x=list(positions),
        y=list(layers),
        colorscale="RdBu_r",
        zmin=chance - reach,
        zmax=chance + reach,
        colorbar={"title": measure},
        texttemplate="%{z:.2f}",
        hovertemplate="%{y}, %{x}<br>%{z:.3f}<extra></extra>",
    )
    return _styled(figure, title, "position in the trace", "site")


def mean_trajectories(curves: Mapping[str, MeanTrajectory], *, title: str, measure: str, last: int = 20) -> Figure:
    """Mean score by outcome, counted back from the last token of the close window; below, how many traces are behind each point.

    Right, the `last` tokens one by one: nothing is resampled, for a cliff of two tokens would vanish in a grid.
    """
    figure = make_subplots(
        rows=2,
        cols=2,
        shared_xaxes=True,
        row_heights=[0.75, 0.25],
        vertical_spacing=0.06,
        subplot_titles=("thinking and closing tag", f"the last {last} tokens", "", ""),
    )
    for (name, curve), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        for column, shown in ((1, len(curve.mean)), (2, min(last, len(curve.mean)))):
            back = np.arange(1 - shown, 1)
            style = {"name": name, "legendgroup": name, "line": {"color": colour}}
            mode = "lines" if column == 1 else "lines+markers"
            hover = "token %{x}: %{y:.3f}<br>n = %{customdata}"
            figure.add_scatter(
                x=back,
                y=curve.mean[-shown:],
                customdata=curve.n[-shown:],
                hovertemplate=hover,
                mode=mode,
                showlegend=column == 1,
                row=1,
                col=column,
                **style,
            )
            figure.add_scatter(
                x=back, y=curve.n[-shown:], mode="lines", showlegend=False, row=2, col=column, hoverinfo="skip", **style
            )
    figure = _styled(figure, title, "", measure)
    figure.update_xaxes(title="tokens to the last of the close window", row=2)
    return figure.update_yaxes(title="traces", row=2, col=1).update_layout(height=520)


def cliff_distribution(cliffs: Mapping[str, Cliff], random: NDArray[np.float64], *, title: str) -> Figure:
    """Plateau less end of each trace by outcome, and the mean drops along random directions (the null)."""
    figure = go.Figure()
    values = {f"{name} (n = {len(found.ids)})": found.drops for name, found in cliffs.items()}
    values[f"random directions (means, n = {len(random)})"] = random
    colours = [*_cycle(len(cliffs)), GREY]
    for (name, drops), colour in zip(values.items(), colours, strict=True):
        figure.add_box(
            y=drops,
            name=name,
            marker_color=colour,
            boxpoints="all",
            jitter=0.4,
            pointpos=0,
            boxmean=True,
            showlegend=False,
        )
    figure.add_hline(y=0, line={"color": GREY, "dash": "dash"})
    return _styled(figure, title, "", "plateau less end")


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


def layer_head_grid(result: Result, *, title: str, values: NDArray[np.float64] | None = None) -> Figure:
    """A number of every head: rows are layers, from the first below. Heads outside the null's band are ringed.

    `values` (layer, head) stand in for those of `result`, for one metric of several or one of its arrays; they have no band.
    """
    shown = result.values if values is None else values
    figure = _diverging(shown, result.quantity, "layer %{y}, head %{x}<br>%{z:.3g}")
    if values is None and result.null is not None:
        layer, head = np.nonzero((shown < result.null.low) | (shown > result.null.high))
        ring = {"symbol": "circle-open", "color": "black", "size": 10}
        name = f"outside the null ({result.null.what})"
        figure.add_scatter(x=head, y=layer, mode="markers", marker=ring, name=name, hoverinfo="skip")
    return _styled(figure, title, "head", "layer")


def sentence_matrix(result: Result, *, title: str, texts: Sequence[str] = ()) -> Figure:
    """Effects between sentences: the target in the row, the source in the column, the first above; white is 0, blank not measured.

    `texts` are the sentences, to be read on hovering.
    """
    n = len(result.values)
    words = [text.replace("<", "&lt;") for text in texts] or [""] * n
    pairs = np.array([[[words[target], words[source]] for source in range(n)] for target in range(n)])
    hover = "%{y}: %{customdata[0]}<br>from %{x}: %{customdata[1]}<br>%{z:.3g}"
    figure = _diverging(result.values, result.unit, hover, customdata=pairs)
    return _styled(figure, title, "source sentence", "target sentence").update_yaxes(autorange="reversed")


def _diverging(values: NDArray[np.float64], measure: str, hover: str, **more: object) -> Figure:
    """A heat map that is white at 0."""
    reach = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure = go.Figure()
    figure.add_heatmap(
        z=values,
        colorscale="RdBu_r",
        zmin=-reach,
        zmax=reach,
        colorbar={"title": measure},
        hovertemplate=hover + "<extra></extra>",
        **more,
    )
    return figure


def to_html(figure: Figure, *, with_library: bool) -> str:
    """The figure as a piece of HTML; `with_library` puts Plotly's script into it, so that the page needs no network."""
    html: str = figure.to_html(full_html=False, include_plotlyjs=with_library, config=_CONTROLS)
    return html


def _cycle(n: int) -> list[str]:
    """`n` colours, the four of the palette in turn."""
    return [(ORANGE, BLUE, GREEN, PURPLE)[i % 4] for i in range(n)]


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
