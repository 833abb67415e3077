"""Attention heads: every head by a score, then where those that are chosen look: sentence by sentence, and token by token in a block."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from reasonscope.analysis import figures
from reasonscope.analysis.looking_back import token_block
from reasonscope.analysis.results import Result
from reasonscope.app import components, measurements, readings, state
from reasonscope.app.readings import Reading
from reasonscope.app.runs import Run
from reasonscope.app.state import BOUND, Key
from reasonscope.data.align import token_strings

_NAME, _MAPS = "results/heads/*", "results/attention_map/*"
_FIRST = ("receivers", "heads")  # whose scores stand first
_SIDE_BY_SIDE = 3  # heads whose maps stand beside each other

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A score of every head: the line `index` of a result whose last axes are layer and head."""

    result: Result
    index: tuple[int, ...]

    @property
    def values(self) -> Values:
        return np.asarray(self.result.values[self.index])

    @property
    def unit(self) -> str:
        """That of this line, where the lines of the result have several."""
        units = self.result.numbers.get("units") or {}
        metric = self.result.axes[0].labels[self.index[0]] if self.index else ""
        return str(units.get(metric, "" if self.result.unit == "1" else self.result.unit))

    def has(self, place: tuple[int, int]) -> bool:
        layers, heads = self.values.shape
        return bool(place[0] < layers and place[1] < heads)

    def chance(self, place: tuple[int, int]) -> str:
        return components.between(self.result.null, (*self.index, *place) if self.has(place) else None)


def show(run: Run) -> None:
    components.heading(
        "Attention heads", "Each square is a head, its colour a score; a click on one shows what it looks at."
    )
    grids = _grids(run)
    components.damage(measurements.damaged(run))
    if not grids:
        components.missing("scores of heads", measurements.command(run, _NAME))
        return
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
    _chosen(run, grids)


def _grids(run: Run) -> dict[str, Grid]:
    """Every score (layer, head) among the results of the run, by metric, method and trace."""
    found: dict[str, Grid] = {}
    for method in sorted(measurements.methods(run), key=lambda method: method not in _FIRST):
        for trace, result in measurements.results(run, method).items():
            axes = [axis.name for axis in result.axes]
            if axes[-2:] != ["layer", "head"] or not result.measured or len(axes) > 3:
                continue
            label = f"{method.replace('_', ' ')} · {trace}"
            if len(axes) == 2:
                found[label] = Grid(result=result, index=())
            else:
                lines = enumerate(result.axes[0].labels)
                found |= {f"{metric} · {label}": Grid(result=result, index=(i,)) for i, metric in lines}
    return found


def _chosen(run: Run, grids: Mapping[str, Grid]) -> None:
    """The chosen head, those it is compared with, their scores and where they look."""
    head = _place(state.recall(Key.HEAD))
    if head is None:
        st.caption("Choose a head to see all its scores and where it looks.")
        return
    layers, heads = max((grid.values.shape for grid in grids.values()), key=lambda shape: shape[0] * shape[1])
    names = [f"{layer}.{index}" for layer in range(layers) for index in range(heads)]
    own = f"{head[0]}.{head[1]}"
    st.subheader(f"Layer {head[0]}, head {head[1]}", anchor=False)
    others = st.multiselect(
        "Compare with", [name for name in names if name != own], max_selections=_SIDE_BY_SIDE - 1, key=Key.HEADS, bind=BOUND
    )  # fmt: skip
    chosen = {name: place for name in (own, *others) if (place := _place(name)) is not None}
    st.dataframe(_scores(grids, chosen), hide_index=True, key="head-scores")
    _maps(run, chosen)


def _place(name: str) -> tuple[int, int] | None:
    """Layer and index of a head's name, None where it is none."""
    layer, _, index = name.partition(".")
    return (int(layer), int(index)) if layer.isdigit() and index.isdigit() else None


def _scores(grids: Mapping[str, Grid], chosen: Mapping[str, tuple[int, int]]) -> list[dict[str, object]]:
    """A row a score: of each head its value, chance and rank."""
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
                row[f"{head} chance"] = grid.chance(place)
        rows.append(row)
    return rows


def _maps(run: Run, chosen: Mapping[str, tuple[int, int]]) -> None:
    """Sentence by sentence what the chosen heads look at, on one of the traces whose attention was kept."""
    kept = {id: one for id, one in measurements.results(run, "attention_map").items() if "matrix" in one.arrays}
    if not kept:
        components.missing("where heads look", measurements.command(run, _MAPS))
        return
    id = st.selectbox("Attention of the trace", list(kept), key=Key.TRACE, bind=BOUND)
    result, read = kept[id], readings.reading(run, id)
    matrix = np.asarray(result.arrays["matrix"], dtype=np.float64)
    texts = [f"{one.index} {one.text}" for one in read.sentences]
    if matrix.shape[-1] != len(texts):
        texts = [str(i) for i in range(matrix.shape[-1])]
    st.caption(
        "A click on a cell shows the tokens of its two sentences. Mean attention of a token of the row on one of the column."
    )
    command = f"{measurements.command(run, _MAPS)} --trace {shlex.quote(id)}"
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


def _block(result: Result, read: Reading, chosen: Mapping[str, tuple[int, int]], command: str) -> None:
    """Token by token how one sentence looks at another, in each chosen head."""
    block = _place(state.recall(Key.BLOCK))
    if block is None or "key" not in result.arrays or max(block) >= len(read.sentences):
        return
    target, source = (read.sentences[i] for i in block)
    pieces = token_strings(read.trace.text, read.trace.offsets)
    st.subheader(f"Sentence {target.index} looks at sentence {source.index}", anchor=False)
    st.text(f"{target.index}: {target.text}\n{source.index}: {source.text}")
    first = int(result.numbers["first"])
    names = [_visible(pieces[span.start : span.stop]) for span in (target.tokens, source.tokens)]
    for column, (name, place) in zip(st.columns(len(chosen)), chosen.items(), strict=True):
        with column, components.told():
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
    """Tokens with their place, for two may be alike, and their white space to be seen."""
    return [f"{i} {components.visible(piece)}" for i, piece in enumerate(pieces)]
