"""Refusal cliff: how the intent to refuse develops during thinking, by outcome, and how far it falls compared with
its nulls."""

import streamlit as st

from reasonscope.analysis import figures
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements, state
from reasonscope.app.page_parts.state import Key


def show(run: OpenRun) -> None:
    """Show the refusal cliff of the run."""
    components.heading(
        "Refusal cliff",
        "The probe's score along the thinking, counted back from its end; a mean is over the traces that are that long, "
        "shaded is its 95 % interval over problems.",
    )
    kept = measurements.numbers(run, "refusal")
    if kept is None:
        components.missing("the refusal cliff", f"reasonscope probe refusal --run {run.path}")
        return
    shown = [name for name in kept["figures"] if name.endswith(("trajectories", "cliffs"))]
    chosen = components.of_contrast(shown)
    for name in chosen:
        components.show_kept(run.where.figures, name, command=kept["command"])
    cliffs = {
        contrast: found["cliffs"]
        for contrast, found in kept["numbers"]
        .get("contrasts", kept["numbers"])
        .items()  # runs of earlier versions have none
        if isinstance(found, dict) and "cliffs" in found and any(name.startswith(f"{contrast}_") for name in chosen)
    }
    st.subheader("How far it falls", anchor=False)
    components.show_numbers({**cliffs, "traces": kept["numbers"].get("cells", {})}, key="cliff-numbers")
    components.made_by(kept)
    _heads(run)
    _ablation(run)


def _heads(run: OpenRun) -> None:
    """What each head writes along the probe, if that was measured; a click on one shows what it attends to."""
    st.subheader("Heads that write it", anchor=False)
    found = {
        id: one for id, one in measurements.results(run, "probe_write").items() if one.measured and one.values.ndim == 2
    }
    command = measurements.command_for(run, "results/probe_write/*")
    if not found:
        components.missing("what each head writes", command)
    for id, result in found.items():
        figure = figures.head_grid(result.values, title=result.quantity, measure=result.unit)
        key = f"probe-write-{id}"
        clicked = components.show_figure(figure, name="probe_write", command=command, key=key, clickable=True)
        components.provenance(result)
        picked = next((f"{int(point['y'])}.{int(point['x'])}" for point in clicked), None)
        if components.is_new(key, picked):
            state.go("heads", **{Key.HEAD: picked})


def _ablation(run: OpenRun) -> None:
    """The model's behaviour without the heads that push refusal down, compared with random other heads."""
    st.subheader("Without these heads", anchor=False)
    found = measurements.results(run, "cliff").get("all")
    command = measurements.command_for(run, "results/cliff/*")
    if found is None:
        components.missing("what the model does without them", command)
        return
    if not found.measured:
        st.warning(components.as_text(f"Not measured: {found.reason}"))
        return
    figure = figures.arm_outcomes(found)
    components.show_figure(figure, name="cliff_ablation", command=command, key="cliff-ablation")
    arms, metrics = (axis.labels for axis in found.axes)
    beyond = found.numbers.get("beyond_every_draw") or {}
    rows = [
        {
            "arm": arm,
            "share": metric,
            "value": components.number(float(found.values[i, j])),
            "95 % interval": components.between(found.interval, (i, j)),
            "random heads": components.between(found.null, (i, j)),
            "beyond every draw": ("yes" if beyond.get(metric) else "no") if i == len(arms) - 1 else "",
        }
        for i, arm in enumerate(arms)
        for j, metric in enumerate(metrics)
    ]
    st.dataframe(rows, hide_index=True, key="cliff-arms")
    heads = ", ".join(found.numbers.get("heads") or ())
    st.caption(
        components.as_text(
            f"ablated: {heads}; chosen on n = {found.numbers.get('n_fallen')} harmful requests that the model complied with"
        )
    )
    components.provenance(found)
