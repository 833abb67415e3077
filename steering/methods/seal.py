"""SEAL (Chen et al., arXiv 2504.07986): a vector from reflection and transition to execution, read where steps begin."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.align import token_strings
from reasonscope.data.text.steps_and_sentences import seal_steps, steps
from reasonscope.data.trace import Step, StepKind, Trace
from reasonscope.data.variants import Variant, is_published
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.methods.asc import PAIRS
from reasonscope.steering.vectors.contrast import projection
from reasonscope.steering.vectors.vector import SteeringVector

_WAYS_OUT = (
    "Record more or longer traces, or take another method: length-probe learns from this run, asc and speed from pairs "
    f"({PAIRS})"
)
_AWAY_FROM: tuple[StepKind, ...] = ("reflection", "transition")


def _seal_direction(
    states: NDArray[np.floating], kinds: Sequence[StepKind], *, away_from: Sequence[StepKind] = _AWAY_FROM
) -> NDArray[np.float64]:
    """mean(execution) − mean(reflection ∪ transition) of `states` (step, d_model), one row per step: (d_model,).

    The paper's equation: S = H̄_E − H̄_RT, with the steps of all traces pooled and no normalisation. The released code stores −S and applies
    it with coefficient −1. Raises InputError if a class has no steps or a state is not finite.
    """
    if not np.isfinite(states).all():
        raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")
    kept = np.array([kind == "execution" for kind in kinds], dtype=bool)
    left = np.array([kind in away_from for kind in kinds], dtype=bool)
    if not kept.any() or not left.any():
        raise InputError(
            f"{kept.sum()} execution steps and {left.sum()} of {' or '.join(away_from)}: both classes are needed. "
            f"Steps are told apart by words such as “wait”, “let me check” and “another way”. {_WAYS_OUT}"
        )
    wide = states.astype(np.float64)
    return np.asarray(wide[kept].mean(axis=0) - wide[left].mean(axis=0))


def extract_seal(
    store: TraceStore,
    site: Site,
    *,
    ids: Iterable[str] | None = None,
    away_from: Sequence[StepKind] = _AWAY_FROM,
    keywords: Variant = "corrected",
    variant: Variant = "corrected",
) -> SteeringVector:
    """The SEAL vector at `site` from the traces of a run (or only those in `ids`), read at the separator that opens each step.

    The paper's layer 20 is the input of block 20 (of 28): `resid_pre.20`, or `resid_post.19`. `away_from=("reflection",)` contrasts
    execution with reflection only, `("transition",)` with transition only. Added at those separators, the vector makes the thinking
    execute more and reflect less.

    Departures from the released code: the sign (see `_seal_direction`); the misspelt keyword (`keywords="published"` keeps it); the region
    (see `steps`); and a separator that is the last token of a trace is left out, since it was never fed to the model and has no state.
    `variant="published"` undoes the first three: the vector points from execution to reflection and transition and is applied with
    multiplier −1, keywords are as published, and unless the name of the model contains "deepseek" the region is the whole text, prompt
    included. Raises InputError for traces without steps, or with steps of only one class.
    """
    published = is_published(variant)
    rule: Variant = "published" if published else keywords
    states, kinds, groups = [], [], set()
    for trace_id in store.ids if ids is None else ids:
        trace = store.trace(trace_id)
        rows = store.activations(trace_id, str(site))
        groups.add(trace.problem.group)
        for step in _published_steps(trace) if published else steps(trace, variant=rule):
            if step.separator < len(rows):
                states.append(np.asarray(rows[step.separator], dtype=np.float32))
                kinds.append(step.kind)
    if not states:
        raise InputError(
            f"none of the traces has steps: a step begins after a blank line, and their thinking has none. {_WAYS_OUT}"
        )
    direction = _seal_direction(np.stack(states), kinds, away_from=away_from)
    executing = np.stack(states)[[kind == "execution" for kind in kinds]]
    return SteeringVector(
        directions={site: (-direction if published else direction).astype(np.float32)},
        method="seal",
        sign=f"{'away from' if published else 'towards'} execution",
        provenance={
            "steps": {kind: kinds.count(kind) for kind in ("execution", "reflection", "transition")},
            "away_from": list(away_from),
            "keywords": rule,
            "towards": {str(site): projection(executing, direction)},
            "variant": variant,
            "groups": sorted(groups),
            "model": store.meta.get("model", {}),
        },
    )


def _published_steps(trace: Trace) -> list[Step]:
    pieces = token_strings(trace.text, trace.offsets)
    return seal_steps(pieces, variant="published", think_only=_think_only(trace))


def _think_only(trace: Trace) -> bool:
    return "deepseek" in str(trace.model.get("name", "")).lower()
