"""Probes: where a property can be read, how well on held-out problems compared with baselines, and its score along a
trace."""

from collections.abc import Mapping
from typing import Any

import streamlit as st

from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements, state
from reasonscope.app.page_parts.state import BOUND, Key

_PROBES = ("length", "correctness", "refusal")


def show(run: OpenRun) -> None:
    """Show the probes of the run."""
    components.heading("Probes", "Scores are on held-out problems, next to baselines that see only the text.")
    names = (*_PROBES, *measurements.fitted_labels(run))
    name = st.segmented_control("Probe", names, default=_PROBES[0], key=Key.PROBE, bind=BOUND) or _PROBES[0]
    kept = measurements.numbers(run, name)
    if kept is None:
        components.missing(f"the {name} probe", f"reasonscope probe {name} --run {run.path}")
        return
    shown = [
        name for name in kept["figures"] if not name.endswith(("trajectories", "cliffs"))
    ]  # these have a page of their own
    for figure in components.of_contrast(shown):
        components.show_kept(run.where.figures, figure, command=kept["command"])
    st.subheader("Every number", anchor=False)
    components.show_numbers(_once(kept["numbers"]), key="probe-numbers")
    components.made_by(kept)
    _along(run, name)


def _once(numbers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Numbers without those of the main contrast that stand among the contrasts as well."""
    repeated = ("comparison", "probe") if "contrasts" in numbers else ()
    return {name: value for name, value in numbers.items() if name not in repeated}


def _along(run: OpenRun, name: str) -> None:
    """A link to the traces, coloured by this probe."""
    scored = {"refusal": "intent"}.get(name, name)
    path = run.where.scores / f"{scored}.safetensors"
    st.subheader("Along a trace", anchor=False)
    if not path.exists():
        command = f"reasonscope probe apply {run.where.probes / scored}.safetensors --run {run.path}"
        components.missing("the score of every token", command)
    elif st.button("Read a trace coloured by this probe", icon=":material/article:"):
        state.go("trace", **{Key.COLOUR: f"probe: {scored}"})
