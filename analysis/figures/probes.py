"""What probes read: predictions, scores with their baselines, layers by positions, trajectories and cliffs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reasonscope.analysis.figures.theme import BLUE, GREY, Figure, colours_of, error_bars, styled
from reasonscope.data.intervals import Estimate, wilson_interval
from reasonscope.data.summary import plural

if TYPE_CHECKING:  # their modules import torch, which the app avoids until a model is needed
    from reasonscope.probes.evaluation.metrics import Reliability
    from reasonscope.probes.properties.length_probe import LengthReport
    from reasonscope.probes.properties.refusal_cliff import Cliff, MeanTrajectory
    from reasonscope.probes.properties.remaining_probe import RemainingReport


def length_prediction(probe: LengthReport) -> Figure:
    """Predicted against true thinking tokens on held-out problems."""
    title = "Thinking tokens, predicted before the first of them"
    return _prediction(probe.true, probe.predicted, title, "thinking tokens", "a held-out trace")


def _prediction(true: NDArray[np.float64], predicted: NDArray[np.float64], title: str, unit: str, mark: str) -> Figure:
    figure = go.Figure()
    limits = [float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))]
    figure.add_scatter(
        x=limits, y=limits, mode="lines", name="perfect", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"
    )
    figure.add_scatter(x=true, y=predicted, mode="markers", name=mark, marker={"color": BLUE, "opacity": 0.6})
    return styled(figure, title, f"true {unit}", f"predicted {unit}")


def remaining_prediction(probe: RemainingReport) -> Figure:
    """Predicted against true remaining thinking tokens, on held-out problems."""
    title = f"Remaining thinking tokens, at {len(probe.true)} places of {plural(len(set(probe.traces)), 'trace')}"
    return _prediction(probe.true, probe.predicted, title, "tokens remaining", "a place in a held-out trace")


def length_scores(probe: LengthReport) -> Figure:
    """Rank correlation of the probe and of each baseline with the true length, 95 % intervals."""
    title = f"Length probe and baselines ({plural(probe.n_groups, 'problem')})"
    scores = {"probe": probe.comparison.score, **probe.comparison.baselines}
    return probe_scores(scores, title=title, measure="Spearman correlation", chance=0.0)


def probe_scores(scores: Mapping[str, Estimate], *, title: str, measure: str, chance: float) -> Figure:
    """A probe, first, and its baselines: each with its 95 % interval, and the line of chance; further ones are called "probe, …"."""
    figure = go.Figure()
    for place, (name, score) in enumerate(scores.items()):
        colour = BLUE if place == 0 or name.startswith("probe") else GREY
        figure.add_scatter(
            x=[score.value],
            y=[name.replace("_", " ")],
            mode="markers",
            marker={"color": colour, "size": 11},
            error_x=error_bars([score], colour),
            showlegend=False,
        )
    figure.add_vline(x=chance, line={"color": GREY, "dash": "dash"})
    return styled(figure, title, measure, "").update_yaxes(autorange="reversed")


def reliability_curve(found: Reliability, *, title: str) -> Figure:
    """How often the label is true where the probe promises a probability, by bins of equal mass, with 95 % intervals."""
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"
    )
    ends = [wilson_interval(share * n, n) for share, n in zip(found.share, found.n, strict=True)]
    shares = [
        Estimate(value=float(share), low=low, high=high) for share, (low, high) in zip(found.share, ends, strict=True)
    ]
    figure.add_scatter(
        x=found.predicted,
        y=found.share,
        mode="markers",
        name="held-out rows",
        marker={"color": BLUE, "size": 9},
        error_y=error_bars(shares, BLUE),
    )
    return styled(figure, title, "probability that the probe gives", "share of the class")


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
    return styled(figure, title, "position in the trace", "site")


def mean_trajectories(curves: Mapping[str, MeanTrajectory], *, title: str, measure: str, last: int = 20) -> Figure:
    """Mean probability by outcome with its 95 % interval over problems, counted back from the last token of the close
    window; below, the number of traces at each point.

    On the right, the `last` tokens one by one: nothing is resampled, because a cliff of two tokens would vanish in a
    grid.
    """
    figure = make_subplots(
        rows=2,
        cols=2,
        shared_xaxes=True,
        row_heights=[0.75, 0.25],
        vertical_spacing=0.06,
        subplot_titles=("all", f"last {last} tokens", "", ""),
    )
    for (name, curve), colour in zip(curves.items(), colours_of(len(curves)), strict=True):
        for column, shown in ((1, len(curve.mean)), (2, min(last, len(curve.mean)))):
            back = np.arange(1 - shown, 1)
            style = {"name": name, "legendgroup": name, "line": {"color": colour}}
            mode = "lines" if column == 1 else "lines+markers"
            hover = "token %{x}: %{y:.3f}<br>n = %{customdata}"
            for end, fill in ((curve.low, None), (curve.high, "tonexty")):
                figure.add_scatter(
                    x=back, y=end[-shown:], mode="lines", line={"width": 0}, fill=fill, opacity=0.2, hoverinfo="skip",
                    fillcolor=f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.2)", name=f"{name}, 95 %",
                    legendgroup=name, showlegend=False, row=1, col=column,
                )  # fmt: skip
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
    figure = styled(figure, title, "", measure)
    figure.update_xaxes(title="tokens before the answer", row=2, col=1)
    figure.update_xaxes(nticks=4, tickangle=0)
    figure.update_yaxes(range=[-0.02, 1.02], row=1)
    return figure.update_yaxes(title="traces", row=2, col=1).update_layout(height=520)


def cliff_distribution(cliffs: Mapping[str, Cliff], random: NDArray[np.float64], *, title: str) -> Figure:
    """Plateau minus end of each trace by outcome, and the mean drops along random directions (the null)."""
    figure = go.Figure()
    values = {f"{name} (n = {len(found.ids)})": found.drops for name, found in cliffs.items()}
    values[f"random directions (means, n = {len(random)})"] = random
    colours = [*colours_of(len(cliffs)), GREY]
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
    names = [box.name for box in figure.data]
    wrapped = ["<br>".join(wrap(name, 12)) for name in names]  # so that they fit side by side on a phone
    return styled(figure, title, "", "plateau minus end").update_xaxes(tickvals=names, ticktext=wrapped, tickangle=0)
