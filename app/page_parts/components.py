"""What the pages are made of: headings, numbers with intervals, figures with their data, and the command for what is missing."""

import csv
import io
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from reasonscope.analysis import figures
from reasonscope.analysis.figures import Figure
from reasonscope.analysis.results import Band, Result
from reasonscope.app.page_parts import state
from reasonscope.data.errors import ReasonscopeError
from reasonscope.data.intervals import wilson_interval

_FORMULA = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$|\$([^$\n]+?)\$|(\\boxed\{[^{}]*\})", re.DOTALL)
_ADDRESS = re.compile(r":(?=//)|www(?=\.)|@", re.IGNORECASE)
_MANY_FORMULAS = 8
_THINGS = ("token", "sentence", "cut", "word")  # what an axis can count
_LOG = logging.getLogger("reasonscope.app")


def heading(title: str, what: str) -> None:
    """The title of a page, what it shows, and the button that copies its address."""
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    with left:
        st.header(as_text(title), anchor=False)
    with right:
        state.copy_link()
    st.caption(what)


@contextmanager
def show_errors() -> Iterator[None]:
    """Show an error of ours as one line on the page; its detail goes to the log."""
    try:
        yield
    except ReasonscopeError as error:
        _LOG.warning("%s", error, exc_info=True)
        st.error(as_text(" ".join(str(error).split())), icon=":material/error:")


def missing(what: str, command: str) -> None:
    """Say that something was not measured, with the command that measures it."""
    st.info(as_text(f"Not measured on this run yet: {what}. Measure it with:"), icon=":material/terminal:")
    st.code(command, language="bash", wrap_lines=True)


def damage(problems: Sequence[str]) -> None:
    """Files that cannot be read, one per line."""
    for problem in problems:
        st.warning(as_text(problem), icon=":material/broken_image:")


def show_figure(figure: Figure, *, name: str, command: str, key: str, clickable: bool = False) -> list[dict[str, Any]]:
    """Show a figure with its data and the command that makes it again; gives the points that were clicked."""
    image = st.session_state.get(f"{key}-image", "PNG")
    options = {
        "displaylogo": False,
        "toImageButtonOptions": {"format": image.lower(), "filename": name, "scale": 2 if image == "PNG" else 1},
    }
    drawn = figures.in_theme(figure, dark=state.is_dark())
    event = st.plotly_chart(
        drawn,
        key=key,
        theme=None,
        config=options,
        on_select="rerun" if clickable else "ignore",
        selection_mode="points",
    )
    _export(figure, name=name, command=command, key=key)
    return list(event["selection"]["points"]) if clickable else []


def _export(figure: Figure, *, name: str, command: str, key: str) -> None:
    """Offer the data, the page and the picture of a figure, and the command that makes it again."""
    with st.popover("Export", icon=":material/download:"):
        st.download_button("Data (CSV)", lambda: _csv(figures.figure_data(figure)), f"{name}.csv", key=f"{key}-csv")
        page = "<!doctype html><meta charset='utf-8'>"
        html = lambda: page + figures.to_html(figure, with_library=True)  # noqa: E731 - made when it is asked for
        st.download_button("Page (HTML)", html, f"{name}.html", "text/html", key=f"{key}-html")
        st.radio("The camera above the figure saves", ["PNG", "SVG"], key=f"{key}-image", horizontal=True)
        st.caption("Make it again with")
        st.code(command, language="bash", wrap_lines=True)


def is_new(key: str, picked: object) -> bool:
    """Whether a mark was clicked since the page was last drawn: a figure keeps reporting its last click."""
    last = f"{key}-picked"
    new = picked is not None and st.session_state.get(last) != picked
    st.session_state[last] = picked
    return new


def show_kept(where: Path, name: str, *, command: str) -> None:
    """Show a figure that a command saved for the run, or what is wrong with it."""
    path = where / f"{Path(name).name}.json"  # the name comes from a file of the run, and must not lead out of it
    if not path.exists():
        missing(f"the figure {name.replace('_', ' ')}", command)
        return
    with show_errors():
        show_figure(figures.read_figure(path), name=name, command=command, key=f"kept-{name}")


def of_contrast(figures_kept: Sequence[str]) -> list[str]:
    """Of figures that each contrast has, those of the chosen contrast; all figures if there is only one contrast."""
    contrasts = list(dict.fromkeys(name.rsplit("_", 1)[0] for name in figures_kept))
    if len(contrasts) < 2:
        return list(figures_kept)
    chosen = st.segmented_control(
        "Contrast",
        contrasts,
        default=contrasts[0],
        format_func=as_text,
        key=state.Key.CONTRAST,
        bind=state.BOUND,
        required=True,
    )
    return [name for name in figures_kept if name.rsplit("_", 1)[0] == chosen]


