"""The trace reader: what `reader.js` needs of a trace, and the component that shows it."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from reasonscope.app.colourings import Colouring
from reasonscope.app.readings import Reading
from reasonscope.data.align import token_strings
from reasonscope.data.trace import Trace

# Okabe and Ito's palette, with a word each: colour is never the only sign.
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
    return files("reasonscope.app").joinpath(name).read_text(encoding="utf-8")


_reader = st.components.v2.component(
    "reasonscope_reader", html=_HTML, css=_asset("reader.css"), js=_asset("reader.js"), isolate_styles=True
)


def show_reader(
    read: Reading,
    colour: Colouring | None,
    *,
    key: str,
    sentence: int | None,
    query: str,
    dark: bool,
    on_sentence: Callable[[], None],
    on_query: Callable[[], None],
) -> Any:
    """Show a trace. The result's `sentence` and `query` are what the reader chose and searches for."""
    data = {**reader_data(read, colour), "sentence": sentence, "query": query, "dark": dark}
    return _reader(key=key, data=data, width="stretch", on_sentence_change=on_sentence, on_query_change=on_query)


def reader_data(read: Reading, colour: Colouring | None) -> dict[str, Any]:
    """The trace as blocks in reading order (prompt, sentences, answer), each the pieces of its text; and the values to colour by."""
    return {
        "id": read.trace.id,
        "tokenised": bool(len(read.trace.token_ids)),
        "blocks": _blocks(read),
        "kinds": {
            tag: {"label": label, "colour": hue, "title": tag.replace("_", " ")} for tag, (label, hue) in KINDS.items()
        },
        "colour": None if colour is None else _colour(colour),
    }


def _blocks(read: Reading) -> list[dict[str, Any]]:
    """Blocks that cover the text without a gap: what stands between two sentences goes with the first of them."""
    trace, cut = read.trace, read.sentences
    tokenised = bool(len(trace.token_ids))
    pieces = token_strings(trace.text, trace.offsets) if tokenised else []
    last = trace.tokens.thinking.stop if tokenised else trace.chars.thinking.stop
    starts = [(s.tokens if tokenised else s.chars).start for s in cut]
    end = len(pieces) if tokenised else len(trace.text)
    first = starts[0] if starts else last
    parts: list[dict[str, Any]] = [{"role": "prompt", "index": None, "tag": "", "step": None, "from": 0, "to": first}]
    for sentence, step, start, stop in zip(cut, read.steps, starts, [*starts[1:], last], strict=True):
        named = {"role": "sentence", "index": sentence.index, "tag": sentence.tag, "step": step}
        parts.append({**named, "from": start, "to": stop})
    parts.append({"role": "answer", "index": None, "tag": "", "step": None, "from": last, "to": end})
    return _with_pieces(trace, [part for part in parts if part["to"] > part["from"]], pieces)


def _with_pieces(trace: Trace, parts: list[dict[str, Any]], pieces: list[str]) -> list[dict[str, Any]]:
    """The text of each part, token by token; of a trace without tokens in one piece."""
    blocks, first = [], 0
    for part in parts:
        start, stop = part.pop("from"), part.pop("to")
        text = pieces[start:stop] if pieces else [trace.text[start:stop]]
        blocks.append({**part, "first": first, "pieces": text})
        first += len(text)
    return blocks


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
    """Four digits are more than a colour shows, and a third of the bytes."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
