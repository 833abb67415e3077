"""Ablations beside their controls, sweeps of them, and maps of activation patching."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reasonscope.analysis.figures.results import points
from reasonscope.analysis.figures.theme import BLUE, GREY, ORANGE, PURPLE, SHADE, Figure, panel_gap, short_label, styled
from reasonscope.analysis.results import Result
from reasonscope.data.arrays import Values
from reasonscope.data.summary import plural

# Of the logit difference: unrelated states often turn the answer round, and then a patch that does nothing is above them.
LEAST_SHARE = 0.01
_CONTROLS = {
    "controls": ("random others of the same size", GREY, "line-ns-open"),
    "matched": ("random directions, as far", PURPLE, "x-thin-open"),
}


def ablation_figures(result: Result) -> dict[str, Figure]:
    """The figures of a result of `reasonscope ablate`, by name."""
    if result.method == "patching":
        return {"map": _patch_map(result)}
    if result.method == "ablation_answers":
        return {"points": points(result)}
    swept = {f"sweep-{i}": _sweep_lines(result, name) for i, name in enumerate(result.numbers.get("sweeps", {}))}
    parts = {"parts": _ablation_parts(result)} if any(one["splits"] for one in _told(result).values()) else {}
    return {"arms": _ablation_arms(result), **swept, **parts}


def _ablation_arms(result: Result) -> Figure:
    """One row per ablation: its effect with the interval over problems, and every control of it."""
    names = list(result.axes[0].labels)
    figure = go.Figure()
    rows = np.arange(len(names), dtype=np.float64)
    for below, (key, (what, colour, symbol)) in enumerate(_CONTROLS.items(), start=1):
        drawn = np.asarray(result.arrays[key], dtype=np.float64)
        if not np.isfinite(drawn).any():
            continue
        figure.add_scatter(
            x=drawn.ravel(), y=np.repeat(rows + 0.2 * below, drawn.shape[1]), mode="markers", name=what,
            marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 1.5, "color": colour}},
            hovertemplate="%{x:.4g} nats per token<extra>" + what + "</extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=result.values, y=rows, mode="markers", name="the ablation, 95 % over problems", text=_hover(result),
        marker={"color": BLUE, "size": 10}, error_x=_bars(result), hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_vline(x=0, line={"color": GREY, "width": 1, "dash": "dot"})
    n = len(result.numbers["traces"])
    figure = styled(figure, f"What the answers lose without it ({plural(n, 'trace')})", "nats per answer token", "")
    figure.update_yaxes(tickvals=rows, ticktext=[short_label(name) for name in names], automargin=True)
    return figure.update_yaxes(range=[len(names) - 0.35, -0.5]).update_layout(height=240 + 70 * len(names))


def _ablation_parts(result: Result) -> Figure:
    """The effect on parts of the traces, each beside its own controls: a panel for each ablation."""
    told = {name: one["splits"] for name, one in _told(result).items() if one["splits"]}
    figure = make_subplots(
        rows=len(told), cols=1, shared_xaxes=True, subplot_titles=list(told), vertical_spacing=panel_gap(len(told), 130)
    )
    for row, splits in enumerate(told.values(), start=1):
        labels = [f"{name} (n = {one['n_traces']})" for name, one in splits.items()]
        place = {"row": row, "col": 1}
        ends = [(one["controls"].get("low", np.nan), one["controls"].get("high", np.nan)) for one in splits.values()]
        figure.add_scatter(
            x=[x for low, high in ends for x in (low, high, None)], y=[y for label in labels for y in (label,) * 3],
            mode="lines+markers", line={"color": SHADE, "width": 9}, name="random controls, their range", hoverinfo="skip",
            marker={"size": 9, "symbol": "line-ns", "line": {"width": 2, "color": GREY}}, showlegend=row == 1, **place,
        )  # fmt: skip
        effects = [one["effect"] for one in splits.values()]
        figure.add_scatter(
            x=[one["value"] for one in effects], y=labels, mode="markers", marker={"color": BLUE, "size": 10},
            name="the ablation, 95 % over problems", showlegend=row == 1,
            error_x={
                "type": "data", "symmetric": False, "color": BLUE, "thickness": 1,
                "array": [one["high"] - one["value"] for one in effects],
                "arrayminus": [one["value"] - one["low"] for one in effects],
            },
            hovertemplate="%{y}<br>%{x:.4g} nats per token<extra></extra>", **place,
        )  # fmt: skip
    figure = styled(figure, "Where it matters: parts of the traces", "", "").update_layout(height=200 + 150 * len(told))
    return figure.update_yaxes(automargin=True).update_xaxes(title="nats per answer token", row=len(told), col=1)


def _sweep_lines(result: Result, name: str) -> Figure:
    """A sweep over layers or strengths: the effect with its interval, and the range of both kinds of controls."""
    sweep = result.numbers["sweeps"][name]
    at = [result.axes[0].labels.index(one) for one in sweep["names"]]
    x = np.array(sweep["values"], dtype=np.float64)
    figure = go.Figure()
    for key, (what, colour, _) in _CONTROLS.items():
        drawn = np.asarray(result.arrays[key], dtype=np.float64)[at]
        if not np.isfinite(drawn).any():
            continue
        low, high = np.nanmin(drawn, axis=1), np.nanmax(drawn, axis=1)
        fill = SHADE if colour == GREY else "rgba(204,121,167,.25)"
        for ends, to in ((low, None), (high, "tonexty")):
            figure.add_scatter(
                x=x, y=ends, mode="lines", line={"color": colour, "width": 0.5}, fill=to, fillcolor=fill, hoverinfo="skip",
                name=f"{what}, their range", legendgroup=key, showlegend=to is not None,
            )  # fmt: skip
    figure.add_scatter(
        x=x, y=result.values[at], mode="lines+markers", line={"color": BLUE}, marker={"size": 9}, name=short_label(name),
        error_y=_bars(result, at), hovertemplate=sweep["over"] + " %{x:g}<br>%{y:.4g} nats per token<extra></extra>",
    )  # fmt: skip
    n = len(result.numbers["traces"])
    figure = styled(
        figure, f"{name}, by {sweep['over']} ({plural(n, 'trace')})", sweep["over"], "nats per answer token"
    )
    return figure.update_xaxes(tickvals=x) if len(x) <= 30 else figure


def _patch_map(result: Result) -> Figure:
    """The recovered logit difference by layer and token (or head); a cross marks what no unrelated text's states recover."""
    across = result.axes[-1]
    values = result.values[0]
    pieces = result.numbers.get("pieces")
    labels = (
        [f"{label} {piece!r}" for label, piece in zip(across.labels, pieces, strict=True)]
        if pieces
        else list(across.labels)
    )
    reach = max(1.0, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    figure = go.Figure()
    figure.add_heatmap(
        z=values, x=np.arange(len(labels)), y=np.arange(len(values)), colorscale="RdBu_r", zmin=-reach, zmax=reach,
        colorbar={"title": {"text": "recovered logit difference", "side": "right"}},
        customdata=_patch_hover(result, labels), hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    if result.null is not None:
        down, right = np.nonzero(values > np.maximum(result.null.high[0], LEAST_SHARE))
        figure.add_scatter(
            x=right, y=down, mode="markers", hoverinfo="skip", name=f"above the {result.null.what}", showlegend=True,
            marker={"symbol": "x", "size": 5, "color": ORANGE, "line": {"width": 1, "color": "black"}},
        )  # fmt: skip
    right_, wrong = (result.numbers[key] for key in ("right", "wrong"))
    title = f"Patching {result.numbers['at']}: how much of {right_.strip()!r} over {wrong.strip()!r} comes back"
    figure = styled(figure, title, across.name, "layer").update_layout(height=220 + 22 * len(values))
    step = -(-len(labels) // 60)
    figure.update_xaxes(
        tickvals=np.arange(0, len(labels), step), ticktext=[escape(one) for one in labels[::step]],
        tickangle=-90 if pieces else 0, automargin=True,
    )  # fmt: skip
    return figure.update_yaxes(range=[-0.5, len(values) - 0.5], dtick=-(-len(values) // 16))


def _patch_hover(result: Result, labels: list[str]) -> list[list[str]]:
    def told(layer: int, place: int) -> str:
        lines = [f"layer {layer}, {result.axes[-1].name} {short_label(labels[place])}"]
        lines += [f"{name}: {result.values[i, layer, place]:.4g}" for i, name in enumerate(result.axes[0].labels)]
        if result.null is not None:
            low, high = (float(end[0, layer, place]) for end in (result.null.low, result.null.high))
            lines.append(f"unrelated texts recover {low:.3g} to {high:.3g}")
        return "<br>".join(lines)

    return [[told(layer, place) for place in range(len(labels))] for layer in range(result.values.shape[1])]


def _told(result: Result) -> Mapping[str, Mapping[str, Any]]:
    return result.numbers["ablations"]  # type: ignore[no-any-return]  # what `ablation_result` writes


def _hover(result: Result) -> list[str]:
    def line(name: str, one: Mapping[str, Any]) -> str:
        matched = "" if one["matched"] is None else f", p of moves as far {one['matched']['p_value']:.3g}"
        effect = one["effect_nats_per_answer_token"]
        return (
            f"{short_label(name)}<br>{effect['value']:.4g} [{effect['low']:.4g}, {effect['high']:.4g}] nats per token"
            f"<br>p {one['p_value']:.3g} (at least {one['smallest_p']:.3g}), {one['controls']['n']} controls{matched}"
        )

    return [line(name, one) for name, one in _told(result).items()]


def _bars(result: Result, at: list[int] | None = None) -> dict[str, object]:
    assert result.interval is not None
    chosen = slice(None) if at is None else at
    values: Values = result.values[chosen]
    return {
        "type": "data",
        "symmetric": False,
        "array": result.interval.high[chosen] - values,
        "arrayminus": values - result.interval.low[chosen],
        "color": BLUE,
        "thickness": 1,
    }
