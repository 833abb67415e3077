"""On Reasoning Strength Planning (arXiv 2506.08390): what a harder problem adds to the state before thinking begins."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.vectors.contrast import States, mean_difference, state_of
from reasonscope.steering.vectors.vector import SteeringVector

STRENGTHS = (-0.2, -0.1, 0.0, 0.1, 0.2)  # of the paper's ±{.05, .1, .15, .2}


def _level_differences(states: States, levels: Sequence[float]) -> dict[float, NDArray[np.float64]]:
    """r_{i←1} = mean(level i) − mean(lowest level) of `states` (problem, …, d_model), by level i in ascending order.

    A comment in the released code calls them adjacent, but there too they are relative to the lowest level. Raises InputError for only one
    level, or for NaN.
    """
    given = np.asarray(levels, dtype=np.float64)
    if len(given) != len(states) or not np.isfinite(given).all():
        raise InputError(
            f"{len(given)} levels for {len(states)} states: give one number per state, its difficulty (NaN is not one)"
        )
    present = np.unique(given)
    if len(present) < 2:
        raise InputError(
            f"all {len(states)} problems are of difficulty {present.tolist()}; at least two levels are needed"
        )
    return {float(i): mean_difference(states[given == i], states[given == present[0]]) for i in present[1:]}


def extract_strength(store: TraceStore, sites: Sequence[Site], *, ids: Iterable[str] | None = None) -> SteeringVector:
    """r̄ = the mean of the level differences at the last prompt token, at each of `sites`; adding it plans for more thinking.

    As published, `sites` are resid_pre of every block (`hidden_states[k]`, k = 0 … L−1), and all are steered at once, at all positions
    (`Scope()`), not normalised, with λ from ±.05 to ±.2. Each problem counts once, however many samples it has, since their prompts are the
    same. Departures: layers are in numeric order (the released code takes the order of the file system and so pairs vectors with the
    wrong layers). A problem without a difficulty is an error (there it counts as level 3).
    """
    first = {trace.problem.id: trace for trace in (store.trace(id) for id in (store.ids if ids is None else ids))}
    if unknown := [name for name, trace in first.items() if trace.problem.difficulty is None]:
        raise InputError(f"problem {unknown[0]!r} has no difficulty; give it one, or leave it out")
    traces = list(first.values())
    levels = [float(trace.problem.difficulty or 0) for trace in traces]
    directions, norms = {}, {}
    for site in sites:
        differences = _level_differences(np.array([state_of(store, trace, site, "prompt") for trace in traces]), levels)
        directions[site] = np.mean(list(differences.values()), axis=0).astype(np.float32)
        norms[str(site)] = {f"{level:g}": float(np.linalg.norm(r)) for level, r in differences.items()}
    provenance = {"problems": len(traces), "norm_by_level": norms, "model": store.meta.get("model", {})}
    return SteeringVector(directions=directions, method="strength", provenance=provenance)