def show_numbers(numbers: Mapping[str, Any], *, key: str) -> None:
    """Show nested numbers as one table: each value with its 95 % interval."""
    found = list(_flattened(numbers))
    known = any(low is not None for *_, low, _ in found)
    table = [
        {"number": name, "value": _text(value), **({"95 % interval": interval(low, high)} if known else {})}
        for name, value, low, high in found
    ]
    st.dataframe(table, hide_index=True, key=key, height="content")


def _flattened(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, value and the ends of the interval of each number; runs of earlier versions have the ends in a list `ci`."""
    for name, value in numbers.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and "value" in value:
            low, high = value.get("ci") or (value.get("low"), value.get("high"))
            yield label, value["value"], low, high
            rest = {inner: other for inner, other in value.items() if inner not in ("value", "ci", "low", "high")}
            yield from _flattened(rest, f"{label} · ")
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{label} · ")
        elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
            for place, inner in enumerate(value):
                yield from _flattened({_named(inner, place): inner}, f"{label} · ")
        elif isinstance(value, list):
            yield label, " … ".join(map(_text, value)), None, None
        else:
            yield label, value, None, None


def _named(value: object, place: int) -> str:
    """The name of a member of a list: its name or strength, else its place."""
    known = value if isinstance(value, Mapping) else {}
    return str(known.get("name", f"strength {known['strength']:g}" if "strength" in known else place))


def made_by(kept: Mapping[str, Any]) -> None:
    """Show the command and the seed that made the numbers of a page."""
    st.caption(as_text(f"Seed {kept['seed']}. Made by"))
    st.code(str(kept["command"]), language="bash", wrap_lines=True)


def provenance(result: Result) -> None:
    """Show what chance gives, how sure the numbers are, and their provenance."""
    said = [
        f"{result.quantity} [{units}]" if (units := _units(result)) else result.quantity,
        f"chance: {result.null.what}" if result.null else f"no null: {result.null_missing or result.reason}",
        f"interval: {result.interval.what}" if result.interval else f"no interval: {_of_one(result)}",
        *_counts(result),
        *(f"{name} {value}" for name, value in result.provenance.items() if isinstance(value, int | float | str)),
    ]
    st.caption(as_text(" · ".join(said)))


def _of_one(result: Result) -> str:
    """What each value is measured on, if nothing was resampled that an interval could be over."""
    last = result.axes[-1].name
    if last == "source":
        return "each value is of one pair of sentences"
    return f"each value is of one {last}" if last in _THINGS else "all values are of this trace alone"


def _counts(result: Result) -> Iterator[str]:
    """How many things were measured, and how many the result is over."""
    last = result.axes[-1].name
    if last in (*_THINGS, "source"):
        known = np.isfinite(result.values).reshape(-1, len(result.axes[-1])).any(axis=0)
        yield f"n = {int(known.sum())} {'sentence' if last == 'source' else last}s"
    for name, value in result.numbers.items():
        if name.startswith("n_") and isinstance(value, int):
            yield f"n = {value} {name.removeprefix('n_').replace('_', ' ')}"


def _units(result: Result) -> str:
    """The units of a result without its bare numbers."""
    return ", ".join(part for part in result.unit.split(", ") if part.partition(" ")[0] != "1")


def as_text(text: str) -> str:
    """A text to show as it is in Markdown: what a run holds is never read as markup."""
    # Addresses become links however they are escaped, unless they contain a word joiner, which is invisible.
    unlinked = _ADDRESS.sub("\\g<0>\u2060", text)
    return "".join(f"\\{char}" if char in r"\`*_{}[]()<>#+-.!|~$:^" else char for char in unlinked)


def number(value: float) -> str:
    """A number with four digits, or `not known`."""
    return f"{value:.4g}" if math.isfinite(value) else "not known"


def between(band: Band | None, at: int | tuple[int, ...] | None) -> str:
    """The ends of a band at a place, or `not known`."""
    return "not known" if band is None or at is None else ends((float(band.low[at]), float(band.high[at])))


def ends(interval: tuple[float, float]) -> str:
    """The ends of an interval, or `not known`."""
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    return f"{low:.3g}" if low == high else f"{low:.3g} … {high:.3g}"


def interval(low: float | None, high: float | None) -> str:
    """The ends of a number's interval; empty if it has none."""
    return "" if low is None or high is None else ends((low, high))


def share_interval(right: int, n: int) -> str:
    """Wilson's 95 % interval of a share."""
    return ends(wilson_interval(right, n))


def visible(text: str) -> str:
    """A token with visible white space."""
    return text.replace(" ", "␣").replace("\n", "⏎")


def formulas(text: str) -> None:
    """Typeset the formulas of a text."""
    for formula in ["".join(found) for found in _FORMULA.findall(text)][:_MANY_FORMULAS]:
        st.latex(formula)


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
