"""Ablations and patches: what the answers lose without a part of the model beside its controls, and where patched states give them back."""

from collections.abc import Mapping

import streamlit as st

from reasonscope.analysis.figures.ablations import ablation_figures
from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts import components, measurements
from reasonscope.app.page_parts.state import BOUND, Key

_ABLATION, _ANSWERS, _PATCHING = "ablation", "ablation_answers", "patching"


def show(run: OpenRun) -> None:
    """Show the plans that were run on the run."""
    components.heading(
        "Ablations",
        "What the given answers lose without heads, neurons, directions or tokens, beside as many random ones; and patched states.",
    )
    for method in (_ABLATION, _ANSWERS, _PATCHING):
        components.damage(measurements.damaged(run, method))
    effects, patches = measurements.results(run, _ABLATION), measurements.results(run, _PATCHING)
    if not effects and not patches:
        components.missing(
            "what happens without a part of the model", measurements.command_for(run, "results/ablation/*")
        )
    if effects:
        name = st.selectbox("Plan", list(effects), key=Key.PLAN, bind=BOUND)
        _effects(run, name, effects[name])
        if (written := measurements.results(run, _ANSWERS).get(name)) is not None:
            st.subheader("When it answers again", anchor=False)
            _figures(run, written, "answers")
    if patches:
        _patches(run, patches)


def _effects(run: OpenRun, name: str, result: Result) -> None:
    """The figures of a plan, and the table of every ablation with its controls."""
    _figures(run, result, "effects")
    told = result.numbers.get("ablations")
    if isinstance(told, dict):
        st.dataframe(_rows(told), hide_index=True, key=f"ablations-{name}")
    components.provenance(result)


def _figures(run: OpenRun, result: Result, key: str) -> None:
    command = str(result.provenance.get("command") or measurements.command_for(run, f"results/{result.method}/*"))
    for kind, figure in ablation_figures(result).items():
        components.show_figure(figure, name=f"{result.method}-{kind}", command=command, key=f"{key}-{kind}")


def _patches(run: OpenRun, patches: Mapping[str, Result]) -> None:
    """The map of the chosen patch."""
    st.subheader("Patched states", anchor=False)
    name = st.selectbox("Patch", list(patches), key=Key.PATCH, bind=BOUND)
    result = patches[name]
    if not result.measured:
        st.warning(components.as_text(f"Not measured: {result.reason}"))
        return
    _figures(run, result, f"patch-{name}")
    components.provenance(result)


def _rows(told: Mapping[str, Mapping[str, object]]) -> list[dict[str, str]]:
    """One row per ablation: the effect, its controls and their p."""
    rows = []
    for name, one in told.items():
        effect, controls, matched = (
            one.get(key) or {} for key in ("effect_nats_per_answer_token", "controls", "matched")
        )
        assert isinstance(effect, dict) and isinstance(controls, dict) and isinstance(matched, dict)
        rows.append(
            {
                "ablation": name,
                "nats per answer token": f"{effect['value']:.4g}",
                "95 % interval": components.ends((effect["low"], effect["high"])),
                "random others": components.interval(controls.get("low"), controls.get("high")),
                "n": str(controls.get("n", 0)),
                "p": f"{one['p_value']:.3g} (least {one['smallest_p']:.3g})",
                "moved as far": components.interval(matched.get("low"), matched.get("high")),
                "its p": f"{matched['p_value']:.3g}" if matched else "–",
            }
        )
    return rows
