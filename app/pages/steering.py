"""Steering: the effect of each method compared with its nulls, and a playground that answers one problem with and
without steering."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from shlex import quote

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements, playground, readings, state
from reasonscope.app.page_parts.playground import SCOPES, Duel, Side
from reasonscope.app.page_parts.state import Key
from reasonscope.data.summary import plural
from reasonscope.data.trace import Sampling

_DUEL, _WORKING = "reasonscope duel", "reasonscope steering at work"
_DOSE = "dose_"  # prefix of the figure of a method's dose-response
_LEDGER = "Mia has 14 apples. She buys 7 more apples. Then she gives away 5 apples. How many apples does Mia have now?"


def show(run: OpenRun) -> None:
    """Show the steering experiments of the run."""
    components.heading(
        "Steering",
        "Effects of steering on length and accuracy, compared with random vectors, and one problem with and without it.",
    )
    measured = {}
    for name in ("sweep", "steering", "compare"):
        with components.show_errors():  # an error in one of them must not hide the other or the playground
            measured[name] = measurements.numbers(run, name)
    if measured and not any(measured.values()):
        _unmeasured(run)
    for source, kept in measured.items():
        if kept is None:
            continue
        _figures(run, kept["figures"], kept["command"])
        with st.expander("Every number"):
            components.show_numbers(kept["numbers"], key=f"{source}-numbers")
            components.made_by(kept)
    st.subheader("Playground", anchor=False)
    _playground(run)


def _unmeasured(run: OpenRun) -> None:
    """Which command measures the effect: a comparison with the plain run, if this one is steered."""
    if not (steered := run.store.meta.get("steered")):
        components.missing("the effect of steering", measurements.command_for(run, "numbers/sweep.json"))
        return
    st.markdown(components.as_text(f"This run was steered by {steered.get('name')} ({steered.get('hash')})."))
    components.missing("how it differs from a plain run", f"reasonscope analyse compare PLAIN {quote(str(run.path))}")


def _figures(run: OpenRun, names: Sequence[str], command: str) -> None:
    """The stored figures, with the dose-response of the chosen method."""
    doses = {name.removeprefix(_DOSE): name for name in names if name.startswith(_DOSE)}
    for name in names:
        if name not in doses.values():
            components.show_kept(run.where.figures, name, command=command)
    if doses:
        chosen = st.selectbox("Dose and response of", list(doses), key=Key.METHOD, bind=state.BOUND)
        components.show_kept(run.where.figures, doses[chosen], command=command)


@st.fragment  # type: ignore[untyped-decorator]
def _playground(run: OpenRun) -> None:
    """Sliders, the button, and the last two answers; the model runs only when the button is pressed."""
    known = playground.vectors_of(run)
    if not known:
        components.missing("a steering vector", f"reasonscope steer extract seal --run {run.path}")
        return
    meta = run.store.meta.get("model") or {}
    left, right = st.columns([2, 1])
    question = left.text_area("Problem", _question(run), key="ask", bind=state.BOUND, height=120)
    with right:
        model = st.text_input("Model", meta.get("name") or "organism", key="model", bind=state.BOUND)
        scope = st.selectbox(
            "Where",
            list(SCOPES),
            index=1,
            key="where",
            bind=state.BOUND,
            help="For vectors that were saved alone; a recipe names its own tokens.",
        )
    weights: dict[Path, float] = {}
    for number, (path, column) in enumerate(zip(known, st.columns(max(len(known), 2)), strict=False)):
        weights[path] = _weight(column, path, 0.0 if number else 1.0)
    columns = st.columns(3)
    temperature = columns[0].slider("Temperature", 0.0, 1.5, 0.7, 0.1, key="temperature", bind=state.BOUND)
    seed = columns[1].number_input("Seed", 0, 10**6, 0, key="seed", bind=state.BOUND)
    longest = columns[2].number_input("Longest, tokens", 8, 4096, 500, key="longest", bind=state.BOUND)
    start, stop, _ = st.columns([1, 1, 4])
    pressed = start.button("Steer", type="primary", icon=":material/play_arrow:")
    if stop.button("Stop", icon=":material/stop:"):  # a press interrupts the page's current run
        st.caption("Stopped.")
    if pressed:
        sampling = Sampling(temperature=temperature, max_new_tokens=int(longest), seed=int(seed))
        with components.show_errors():
            st.session_state[_DUEL] = _fought(model, run, question, weights, scope, sampling)
    if (found := st.session_state.get(_DUEL)) is not None:
        _shown(found)


def _weight(column: DeltaGenerator, path: Path, default: float) -> float:
    """A slider for the strength of a recipe, or a switch for one that acts or does not."""
    name, key = components.as_text(playground.label(path)), f"s_{path.stem}"
    if not playground.has_strength(path):
        return float(column.toggle(name, bool(default), key=key, bind=state.BOUND))
    return float(column.slider(f"{name}, times its strength", -4.0, 4.0, default, 0.25, key=key, bind=state.BOUND))


def _question(run: OpenRun) -> str:
    """The first problem of the run with a gold answer, as a start."""
    row = next((row for row in readings.trace_rows(run) if row.kind == "problem"), None)
    if row is None:
        return _LEDGER
    problem = readings.cut_of(run, row.id).trace.problem
    return problem.messages[-1].content if problem.messages else problem.prompt or _LEDGER


def _fought(
    model: str, run: OpenRun, question: str, weights: dict[Path, float], scope: str, sampling: Sampling
) -> Duel:
    bar = st.progress(0.0, "loading the model")

    def tell(side: str, token: int) -> None:
        if token % 4 == 0:
            bar.progress(min(1.0, token / sampling.max_new_tokens), f"{side}: token {token}")

    recipe = playground.mixed(weights, scope)
    found = playground.duel(playground.loaded(model, run), question, recipe, sampling=sampling, tell=tell)
    bar.empty()
    return found


def _shown(found: Duel) -> None:
    parted = "they never part" if found.parted is None else f"they part at generated token {found.parted}"
    kl = "" if found.kl is None else f" KL of steered from base on the base's text: {found.kl:.3g} nats per token"
    n = "" if found.kl is None else f" (n = {len(found.base.tokens)} tokens)."
    st.caption(
        f"Same seed; {parted}.{kl}{n} Edited: {plural(found.n_edited, 'token')}. "
        "One draw is an anecdote: the figure above has the intervals."
    )
    for column, (name, side) in zip(st.columns(2), (("Base", found.base), ("Steered", found.steered)), strict=True):
        with column:
            st.markdown(f"**{name}** · {side.thinking_tokens} thinking tokens · ended by {side.finish}")
            st.html(_marked(side, found.parted))


def _marked(side: Side, parted: int | None) -> str:
    """The tokens as text, with the first one that differs marked."""
    cut = len(side.tokens) if parted is None else parted
    same, rest = escape("".join(side.tokens[:cut])), side.tokens[cut:]
    mark = f"<mark>▶{escape(rest[0])}</mark>" if rest else ""
    style = "white-space: pre-wrap; overflow-wrap: anywhere"
    return f"<div style='{style}'><span style='opacity: .6'>{same}</span>{mark}{escape(''.join(rest[1:]))}</div>"
