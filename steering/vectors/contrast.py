"""Vectors from the difference between two classes of activations, or from a probe."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.steps_and_sentences import steps
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.grouped_folds import check_finite
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.steering.vectors.vector import SteeringVector

States: TypeAlias = NDArray[np.floating]
# Where a state is taken: at the last prompt token, the last thinking token, or the last token that was fed; or the mean over the thinking,
# or over its separators, which open the steps.
Read = Literal["prompt", "thinking_end", "end", "thinking_mean", "separators"]


def mean_difference(towards: States, away: States) -> NDArray[np.float64]:
    """mean(towards) − mean(away) over rows (row, …, d_model): (…, d_model). Raises InputError for an empty class or NaN."""
    if not len(towards) or not len(away):
        raise InputError(f"{len(towards)} activations of one class and {len(away)} of the other; both are needed")
    if towards.shape[1:] != away.shape[1:]:
        raise InputError(f"activations of shapes {towards.shape[1:]} and {away.shape[1:]}; read both at the same sites")
    check_finite(towards, away)
    return np.asarray(towards.astype(np.float64).mean(axis=0) - away.astype(np.float64).mean(axis=0))


def state_of(store: TraceStore, trace: Trace, site: Site, read: Read) -> NDArray[np.float64]:
    """The stored state at `site` at the place `read`: (d_model,). Raises InputError for a trace without the thinking that this needs."""
    rows = store.activations(trace.id, str(site))
    thinking = trace.tokens.thinking
    if read == "separators":
        return _separators(rows, trace)
    if read in ("thinking_end", "thinking_mean") and not len(thinking):
        raise InputError(
            f"trace {trace.id!r} has no thinking to take a state from; leave it out, or take it at the prompt or the end"
        )
    last = len(rows) - 1  # the last token was never fed
    at: dict[str, Any] = {
        "prompt": slice(trace.n_prompt_tokens - 1, trace.n_prompt_tokens),
        "thinking_end": slice(min(thinking.stop - 1, last), min(thinking.stop, last + 1)),
        "end": slice(last, last + 1),
        "thinking_mean": trace.thinking_positions[trace.thinking_positions <= last],
    }
    if read not in at:
        raise InputError(f"read={read!r}; choose from {', '.join([*at, 'separators'])}")
    return np.asarray(rows[at[read]].astype(np.float64).mean(axis=0))


def _separators(rows: NDArray[Any], trace: Trace) -> NDArray[np.float64]:
    at = [step.separator for step in steps(trace) if step.separator < len(rows)]
    if not at:
        raise InputError(f"trace {trace.id!r} has no blank line in its thinking, so no step starts there; leave it out")
    return np.asarray(np.asarray(rows[at], dtype=np.float64).mean(axis=0))


def contrast_vector(
    store: TraceStore,
    pairs: Iterable[tuple[Trace, Trace]],
    sites: Iterable[Site],
    *,
    read: Read,
    method: str,
    provenance: Mapping[str, object],
) -> SteeringVector:
    """At each of `sites`, the mean difference of the states of `pairs` (towards, away).

    `provenance["towards"]` of the result holds, by site, the mean projection of the first class.
    """
    wanted = list(pairs)
    directions, levels = {}, {}
    for site in sites:
        towards, away = paired_states(store, wanted, site, read)
        difference = mean_difference(towards, away)
        directions[site] = difference.astype(np.float32)
        levels[str(site)] = projection(towards, difference)
    made = {"pairs": len(wanted), "read": read, "towards": levels, "model": store.meta.get("model", {}), **provenance}
    return SteeringVector(directions=directions, method=method, provenance=made)


def paired_states(
    store: TraceStore, pairs: Sequence[tuple[Trace, Trace]], site: Site, read: Read
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The states of both classes of `pairs`, each (pair, d_model)."""
    first, second = (
        np.array([state_of(store, pair[side], site, read) for pair in pairs]).reshape(len(pairs), -1) for side in (0, 1)
    )
    return first, second


def projection(states: States, direction: NDArray[np.floating]) -> float:
    """Mean projection of `states` (row, d_model) on `direction`, in units of the stream; 0 for a direction of length 0."""
    return float(states.mean(axis=0) @ direction / (np.linalg.norm(direction) or 1.0))


def vector_of_probe(probe: LinearProbe, *, norm: float) -> SteeringVector:
    """The normal of a probe as a vector of length `norm`; adding it raises the score of the probe.

    The length of a probe's own weights says how sharply it separates, not how far to push, so `norm` has no default; the distance between
    the class means is a common choice. Raises InputError for a probe whose coefficients are all 0.
    """
    return SteeringVector(
        directions={probe.site: (probe.direction * norm).astype(np.float32)},
        method="probe",
        provenance={"probe": probe.method, "task": probe.task, "norm": norm, "model": dict(probe.model)},
    )
