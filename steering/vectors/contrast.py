"""Vectors from the difference between two classes of activations, or from a probe."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.steps_and_sentences import steps
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.grouped_folds import check_finite
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.models.model import Model
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
    return np.asarray(np.asarray(rows[_rows_of(trace, read, len(rows))], dtype=np.float64).mean(axis=0))


def _rows_of(trace: Trace, read: Read, n_rows: int) -> list[int]:
    """The rows, of the `n_rows` that have a state, whose mean is taken at the place `read`. Raises InputError as `state_of` does."""
    thinking, last = trace.tokens.thinking, n_rows - 1  # the last token was never fed
    if read == "separators":
        return _separators(trace, n_rows)
    if read in ("thinking_end", "thinking_mean") and not len(thinking):
        raise InputError(
            f"trace {trace.id!r} has no thinking to take a state from; leave it out, or take it at the prompt or the end"
        )
    at: dict[str, list[int]] = {
        "prompt": [trace.n_prompt_tokens - 1],
        "thinking_end": [min(thinking.stop - 1, last)],
        "end": [last],
        "thinking_mean": trace.thinking_positions[trace.thinking_positions <= last].tolist(),
    }
    if read not in at:
        raise InputError(f"read={read!r}; choose from {', '.join([*at, 'separators'])}")
    return at[read]


def _separators(trace: Trace, n_rows: int) -> list[int]:
    at = [step.separator for step in steps(trace) if step.separator < n_rows]
    if not at:
        raise InputError(f"trace {trace.id!r} has no blank line in its thinking, so no step starts there; leave it out")
    return at


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
    states = {site: paired_states(store, wanted, site, read) for site in sites}
    about = {"read": read, "model": store.meta.get("model", {}), **provenance}
    return contrast_of_states(states, method=method, provenance=about)


def contrast_of_states(
    states: Mapping[Site, tuple[States, States]], *, method: str, provenance: Mapping[str, object]
) -> SteeringVector:
    """The mean difference of the states (pair, d_model) of two classes at each site, towards the first."""
    directions, levels = {}, {}
    for site, (towards, away) in states.items():
        difference = mean_difference(towards, away)
        directions[site] = difference.astype(np.float32)
        levels[str(site)] = projection(towards, difference)
    n = len(next(iter(states.values()))[0])
    return SteeringVector(
        directions=directions, method=method, provenance={"pairs": n, "towards": levels, **provenance}
    )


def replayed_states(
    model: Model, pairs: Sequence[tuple[Trace, Trace]], sites: Sequence[Site], read: Read
) -> dict[Site, tuple[States, States]]:
    """The states of both classes of `pairs` that no store holds, each (pair, d_model); the model reads each trace once."""
    found: dict[Site, list[list[States]]] = {site: [[], []] for site in sites}
    for pair in tracked(pairs, "reading pairs", "pairs"):
        for side, trace in enumerate(pair):
            (seen,) = replay(model, [trace.token_ids.tolist()], tuple(sites))
            rows = _rows_of(trace, read, len(trace.token_ids) - 1)
            for site in sites:
                found[site][side].append(seen[site][rows].double().mean(dim=0).cpu().numpy())
    return {site: (np.array(first), np.array(second)) for site, (first, second) in found.items()}


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
