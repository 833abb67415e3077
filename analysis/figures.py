"""Every figure of the toolkit, the same in reports, notebooks and the app; the only module that knows Plotly."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reasonscope.analysis.results import Band, Result
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
_MAPS = (("layer", "head"), ("target", "source"))
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


def of_result(result: Result) -> dict[str, Figure]:
    """The figures of a result by name: maps of layers by heads and of targets by sources, else its lines along the last axis; and the
    map of sentence on sentence where it has one."""
    names = tuple(axis.name for axis in result.axes[-2:])
    drawn: dict[str, Figure] = {}
    if names in _MAPS:
        drawn["map"] = value_maps(result)
    elif len(result.axes[-1]) > 1:
        drawn["lines"] = along(result)
    if "effects" in result.arrays:
        drawn["effects"] = sentence_map(result, "effects", "how much a sentence (below) brings another (left)")
    return drawn


def along(result: Result, *, only: Sequence[str] = ()) -> Figure:
    """Every line of a result along its last axis, one panel a line: interval as bars or a band, the null shaded, peaks marked.

    `only` are the labels of the first axis to draw; all where not given. Sentences are named by their text under the pointer.
    """
    places = list(result.axes[-1].labels)
    first = result.axes[0].labels if len(result.axes) > 1 else (result.quantity,)
    chosen = [name for name in first if not only or name in only]
    rows = {name: np.reshape(result.values, (len(first), -1))[first.index(name)] for name in chosen}
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, subplot_titles=list(rows), vertical_spacing=0.06)
    x = np.arange(len(places))
    hover = result.numbers.get("texts") or places
    for panel, (name, line) in enumerate(rows.items(), start=1):
        at, shown = first.index(name), panel == 1
        if result.null is not None:
            _shade(figure, x, result.null, at, panel, shown)
        error = None if result.interval is None else _between(line, result.interval, at)
        few = len(places) <= 80
        figure.add_scatter(
            x=x, y=line, mode="lines+markers" if few else "lines", line={"color": BLUE}, name="measured",
            error_y=error if few else None, text=hover, hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
            showlegend=shown, row=panel, col=1,
        )  # fmt: skip
        if "peaks" in result.arrays:
            peaks = np.flatnonzero(np.reshape(result.arrays["peaks"], (len(first), -1))[at])
            figure.add_scatter(
                x=peaks, y=line[peaks], mode="markers", marker={"color": ORANGE, "symbol": "diamond", "size": 9},
                name="peak", showlegend=shown, hoverinfo="skip", row=panel, col=1,
            )  # fmt: skip
    name = result.axes[-1].name
    figure = _styled(figure, _titled(result), "", "").update_layout(height=200 + 180 * len(rows))
    figure.update_yaxes(title=result.unit)
    ticks = {"tickvals": x, "ticktext": places} if len(places) <= 30 else {}
    return figure.update_xaxes(title=name, row=len(rows), **ticks)


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
    figure = _styled(figure, _titled(result), "", "").update_layout(height=160 + 320 * len(panels))
    figure.update_yaxes(title=vertical.name, type="category", autorange="reversed")
    return figure.update_xaxes(title=across.name, type="category")


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
    figure = _styled(figure, _titled(result), "source sentence", "target sentence").update_layout(height=560)
    return figure.update_yaxes(autorange="reversed")


def _shade(figure: Figure, x: NDArray[np.intp], null: Band, row: int, panel: int, shown: bool) -> None:
    low, high = (np.reshape(end, (-1, len(x)))[row] for end in (null.low, null.high))
    style = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": "null", "row": panel, "col": 1}
    figure.add_scatter(x=x, y=low, showlegend=False, **style)
    figure.add_scatter(
        x=x,
        y=high,
        fill="tonexty",
        fillcolor="rgba(122,122,122,.25)",
        name=f"null: {null.what}",
        showlegend=shown,
        **style,
    )


def _between(line: NDArray[np.float64], band: Band, row: int) -> dict[str, object]:
    low, high = (np.reshape(end, (-1, len(line)))[row] for end in (band.low, band.high))
    return {"type": "data", "symmetric": False, "array": high - line, "arrayminus": line - low, "color": GREY}


def _titled(result: Result) -> str:
    trace = result.provenance.get("trace")
    return result.quantity if trace in (None, "all") else f"{result.quantity}, {trace}"


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
