"""The state of a page, which is in its URL: a copied link shows the same run, trace, sentence and choices."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.errors import StreamlitAPIException


class Key(StrEnum):
    """The names in the URL. Streamlit binds widgets to them; `remember` writes the rest."""

    RUN = "run"
    TRACE = "trace"
    COLOUR = "colour"
    SENTENCE = "sentence"
    QUERY = "q"
    SEARCH = "search"
    OUTCOME = "outcome"
    ASKED = "asked"
    LENGTH = "length"
    DIFFICULTY = "difficulty"
    MEASURED = "measured"
    METHOD = "method"
    PROBE = "probe"
    CONTRAST = "contrast"
    SITE = "site"
    LAYER = "layer"
    METRIC = "metric"
    LINKS = "links"
    DEPTH = "depth"
    LEAST = "least"
    LAYOUT = "layout"
    DIRECTION = "direction"
    TRUTH = "truth"
    HEAD = "head"
    HEADS = "heads"
    BLOCK = "block"
    PLAN = "plan"
    PATCH = "patch"
    OTHER_RUN = "with"
    OTHER_TRACE = "with_trace"


BOUND = "query-params"
_PAGES, _RUNS, _GOING = "reasonscope pages", "reasonscope runs", "reasonscope going"

_COPY = """
export default function ({ parentElement, data }) {
  const button = parentElement.querySelector("button");
  const field = parentElement.querySelector("input");
  button.onclick = async () => {
    const say = (what) => { button.textContent = what; setTimeout(() => (button.textContent = "Copy link"), 1500); };
    try {
      await navigator.clipboard.writeText(location.href);
      say("Copied");
    } catch {
      field.hidden = false;
      field.value = location.href;
      field.select();
    }
  };
}
"""
_COPY_STYLE = """
div { display: flex; gap: 0.4rem; justify-content: flex-end; }
button, input {
  font: inherit; font-family: var(--st-font); font-size: 0.85rem; color: var(--st-text-color); cursor: pointer; padding: 0.25rem 0.7rem;
  background: var(--st-secondary-background-color); border: 1px solid var(--st-border-color, #8886); border-radius: 0.4rem;
}
"""
_copy = st.components.v2.component(
    "reasonscope_copy_link",
    html='<div><input hidden readonly aria-label="link to this view"><button type="button">Copy link</button></div>',
    css=_COPY_STYLE,
    js=_COPY,
)


def recall(key: Key, default: str = "") -> str:
    """The value in the URL of a key that no widget is bound to."""
    return str(st.query_params.get(key, default))


def recall_number(key: Key) -> int | None:
    """The same as a whole number from 0; None if it is not one."""
    text = recall(key)
    return int(text) if text.isdigit() else None


def remember(key: Key, value: object) -> None:
    """Write a value into the URL; None or an empty text removes it."""
    if value is None or value == "":
        st.query_params.pop(key, None)
    else:
        st.query_params[key] = str(value)


def offer_pages(pages: dict[str, Any]) -> None:
    """Register the pages, for `go`."""
    st.session_state[_PAGES] = pages


def go(page: str, **values: object) -> None:
    """Open another page of the same run with these values of its keys."""
    st.session_state[_GOING] = page, {key: str(value) for key, value in values.items() if value not in (None, "")}
    st.rerun()


def arrive() -> None:
    """Do what `go` asked for, before any widget exists: Streamlit does not allow setting the value of an existing one."""
    page, values = st.session_state.pop(_GOING, (None, {}))
    if page is None:
        return
    if Key.RUN in st.session_state:
        values = {Key.RUN.value: st.session_state[Key.RUN], **values}
    address = {}
    for key, value in values.items():
        try:
            st.query_params[key] = value
            address[key] = value
        except (
            StreamlitAPIException
        ):  # a widget of the page that is left has this key: its value is passed on, and shows in the address
            st.session_state[key] = value
    st.switch_page(st.session_state[_PAGES][page], query_params=address)


def offer_runs(runs: dict[str, Path]) -> None:
    """Register the runs that may be shown, for the page that compares two."""
    st.session_state[_RUNS] = runs


def offered_runs() -> dict[str, Path]:
    return dict(st.session_state.get(_RUNS, {}))


def copy_link() -> None:
    """A button that copies the current address of the page."""
    _copy(key="copy-link", data={})


def is_dark() -> bool:
    return bool(st.context.theme.get("type") == "dark")
