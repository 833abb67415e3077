"""Sentences as a graph: on a circle in reading order, or as a tree of the effects of one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from reasonscope.analysis.figures.theme import BLUE, GREEN, GREY, ORANGE, Figure, short_label, styled


@dataclass(frozen=True, kw_only=True)
class AnchorGraph:
    """The content of a graph of sentences.

    `importance` (sentence,); `effects` (target, source) or None; `tags`, `texts` by sentence. `truth`: the earlier
    sentences on which each depends, if known.
    """

    importance: NDArray[np.float64]
    effects: NDArray[np.float64] | None
    tags: Sequence[str]
    texts: Sequence[str]
    truth: Sequence[Sequence[int]] | None = None

    def links(self, per_node: int) -> list[tuple[int, int, float]]:
        """(source, target, effect): the `per_node` strongest effects that each sentence receives, and as many that
        it has."""
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
    marked: int | None = None,
    direction: Literal["in", "out"] = "out",
    depth: int = 2,
    truth: bool = False,
) -> Figure:
    """Sentences as circles: size is importance, colour and number are kind and place, lines the strongest links, dots
    the truth.

    On a circle in reading order; with `root` as a tree of what that sentence affects (`direction` "out") or depends on
    ("in"). Sentences with less importance than the share `least` of the highest are left out, except for the root and
    the one that is `marked` by a heavy ring. `colours`: word and colour of a tag.
    """
    size = np.nan_to_num(np.abs(graph.importance))
    highest = float(size.max()) or 1.0
    links = graph.links(per_node)
    kept = [i for i in range(len(size)) if size[i] >= least * highest or i in (root, marked)]
    places = _on_a_circle(kept, len(size)) if root is None else _as_a_tree(root, links, direction, depth, set(kept))
    figure = go.Figure()
    _draw_links(figure, [link for link in links if link[0] in places and link[1] in places], places)
    if truth and graph.truth is not None:
        pairs = [(s, t) for t, row in enumerate(graph.truth) for s in row if s in places and t in places]
        for i, (s, t) in enumerate(pairs):
            style = {"color": GREEN, "width": 1.5, "dash": "dot"}
            _line(figure, places[s], places[t], style, name="true dependency", legend=i == 0)
    for tag in dict.fromkeys(graph.tags[i] for i in sorted(places)):
        word, colour = colours.get(tag, (escape(tag), GREY))
        members = [i for i in sorted(places) if graph.tags[i] == tag]
        figure.add_scatter(
            x=[places[i][0] for i in members],
            y=[places[i][1] for i in members],
            mode="markers+text",
            text=[str(i) for i in members],
            textposition=["bottom center" if root is None and places[i][1] < 0 else "top center" for i in members],
            name=word,
            customdata=[[i, short_label(graph.texts[i]), f"{graph.importance[i]:.3g}"] for i in members],
            hovertemplate=f"<b>%{{customdata[0]}}</b> {word}<br>%{{customdata[1]}}<br>{escape(measure)} %{{customdata[2]}}<extra></extra>",
            marker={
                "color": colour,
                "size": [8 + 26 * size[i] / highest for i in members],
                "line": {"width": [4 if i in (root, marked) else 1 for i in members], "color": GREY},
            },
        )
    hidden = {"visible": False}
    return styled(figure, title, "", "").update_layout(height=620, xaxis=hidden, yaxis=hidden, hovermode="closest")


def _draw_links(
    figure: Figure, links: Sequence[tuple[int, int, float]], places: Mapping[int, tuple[float, float]]
) -> None:
    strongest = max((abs(effect) for _, _, effect in links), default=1.0)
    signed = any(effect < 0 for _, _, effect in links)  # a divergence has no sign
    for name, sign, colour in (("raises it" if signed else "moves it", 1, BLUE), ("lowers it", -1, ORANGE)):
        for i, (s, t, effect) in enumerate(link for link in links if link[2] * sign > 0):
            style = {"color": colour, "width": 0.5 + 3.5 * abs(effect) / strongest}
            _line(figure, places[s], places[t], style, name=name, legend=i == 0)


def _on_a_circle(kept: Sequence[int], n: int) -> dict[int, tuple[float, float]]:
    """Sentence 0 at the top, then clockwise; a sentence that is left out leaves a gap."""
    angles = np.pi / 2 - 2 * np.pi * np.arange(n) / max(n, 1)
    return {i: (float(np.cos(angles[i])), float(np.sin(angles[i]))) for i in kept}


def _as_a_tree(
    root: int, links: Sequence[tuple[int, int, float]], direction: str, depth: int, kept: set[int]
) -> dict[int, tuple[float, float]]:
    """The root at the top, and below it, level by level, the sentences that the links lead to, in reading order."""
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
        x=points[:, 0], y=points[:, 1], mode="lines", line=dict(style), opacity=0.7, name=name, legendgroup=name,
        showlegend=legend, hoverinfo="skip",
    )  # fmt: skip
