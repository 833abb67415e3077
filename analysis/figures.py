"""Every figure of the toolkit, the same in reports, notebooks and the app; the only module that knows Plotly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from scipy.stats import binomtest

from reasonscope.analysis.results import Band, Result
from reasonscope.data.durable import write_text_durably
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace

if TYPE_CHECKING:  # their modules load torch, which the app does without until a model is asked for
    from reasonscope.probes.evaluate import Estimate
    from reasonscope.probes.length import LengthProbe
    from reasonscope.probes.trajectory import Cliff, MeanTrajectory
    from reasonscope.steering.dose import Arm, DoseResponse

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


def accuracy_by_difficulty(answers: Sequence[tuple[float, bool]]) -> Figure:
    """Share of right answers at each difficulty with Wilson's 95 % interval; `answers` are pairs of difficulty and right."""
    figure = go.Figure()
    levels = sorted({difficulty for difficulty, _ in answers})
    counts = [[right for difficulty, right in answers if difficulty == level] for level in levels]
    shares = [sum(right) / len(right) for right in counts]
    ends = [binomtest(sum(right), len(right)).proportion_ci(method="wilson") for right in counts]
    figure.add_scatter(
        x=levels,
        y=shares,
        mode="lines+markers",
        marker={"color": BLUE, "size": 9},
        line={"color": BLUE},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [high - share for share, (_, high) in zip(shares, ends, strict=True)],
            "arrayminus": [share - low for share, (low, _) in zip(shares, ends, strict=True)],
        },
        customdata=[len(right) for right in counts],
        hovertemplate="difficulty %{x}: %{y:.2f}<br>n = %{customdata}<extra></extra>",
        showlegend=False,
    )
    title = f"How often it is right (n = {len(answers)})"
    return _styled(figure, title, "steps needed", "share of right answers").update_yaxes(range=[0, 1.05])


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
    title = f"Length probe and baselines ({probe.n_groups} problems)"
    scores = {"probe": probe.spearman, **probe.baselines}
    return probe_scores(scores, title=title, measure="Spearman correlation", chance=0.0)


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
    figure.update_xaxes(title="tokens before the answer", row=2)
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


