"""What the model did with its problems and requests: length, accuracy, refusals."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from reasonscope.analysis.figures.theme import BLUE, GREEN, GREY, ORANGE, Figure, styled
from reasonscope.data.intervals import wilson_interval
from reasonscope.data.trace import Trace

_OF_PAIR = {
    "not judged": (GREY, "circle"),
    "right in both": (BLUE, "circle"),
    "right in one": (ORANGE, "diamond"),
    "wrong in both": (GREEN, "x"),
}
_RIGHT_WRONG = (("right", True, BLUE, "circle"), ("wrong", False, ORANGE, "x"))


def thinking_by_difficulty(traces: Sequence[Trace]) -> Figure:
    """Thinking tokens of each trace by the steps that its problem needs, with right and wrong answers apart."""
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
    return styled(figure, "Length of the thinking", "steps needed (jittered)", "thinking tokens")


def lengths_of_pairs(
    ids: Sequence[str], lengths: NDArray[np.float64], outcomes: Sequence[tuple[bool | None, bool | None]]
) -> Figure:
    """Thinking tokens with and without steering, a point per trace; `lengths` is (trace, 2), the plain ones first. Points below the
    line think less when steered."""
    figure, ends = go.Figure(), [0.0, float(lengths.max(initial=1.0))]
    of_pair = [
        "not judged" if None in pair else ("wrong in both", "right in one", "right in both")[sum(map(bool, pair))]
        for pair in outcomes
    ]
    for kind, (colour, symbol) in _OF_PAIR.items():
        at = [i for i, one in enumerate(of_pair) if one == kind]
        if not at:
            continue
        figure.add_scatter(
            x=lengths[at, 0],
            y=lengths[at, 1],
            mode="markers",
            name=f"{kind} (n = {len(at)})",
            marker={"color": colour, "symbol": symbol, "opacity": 0.7},
            text=[ids[i] for i in at],
            hovertemplate="%{text}<br>%{x} to %{y} tokens<extra></extra>",
        )
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot"}, name="as long", hoverinfo="skip"
    )
    return styled(figure, "Length of the thinking, steered beside plain", "plain, tokens", "steered, tokens")


def accuracy_by_difficulty(answers: Sequence[tuple[float, bool]]) -> Figure:
    """Share of right answers at each difficulty with Wilson's 95 % interval; `answers` are pairs of difficulty and
    whether it is right."""
    figure = go.Figure()
    levels = sorted({difficulty for difficulty, _ in answers})
    counts = [[right for difficulty, right in answers if difficulty == level] for level in levels]
    shares = [sum(right) / len(right) for right in counts]
    ends = [wilson_interval(sum(right), len(right)) for right in counts]
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
    title = f"Share of right answers (n = {len(answers)})"
    return styled(figure, title, "steps needed", "share of right answers").update_yaxes(range=[0, 1.05])


def answers_by_request(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """How many requests of each kind were refused and complied with."""
    figure = go.Figure()
    outcomes = dict.fromkeys(outcome for kind in counts.values() for outcome in kind)
    for outcome, colour in zip(outcomes, (BLUE, ORANGE, GREY), strict=False):
        values = [kind.get(outcome, 0) for kind in counts.values()]
        figure.add_bar(x=list(counts), y=values, name=outcome, marker_color=colour, text=values)
    return styled(figure, "Answers to requests", "", "requests").update_layout(barmode="stack")
