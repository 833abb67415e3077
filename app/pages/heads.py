"""Attention heads: a map of all heads by a score, then what the chosen ones attend to, sentence by sentence and
token by token."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import streamlit as st

from reasonscope.analysis import figures
from reasonscope.analysis.attention.reading import token_block
from reasonscope.analysis.results import Band, Result
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements, readings, state
from reasonscope.app.page_parts.colourings import colouring_name
from reasonscope.app.page_parts.state import BOUND, Key
from reasonscope.data.arrays import Values
from reasonscope.data.sentence_cut import CutTrace, sentence_at
from reasonscope.data.summary import plural
from reasonscope.data.text.align import token_strings

_NAME = "results/heads/*"
_MAP, _CLOSE, _AGAIN = "attention_map", "close_attention", "recurrence"
_FIRST = ("receivers", "heads")  # methods whose scores come first
_SIDE_BY_SIDE = 3  # maps of heads in a row


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """A score of every head: the line `index` of a result whose last axes are layer and head."""

    result: Result
    index: tuple[int, ...]

    @property
    def values(self) -> Values:
        """The scores (layer, head)."""
        return np.asarray(self.result.values[self.index])

    @property
    def unit(self) -> str:
        """The unit of this line, if the lines of the result have different ones."""
        return self.result.unit_of(self.result.axes[0].labels[self.index[0]] if self.index else "")

    def has(self, place: tuple[int, int]) -> bool:
        """Whether the model has this head."""
        layers, heads = self.values.shape
        return bool(place[0] < layers and place[1] < heads)

    def between(self, band: Band | None, place: tuple[int, int]) -> str:
        """The ends of a band for this head, as text."""
        return components.between(band, (*self.index, *place) if self.has(place) else None)


def show(run: OpenRun) -> None:
    """Show the heads of the run's model."""
    components.heading(
        "Attention heads", "Each square is a head, its colour a score; click on one to see what it attends to."
    )
    components.damage(measurements.damaged(run))
    if grids := _grids(run):
        _grid(grids, run)
        _chosen(run, grids)
    else:
        components.missing("scores of heads", measurements.command_for(run, _NAME))
    _of_trace(run)


def _grid(grids: Mapping[str, _Grid], run: OpenRun) -> None:
    """All heads by one score."""
    name = st.selectbox("Score", list(grids), key=Key.METRIC, bind=BOUND)
    grid = grids[name]
    figure = figures.head_grid(grid.values, title=name, measure=grid.unit)
    command = measurements.command_of(run, grid.result.method)
    clicked = components.show_figure(figure, name="heads", command=command, key="heads-grid", clickable=True)
    picked = next((f"{int(point['y'])}.{int(point['x'])}" for point in clicked), None)
    if components.is_new("heads-grid", picked) and picked != state.recall(Key.HEAD):
        state.remember(Key.HEAD, picked)
        state.remember(Key.BLOCK, None)
    components.provenance(grid.result)


def _grids(run: OpenRun) -> dict[str, _Grid]:
    """Every score (layer, head) among the results of the run, by metric, method and trace."""
    found: dict[str, _Grid] = {}
    for method in sorted(measurements.methods(run), key=lambda method: method not in _FIRST):
        for trace, result in measurements.results(run, method).items():
            axes = [axis.name for axis in result.axes]
            if axes[-2:] != ["layer", "head"] or not result.measured or len(axes) > 3:
                continue
            label = f"{method.replace('_', ' ')} · {trace}"
            if len(axes) == 2:
                found[label] = _Grid(result=result, index=())
            else:
                lines = enumerate(result.axes[0].labels)
                found |= {f"{metric} · {label}": _Grid(result=result, index=(i,)) for i, metric in lines}
    return found


def _chosen(run: OpenRun, grids: Mapping[str, _Grid]) -> None:
    """The chosen head, those it is compared with, their scores and what they attend to."""
    head = _place(state.recall(Key.HEAD))
    if head is None:
        st.caption("Choose a head to see all its scores and what it attends to.")
        return
    layers, heads = max((grid.values.shape for grid in grids.values()), key=lambda shape: shape[0] * shape[1])
    names = [f"{layer}.{index}" for layer in range(layers) for index in range(heads)]
    own = f"{head[0]}.{head[1]}"
    st.subheader(f"Layer {head[0]}, head {head[1]}", anchor=False)
    others = st.multiselect(
        "Compare with", [name for name in names if name != own], max_selections=_SIDE_BY_SIDE - 1, key=Key.HEADS, bind=BOUND
    )  # fmt: skip
    st.dataframe(_scores(grids, _places(own, others)), hide_index=True, key="head-scores")


