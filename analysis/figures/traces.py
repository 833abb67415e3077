"""What the model did with its problems and requests: length, accuracy, refusals."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from reasonscope.analysis.figures.theme import BLUE, GREY, ORANGE, Figure, styled
from reasonscope.data.intervals import wilson_interval
from reasonscope.data.trace import Trace

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