def steering_front(responses: Sequence[DoseResponse], others: Sequence[Arm] = ()) -> Figure:
    """Mean thinking tokens against accuracy at every strength, all methods on one plane, 95 % intervals over problems.

    `others` are arms without strengths, such as controls of the decoding.

    Shaded is where the random vectors lie, from the lowest to the highest of their means; the dashed line is the Pareto front: no other
    point has both fewer tokens and a higher accuracy.
    """
    figure = go.Figure()
    nulls = [arm for response in responses for dose in response.doses for arm in dose.random]
    _region(figure, [arm.tokens.value for arm in nulls], [arm.accuracy.value for arm in nulls], "random vectors")
    for response, colour, symbol in zip(responses, _cycle(len(responses)), cycle(_SYMBOLS), strict=False):
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
                error_x=_errors([arm.tokens for arm in arms], colour),
                error_y=_errors([arm.accuracy for arm in arms], colour),
            )
    for arm, symbol in zip(others, cycle(_SYMBOLS), strict=False):
        figure.add_scatter(
            x=[arm.tokens.value],
            y=[arm.accuracy.value],
            mode="markers",
            name=arm.name,
            marker={"color": PURPLE, "size": 9, "symbol": f"{symbol}-open"},
            error_x=_errors([arm.tokens], PURPLE),
            error_y=_errors([arm.accuracy], PURPLE),
        )
    base = responses[0].base
    figure.add_scatter(
        x=[base.tokens.value],
        y=[base.accuracy.value],
        mode="markers",
        name="unsteered",
        marker={"color": GREY, "size": 12, "symbol": "x"},
        error_x=_errors([base.tokens], GREY),
        error_y=_errors([base.accuracy], GREY),
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
    figure = _styled(figure, "What steering costs and saves", "mean thinking tokens", "accuracy")
    return figure.update_yaxes(range=[0, 1.08]).update_layout(height=520)


def answers_by_request(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """How many requests of each kind were refused and complied with."""
    figure = go.Figure()
    outcomes = dict.fromkeys(outcome for kind in counts.values() for outcome in kind)
    for outcome, colour in zip(outcomes, (BLUE, ORANGE, GREY), strict=False):
        values = [kind.get(outcome, 0) for kind in counts.values()]
        figure.add_bar(x=list(counts), y=values, name=outcome, marker_color=colour, text=values)
    return _styled(figure, "What it does with requests", "", "requests").update_layout(barmode="stack")


@dataclass(frozen=True, kw_only=True)
class AnchorGraph:
    """What a graph of sentences shows.

    `importance` (sentence,); `effects` (target, source) or None; `tags`, `texts` by sentence. `truth`: for each sentence the earlier
    ones that it depends on, where that is known.
    """

    importance: NDArray[np.float64]
    effects: NDArray[np.float64] | None
    tags: Sequence[str]
    texts: Sequence[str]
    truth: Sequence[Sequence[int]] | None = None

    def links(self, per_node: int) -> list[tuple[int, int, float]]:
        """(source, target, effect): of each sentence the `per_node` strongest it receives and the `per_node` strongest it gives."""
        if self.effects is None:
            return []
        strength = np.where(np.isfinite(self.effects), np.abs(self.effects), 0.0)
        chosen: set[tuple[int, int]] = set()
        for i in range(len(strength)):
            chosen |= {(int(j), i) for j in np.argsort(-strength[i])[:per_node] if strength[i, j] > 0}
            chosen |= {(i, int(j)) for j in np.argsort(-strength[:, i])[:per_node] if strength[j, i] > 0}
        return [(source, target, float(self.effects[target, source])) for source, target in sorted(chosen)]


def anchor_graph(
    graph: AnchorGraph,
    colours: Mapping[str, tuple[str, str]],
    *,
    title: str,
    measure: str,
    per_node: int = 3,
    least: float = 0.0,
    root: int | None = None,
    direction: Literal["in", "out"] = "out",
    depth: int = 2,
    truth: bool = False,
) -> Figure:
    """Sentences as circles: size is importance, colour and number the kind and place, lines the strongest links, dots the truth.

    On a circle in reading order; with `root` as a tree of what that sentence brings about (`direction` "out") or hangs on ("in").
    Sentences of less importance than the share `least` of the highest are left out, but for the root. `colours`: word and colour of a tag.
    """
    size = np.nan_to_num(np.abs(graph.importance))
    highest = float(size.max()) or 1.0
    links = graph.links(per_node)
    kept = [i for i in range(len(size)) if size[i] >= least * highest or i == root]
    places = _on_a_circle(kept, len(size)) if root is None else _as_a_tree(root, links, direction, depth, set(kept))
    figure = go.Figure()
    _draw_links(figure, [link for link in links if link[0] in places and link[1] in places], places)
    if truth and graph.truth is not None:
        pairs = [(s, t) for t, row in enumerate(graph.truth) for s in row if s in places and t in places]
        for i, (s, t) in enumerate(pairs):
            style = {"color": GREEN, "width": 1.5, "dash": "dot"}
            _line(figure, places[s], places[t], style, name="true dependency", legend=i == 0)
    for tag in dict.fromkeys(graph.tags[i] for i in sorted(places)):
        word, colour = colours.get(tag, (tag, GREY))
        members = [i for i in sorted(places) if graph.tags[i] == tag]
        figure.add_scatter(
            x=[places[i][0] for i in members],
            y=[places[i][1] for i in members],
            mode="markers+text",
            text=[str(i) for i in members],
            textposition="top center",
            name=word,
            customdata=[[i, _short(graph.texts[i]), f"{graph.importance[i]:.3g}"] for i in members],
            hovertemplate=f"<b>%{{customdata[0]}}</b> {word}<br>%{{customdata[1]}}<br>{measure} %{{customdata[2]}}<extra></extra>",
            marker={
                "color": colour,
                "size": [8 + 26 * size[i] / highest for i in members],
                "line": {"width": [3 if i == root else 1 for i in members], "color": GREY},
            },
        )
    hidden = {"visible": False}
    return _styled(figure, title, "", "").update_layout(height=620, xaxis=hidden, yaxis=hidden, hovermode="closest")


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
    return _styled(figure, title, "head", "layer").update_xaxes(dtick=1).update_yaxes(dtick=1)


def square_map(matrix: NDArray[np.float64], *, title: str, measure: str, rows: str, columns: str) -> Figure:
    """A matrix of sentences or tokens against others; what was not measured stays empty."""
    signed = bool((matrix < 0).any())
    figure = go.Figure()
    figure.add_heatmap(
        z=matrix,
        colorscale="RdBu_r" if signed else "Viridis",
        zmid=0 if signed else None,
        colorbar={"title": measure},
        hovertemplate=f"{rows} %{{y}}, {columns} %{{x}}<br>%{{z:.4g}}<extra></extra>",
    )
    figure = _styled(figure, title, columns, rows).update_layout(height=560)
    return figure.update_yaxes(autorange="reversed")


def _draw_links(
    figure: Figure, links: Sequence[tuple[int, int, float]], places: Mapping[int, tuple[float, float]]
) -> None:
    strongest = max((abs(effect) for _, _, effect in links), default=1.0)
    for name, sign, colour in (("raises it", 1, BLUE), ("lowers it", -1, ORANGE)):
        for i, (s, t, effect) in enumerate(link for link in links if link[2] * sign > 0):
            style = {"color": colour, "width": 0.5 + 3.5 * abs(effect) / strongest}
            _line(figure, places[s], places[t], style, name=name, legend=i == 0)


def _on_a_circle(kept: Sequence[int], n: int) -> dict[int, tuple[float, float]]:
    """Sentence 0 at the top, then clockwise; a sentence that is left out leaves its place empty."""
    angles = np.pi / 2 - 2 * np.pi * np.arange(n) / max(n, 1)
    return {i: (float(np.cos(angles[i])), float(np.sin(angles[i]))) for i in kept}


def _as_a_tree(
    root: int, links: Sequence[tuple[int, int, float]], direction: str, depth: int, kept: set[int]
) -> dict[int, tuple[float, float]]:
    """The root at the top, below it level by level what the links lead to, in reading order."""
    ends = [(s, t) if direction == "out" else (t, s) for s, t, _ in links]
    levels, seen = [[root]], {root}
    for _ in range(depth):
        below = sorted({b for a, b in ends if a in levels[-1] and b in kept} - seen)
        if not below:
            break
        seen |= set(below)
        levels.append(below)
    return {
        i: ((2 * place + 1) / len(level) - 1, -float(row))
        for row, level in enumerate(levels)
        for place, i in enumerate(level)
    }


def _line(
    figure: Figure,
    start: tuple[float, float],
    stop: tuple[float, float],
    style: Mapping[str, object],
    *,
    name: str,
    legend: bool,
) -> None:
    """A line that bends towards the middle, so that links of neighbours do not hide each other."""
    part = np.linspace(0, 1, 12)[:, None]
    a, b = np.array([start]), np.array([stop])
    middle = 0.55 * (a + b) / 2
    points = (1 - part) ** 2 * a + 2 * part * (1 - part) * middle + part**2 * b
    figure.add_scatter(
        x=points[:, 0], y=points[:, 1], mode="lines", line=dict(style), opacity=0.55, name=name, legendgroup=name,
        showlegend=legend, hoverinfo="skip",
    )  # fmt: skip


def _short(text: str) -> str:
    """A sentence for a hover label, whose markup is disarmed."""
    return escape(text if len(text) <= 90 else f"{text[:89]}…")


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
    hover = [_short(str(text)) for text in result.numbers.get("texts") or places]
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
    """The figure as a piece of HTML; `with_library` puts Plotly's script into it, so that the page needs no network.

    The same figure gives the same bytes: Plotly alone would draw a random id for its place in the page.
    """
    place = f"figure-{sha256(figure.to_json().encode()).hexdigest()[:16]}"
    html: str = figure.to_html(full_html=False, include_plotlyjs=with_library, config=_CONTROLS, div_id=place)
    return html


def write_figure(figure: Figure, path: Path) -> None:
    """The figure as JSON, which `read_figure` reads."""
    write_text_durably(path, figure.to_json())


def read_figure(path: Path) -> Figure:
    """What `write_figure` wrote. Raises InputError for a file that holds no figure."""
    try:
        return go.Figure(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        what = str(error).strip().splitlines()[0]
        raise InputError(f"{path} cannot be read as a figure ({what}); measure again") from error


def in_theme(figure: Figure, *, dark: bool) -> Figure:
    """A copy for a light or a dark page, whose background shows through."""
    return go.Figure(figure).update_layout(
        template="plotly_dark" if dark else "plotly_white", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)"
    )


def figure_data(figure: Figure) -> list[dict[str, object]]:
    """What is drawn, one row a point: the curve it belongs to, its place and value, and the ends of its interval."""
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
    """The ends of a point's intervals, where it has some."""
    ends: dict[str, object] = {}
    for axis, value in (("x", x), ("y", y)):
        error = getattr(curve, f"error_{axis}", None) if curve.type in ("scatter", "bar") else None
        if error is not None and error.array is not None:
            below = error.array if error.arrayminus is None else error.arrayminus
            ends |= {f"{axis}_low": value - below[index], f"{axis}_high": value + error.array[index]}
    return ends


def _cycle(n: int) -> list[str]:
    """`n` colours, the four of the palette in turn."""
    return [(ORANGE, BLUE, GREEN, PURPLE)[i % 4] for i in range(n)]


def _errors(estimates: Sequence[Estimate], colour: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [estimate.high - estimate.value for estimate in estimates],
        "arrayminus": [estimate.value - estimate.low for estimate in estimates],
        "color": colour,
        "thickness": 1,
    }


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