def _places(own: str, others: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The heads by name, the chosen one first."""
    return {name: place for name in (own, *others) if (place := _place(name)) is not None}


def _place(name: str) -> tuple[int, int] | None:
    """Layer and index of a head's name, or None for another name."""
    layer, _, index = name.partition(".")
    return (int(layer), int(index)) if layer.isdigit() and index.isdigit() else None


def _scores(grids: Mapping[str, _Grid], chosen: Mapping[str, tuple[int, int]]) -> list[dict[str, object]]:
    """One row per score: each head's value, interval, chance and rank."""
    rows: list[dict[str, object]] = []
    for name, grid in grids.items():
        row: dict[str, object] = {"score": name}
        for head, place in chosen.items():
            if grid.has(place):
                value = grid.values[place]
                row |= {
                    head: f"{value:.4g}",
                    f"{head} rank": f"{1 + int((grid.values > value).sum())} of {grid.values.size}",
                }
                row[f"{head} 95 % interval"] = grid.between(grid.result.interval, place)
                row[f"{head} chance"] = grid.between(grid.result.null, place)
        rows.append(row)
    return rows


def _of_trace(run: OpenRun) -> None:
    """One trace: what the chosen heads attend to, what the end of its thinking attends to, and which tokens are attended to
    again after a pause."""
    kept = {method: measurements.results(run, method) for method in (_MAP, _CLOSE, _AGAIN)}
    chosen = _places(state.recall(Key.HEAD), st.session_state.get(Key.HEADS) or ())
    ids = list(dict.fromkeys(id for results in kept.values() for id in results))
    st.subheader("On one trace", anchor=False)
    if not ids:
        components.missing("where heads look", measurements.command_of(run, _MAP))
        components.missing(
            "what the end of the thinking attends to, and what is attended to again",
            measurements.command_for(run, _NAME),
        )
        return
    id = st.selectbox("Trace", ids, key=Key.TRACE, bind=BOUND)
    if (result := kept[_MAP].get(id)) is None or "matrix" not in result.arrays:
        components.missing("where heads look on this trace", _on(run, _MAP, id))
    elif chosen:
        _maps(run, id, result, chosen)
    _closing(run, id, kept[_CLOSE].get(id), chosen)
    _again(run, id, kept[_AGAIN].get(id), chosen)


def _on(run: OpenRun, method: str, id: str) -> str:
    return f"{measurements.command_of(run, method)} --trace {shlex.quote(id)}"


def _closing(run: OpenRun, id: str, result: Result | None, chosen: Mapping[str, tuple[int, int]]) -> None:
    """How much the end of the thinking attends to each of its sentences: all heads together, and the chosen ones."""
    st.subheader("What the end of the thinking attends to", anchor=False)
    if not _there(run, id, result, _CLOSE) or result is None:
        return
    heads = np.asarray(result.arrays["heads"], dtype=np.float64)
    beside = {
        f"head {name}": heads[place]
        for name, place in chosen.items()
        if place[0] < heads.shape[0] and place[1] < heads.shape[1]
    }
    figure = figures.along(result, beside=beside)
    clicked = components.show_figure(
        figure, name="close_attention", command=_on(run, _CLOSE, id), key="close-attention", clickable=True
    )
    st.caption("Mean share of attention of a token of the sentence; a click opens the sentence.")
    components.provenance(result)
    picked = next((int(point["x"]) for point in clicked), None)
    if components.is_new("close-attention", picked):
        state.go("trace", **{Key.TRACE: id, Key.SENTENCE: picked, Key.COLOUR: colouring_name(_CLOSE)})


def _again(run: OpenRun, id: str, result: Result | None, chosen: Mapping[str, tuple[int, int]]) -> None:
    """How long each token waits before it is attended to again, in one layer, and how many tokens do in every layer."""
    st.subheader("What is attended to again after a pause", anchor=False)
    if not _there(run, id, result, _AGAIN) or result is None:
        return
    layers = result.axes[0].labels
    own = next((str(place[0]) for place in chosen.values() if str(place[0]) in layers), layers[-1])
    layer = st.selectbox("Layer", layers, index=layers.index(own), key=Key.LAYER, bind=BOUND)
    figure = figures.along(result, only=[layer])
    clicked = components.show_figure(
        figure, name="recurrence", command=_on(run, _AGAIN, id), key="recurrence", clickable=True
    )
    st.dataframe(_by_layer(result), hide_index=True, key="recurrence-layers", height="content")
    st.caption(
        "A token comes back if it is attended to after a pause of more than one token; the percentile is of those that do. "
        f"n = {plural(len(result.axes[-1]), 'token')} in each layer."
    )
    components.provenance(result)
    picked = next((int(point["x"]) for point in clicked), None)
    if components.is_new("recurrence", picked) and picked is not None:
        sentence = sentence_at(readings.cut_of(run, id), picked)
        colour = colouring_name(_AGAIN, f"layer {layer}")
        state.go("trace", **{Key.TRACE: id, Key.SENTENCE: sentence, Key.COLOUR: colour})


def _by_layer(result: Result) -> list[dict[str, object]]:
    """For each layer the share of tokens that come back and the 80th percentile of their pauses, with intervals and
    nulls."""
    rows: list[dict[str, object]] = []
    pairs = zip(result.numbers["by_layer"], result.numbers["by_layer_null"], strict=True)
    for layer, (seen, chance) in zip(result.axes[0].labels, pairs, strict=True):
        row: dict[str, object] = {"layer": layer}
        for name, key in (("tokens that come back", "recurring"), ("80th percentile, tokens", "percentile_80")):
            row |= {
                name: _known(seen[key]["value"]),
                f"{name}: 95 % interval": components.interval(*seen[key]["ci"]),
                f"{name}: chance": _known(chance[key]),
            }
        rows.append(row)
    return rows


def _known(value: float | None) -> str:
    return "none" if value is None else components.number(value)


def _there(run: OpenRun, id: str, result: Result | None, method: str) -> bool:
    """Whether a trace has this result; otherwise shows why not, and the command that measures it."""
    if result is None:
        components.missing("this trace", _on(run, method, id))
    elif not result.measured:
        st.warning(components.as_text(f"Not measured on this trace: {result.reason}"))
    return result is not None and result.measured


def _maps(run: OpenRun, id: str, result: Result, chosen: Mapping[str, tuple[int, int]]) -> None:
    """What the chosen heads attend to, sentence by sentence."""
    read = readings.cut_of(run, id)
    matrix = np.array(result.arrays["matrix"], dtype=np.float64)
    matrix[:, :, *np.triu_indices(matrix.shape[-1], 1)] = np.nan  # attention is causal
    texts = [f"{one.index} {one.text}" for one in read.sentences]
    if not readings.is_over(read, result):
        texts = [str(i) for i in range(matrix.shape[-1])]
    st.caption(
        "Click on a cell to see the tokens of its two sentences. Mean attention of a token of the row on one of the column."
    )
    command = _on(run, _MAP, id)
    for column, (name, place) in zip(st.columns(len(chosen)), chosen.items(), strict=True):
        if place[0] >= matrix.shape[0] or place[1] >= matrix.shape[1]:
            continue
        with column:
            figure = figures.square_map(
                matrix[place], title=f"Head {name}", measure="attention", rows="sentence", columns="looks at", names=(texts, texts),
                named=False, clickable=True,
            )  # fmt: skip
            clicked = components.show_figure(
                figure, name=f"head_{name}", command=command, key=f"head-{name}", clickable=True
            )
            picked = next((f"{int(point['y'])}.{int(point['x'])}" for point in clicked), None)
            if components.is_new(f"head-{name}", picked):
                state.remember(Key.BLOCK, picked)
    _block(result, read, chosen, command)


def _block(result: Result, read: CutTrace, chosen: Mapping[str, tuple[int, int]], command: str) -> None:
    """How one sentence attends to another, token by token, in each chosen head."""
    block = _place(state.recall(Key.BLOCK))
    if block is None or "key" not in result.arrays or max(block) >= len(read.sentences):
        return
    if not readings.is_over(read, result):
        st.caption(
            "This map is over another cut of the trace into sentences; measure it again to look at single tokens."
        )
        return
    target, source = (read.sentences[i] for i in block)
    pieces = token_strings(read.trace.text, read.trace.offsets)
    st.subheader(f"Sentence {target.index} attends to sentence {source.index}", anchor=False)
    st.text(f"{target.index}: {target.text}\n{source.index}: {source.text}")
    first = int(result.numbers["first"])
    names = [_visible(pieces[span.start : span.stop]) for span in (target.tokens, source.tokens)]
    for column, (name, place) in zip(st.columns(len(chosen)), chosen.items(), strict=True):
        with column, components.show_errors():
            key, weight = (np.asarray(result.arrays[array])[place] for array in ("key", "weight"))
            seen = token_block(key, weight, first=first, targets=target.tokens, sources=source.tokens)
            figure = figures.square_map(
                seen, title=f"Head {name}, token by token", measure="attention", rows="token", columns="looks at",
                names=(names[0], names[1]),
            )  # fmt: skip
            components.show_figure(figure, name=f"head_{name}_tokens", command=command, key=f"head-tokens-{name}")
    st.caption(
        f"Of each token the {result.arrays['key'].shape[-1]} tokens that it looks at most were kept; what is empty gets less."
    )


def _visible(pieces: Sequence[str]) -> list[str]:
    """Tokens with their position, because two may be equal, and with visible white space."""
    return [f"{i} {components.visible(piece)}" for i, piece in enumerate(pieces)]
