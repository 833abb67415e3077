"""The trace reader: what `reader.js` needs of a trace, and the component that shows it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from reasonscope.app.page_parts.alternatives import ShownAlternatives
from reasonscope.app.page_parts.colourings import Colouring
from reasonscope.data.sentence_cut import CutTrace

# Okabe and Ito's palette, with a word for each colour: colour is never the only sign.
KINDS = {
    "problem_setup": ("setup", "#56B4E9"),
    "plan_generation": ("plan", "#0072B2"),
    "fact_retrieval": ("recall", "#009E73"),
    "active_computation": ("compute", "#E69F00"),
    "uncertainty_management": ("doubt", "#D55E00"),
    "self_checking": ("check", "#CC79A7"),
    "result_consolidation": ("conclude", "#B8A800"),
    "final_answer_emission": ("answer", "#7A7A7A"),
}

_HTML = """<div class="reader">
<div class="bar-top"><input class="find" type="search" placeholder="Search this trace ( / )" aria-label="Search this trace">
<span class="count" aria-live="polite"></span><button type="button" class="before" title="previous sentence (k)">◀</button>
<button type="button" class="after" title="next sentence (j)">▶</button><button type="button" class="fold-all">Fold all</button>
<span class="keys">j k: move · /: search · Enter: fold</span></div>
<canvas aria-label="The trace from left to right; a click goes to the sentence"></canvas><div class="legend"></div>
<div class="text" role="list"></div><div class="tip" hidden></div></div>"""


def _asset(name: str) -> str:
    return files("reasonscope.app.page_parts").joinpath(name).read_text(encoding="utf-8")


_reader = st.components.v2.component(
    "reasonscope_reader", html=_HTML, css=_asset("reader.css"), js=_asset("reader.js"), isolate_styles=True
)


def show_reader(
    read: CutTrace,
    colour: Colouring | None,
    other: ShownAlternatives | None,
    *,
    key: str,
    sentence: int | None,
    query: str,
    dark: bool,
    on_sentence: Callable[[], None],
    on_query: Callable[[], None],
) -> Any:
    """Show a trace. The result's `sentence` and `query` are what the reader chose and searches for."""
    data = {**_reader_data(read, colour, other), "sentence": sentence, "query": query, "dark": dark}
    return _reader(key=key, data=data, width="stretch", on_sentence_change=on_sentence, on_query_change=on_query)


def _reader_data(read: CutTrace, colour: Colouring | None, other: ShownAlternatives | None = None) -> dict[str, Any]:
    """What the page needs to show a trace, in few arrays: its text, where each token ends, blocks in reading order, and values.

    `ends` count UTF-16 units, as JavaScript does; a trace without tokens has one piece per block. A block is (role, sentence, tag, step,
    first token, tokens). Blocks cover the text without gaps: the text between two sentences belongs to the first of them.
    """
    trace = read.trace
    tokenised = bool(len(trace.token_ids))
    blocks = _blocks(read)
    cuts = trace.offsets[:, 1] if tokenised else np.array([block.stop for block in blocks])
    return {
        "id": trace.id,
        "tokenised": tokenised,
        "text": trace.text,
        "ends": _utf16(trace.text, cuts).tolist(),
        "blocks": [
            (block.role, block.sentence, block.tag, block.step, block.start, block.stop - block.start)
            if tokenised
            else (block.role, block.sentence, block.tag, block.step, place, 1)
            for place, block in enumerate(blocks)
        ],
        "kinds": {
            tag: {"label": label, "colour": hue, "title": tag.replace("_", " ")} for tag, (label, hue) in KINDS.items()
        },
        "colour": None if colour is None else _colour(colour),
        "alternatives": None if other is None else _alternatives(other),
    }


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A stretch [start, stop) of tokens (characters for a trace without tokens): the prompt, a sentence, or the answer."""

    role: str
    sentence: int | None
    tag: str
    step: int | None
    start: int
    stop: int


def _blocks(read: CutTrace) -> list[_Block]:
    trace, cut = read.trace, read.sentences
    tokenised = bool(len(trace.token_ids))
    last = trace.tokens.thinking.stop if tokenised else trace.chars.thinking.stop
    end = len(trace.token_ids) if tokenised else len(trace.text)
    starts = [(sentence.tokens if tokenised else sentence.chars).start for sentence in cut]
    ends = [span.stop for span in (trace.thinking_blocks if tokenised else trace.thinking_spans)]
    found = [_Block(role="prompt", sentence=None, tag="", step=None, start=0, stop=starts[0] if starts else last)]
    for sentence, step, start, after in zip(cut, read.steps, starts, [*starts[1:], last], strict=True):
        stop = min([after, *(end for end in ends if end > start)])
        found.append(
            _Block(role="sentence", sentence=sentence.index, tag=sentence.tag, step=step, start=start, stop=stop)
        )
        # What is written between two blocks of thinking: a first answer, a call of a tool.
        found.append(_Block(role="answer", sentence=None, tag="", step=None, start=stop, stop=after))
    found.append(_Block(role="answer", sentence=None, tag="", step=None, start=last, stop=end))
    return [block for block in found if block.stop > block.start]


def _utf16(text: str, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in a text, counted in UTF-16 units instead of characters; a character beyond the first plane is two."""
    if text.isascii():
        return places
    wide = np.array([ord(char) > 0xFFFF for char in text])
    return np.asarray(places + np.concatenate([[0], np.cumsum(wide)])[places])


def _alternatives(other: ShownAlternatives) -> dict[str, Any]:
    known, ids = np.unique(other.ids, return_inverse=True)
    return {
        "first": other.first,
        "top": other.ids.shape[1],
        "said": _numbers(other.said),
        "logprobs": _numbers(other.logprobs.ravel()),
        "ids": ids.ravel().tolist(),
        "pieces": [other.pieces.get(int(id), "") for id in known],
    }


def _colour(colour: Colouring) -> dict[str, Any]:
    low, high = colour.ends
    return {
        "title": colour.title,
        "unit": "" if colour.unit == "1" else colour.unit,
        "per": colour.per,
        "values": _numbers(colour.values),
        "low": low,
        "high": high,
        "null": None if colour.null is None else [_numbers(end) for end in colour.null],
        "marks": list(colour.marks),
        "about": colour.about,
    }


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    """Numbers with four digits: more than a colour shows, in a third of the bytes."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
