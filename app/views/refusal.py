"""Refusal cliff: how the intent to refuse runs along the thinking by outcome, and how far it falls beside its nulls."""

import streamlit as st

from reasonscope.analysis import figures
from reasonscope.app import components, measurements
from reasonscope.app.runs import Run


def show(run: Run) -> None:
    components.heading(
        "Refusal cliff",
        "The probe's score along the thinking, counted back from the closing tag; a mean is over the traces that are that long.",
    )
    kept = measurements.numbers(run, "refusal")
    if kept is None:
        components.missing("the refusal cliff", f"reasonscope probe refusal --run {run.path}")
        return
    shown = [name for name in kept["figures"] if name.endswith(("trajectories", "cliffs"))]
    for name in components.of_contrast(shown):
        components.show_kept(run.where.figures, name, command=kept["command"])
    cliffs = {
        contrast: found["cliffs"]
        for contrast, found in kept["numbers"].items()
        if isinstance(found, dict) and "cliffs" in found
    }
    st.subheader("How far it falls", anchor=False)
    components.show_numbers({"cells": kept["numbers"].get("cells", {}), **cliffs}, key="cliff-numbers")
    components.made_by(kept)
    _heads(run)


def _heads(run: Run) -> None:
    """What each head writes along the probe, where that was measured."""
    st.subheader("Heads that write it", anchor=False)
    found = {
        id: one for id, one in measurements.results(run, "probe_write").items() if one.measured and one.values.ndim == 2
    }
    if not found:
        components.missing("what each head writes", measurements.command(run, "results/probe_write/*"))
    for id, result in found.items():
        figure = figures.head_grid(result.values, title=result.quantity, measure=result.unit)
        command = measurements.command(run, "results/probe_write/*")
        components.show_figure(figure, name="probe_write", command=command, key=f"probe-write-{id}")
        components.provenance(result)
