"""Controlling thinking speed (arXiv 2507.03704): the axis between fast and slow thinking, the first component of paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.steps_and_sentences import steps
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.grouped_folds import check_finite
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import Model
from reasonscope.steering.methods.asc import PAIRS, mode_pairs
from reasonscope.steering.vectors.contrast import Read, States, paired_states, projection, replayed_states
from reasonscope.steering.vectors.vector import SteeringVector

STRENGTHS = (-4.0, -2.0, 0.0, 2.0, 4.0, 8.0)  # the paper's usable range; above 16 or below −8 the model repeats itself


@dataclass(frozen=True, kw_only=True)
class _SpeedAxis:
    """`direction` (d_model,) of length 1 towards fast, and the `mean` (d_model,) of the differences that it was found on."""

    direction: NDArray[np.float64]
    mean: NDArray[np.float64]


def speed_axis(fast: States, slow: States, *, fast_first: Sequence[bool] | None = None) -> _SpeedAxis:
    """The first principal component of ±(fast − slow) of `fast`, `slow` (pair, d_model), pointed towards fast.

    Half of the differences are reversed (those with `fast_first` false; by default every second one), as in representation engineering: if
    all had one sign, centring would remove what they share. The sign is chosen as in the released code: if the fast one of a pair more
    often has the smaller projection, the axis is reversed; a tie keeps it. Raises InputError for fewer than 2 pairs, for sides of different
    length, and for NaN.
    """
    if fast.shape != slow.shape or fast.ndim != 2 or len(fast) < 2:
        raise InputError(
            f"fast {fast.shape}, slow {slow.shape}: the same 2 pairs or more on both sides, (pair, d_model)"
        )
    check_finite(fast, slow)
    first = np.arange(len(fast)) % 2 == 0 if fast_first is None else np.asarray(fast_first, dtype=bool)
    differences = np.where(first[:, None], 1.0, -1.0) * (fast.astype(np.float64) - slow)
    mean = differences.mean(axis=0)
    direction = np.linalg.svd(differences - mean, full_matrices=False)[2][0]
    higher = np.sign((fast - slow) @ direction).sum()
    return _SpeedAxis(direction=-direction if higher < 0 else direction, mean=mean)


@dataclass(frozen=True, kw_only=True)
class _SpeedPair:
    """The token ids of a prompt followed by a fast, and by a slow, begin of the thinking; states are read at the last token of each."""

    fast: tuple[int, ...]
    slow: tuple[int, ...]


def _truncated_pair(fast: Trace, slow: Trace, *, n_steps: int = 2) -> _SpeedPair | None:
    """The first `n_steps` steps of the fast thinking, and the slow thinking cut at the end of the step that is nearest in length.

    Steps are what is between blank lines, the opening one included. None if the fast thinking has fewer steps, or the slow one has no blank
    line.
    """
    cuts_fast, cuts_slow = _cuts(fast), _cuts(slow)
    if len(cuts_fast) < n_steps or not cuts_slow:
        return None
    stop = cuts_fast[n_steps - 1]
    length = _n_thinking(fast, stop)
    cut = min(cuts_slow, key=lambda at: abs(_n_thinking(slow, at) - length))
    return _SpeedPair(fast=tuple(fast.token_ids[:stop].tolist()), slow=tuple(slow.token_ids[:cut].tolist()))


def _n_thinking(trace: Trace, stop: int) -> int:
    """How many tokens of thinking come before `stop`."""
    return int((trace.thinking_positions < stop).sum())


def _cuts(trace: Trace) -> list[int]:
    """The token after each step: its separator and, for the last step, the end of the thinking."""
    return [*(step.separator for step in steps(trace)), trace.tokens.thinking.stop]


def fast_slow_pairs(
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    first: str,
    n_steps: int = 2,
    batch_size: int = 32,
) -> list[_SpeedPair]:
    """Answer each problem as it is, and with the thinking forced to begin with `first`; keep the problems that are right both times.

    The paper forces "To" on the R1 distillations; which word makes a model fast depends on the model. Raises InputError if none is kept.
    """
    slow = rollouts(model, problems, sampling, batch_size=batch_size, think=True, open_tag=True)
    fast = rollouts(model, problems, sampling, batch_size=batch_size, think=True, prefill=first)
    return _speed_pairs(zip(fast, slow, strict=True), n_steps=n_steps)


def _speed_pairs(pairs: Iterable[tuple[Trace, Trace]], *, n_steps: int = 2) -> list[_SpeedPair]:
    """The truncated pairs of (fast, slow) traces that are both right and both closed. Raises InputError without any."""
    given = list(pairs)
    both = [pair for pair in given if all(trace.correct and trace.state == "closed" for trace in pair)]
    cut = [pair for fast, slow in both if (pair := _truncated_pair(fast, slow, n_steps=n_steps)) is not None]
    if not cut:
        raise InputError(
            f"of {len(given)} pairs {len(both)} are right on both sides, and none of these has {n_steps} steps to cut; "
            f"record more or easier problems, take another first word (--fast), or pairs that are not graded: {PAIRS}"
        )
    return cut


def extract_speed(
    model: Model, pairs: Sequence[_SpeedPair], sites: Sequence[Site], *, batch_size: int = 8
) -> SteeringVector:
    """The axis at each of `sites`, of length 1 as published: h ← h + α·u with α from −4 to 8; α > 0 is faster.

    The paper steers the outputs (resid_post) of blocks 18–26 of 28, at every token. α is in units of the residual stream, so its range fits
    only the paper's models; `provenance["stream_norms"]`, the mean norm of the states, tells what it means for another.
    """
    states: dict[Site, list[list[NDArray[np.float32]]]] = {site: [[], []] for site in sites}
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        for side, name in enumerate(("fast", "slow")):
            # A replay leaves out the last token, which is never fed, so append one to read the state before it.
            for seen in replay(model, [[*getattr(pair, name), 0] for pair in batch], tuple(sites)):
                for site in sites:
                    states[site][side].append(seen[site][-1].float().cpu().numpy())
    axes = {site: speed_axis(np.array(fast), np.array(slow)) for site, (fast, slow) in states.items()}
    streams = {str(site): float(np.linalg.norm(sides[0] + sides[1], axis=-1).mean()) for site, sides in states.items()}
    return SteeringVector(
        directions={site: axis.direction.astype(np.float32) for site, axis in axes.items()},
        method="speed",
        provenance={"pairs": len(pairs), "stream_norms": streams, "model": dict(model.fingerprint)},
    )


def extract_speed_of_modes(
    store: TraceStore, sites: Sequence[Site], *, read: Read, ids: Iterable[str] | None = None
) -> SteeringVector:
    """The same axis from thinking that is fast because it was asked for: mode brief against mode default.

    A forced first word makes a model fast against its habits, and may lose what the habits are for. As published, both sides are right. The
    axis has length 1; `provenance["towards"]` is the mean projection of the fast ones by site. Raises InputError for fewer than 2 pairs.
    """
    pairs = mode_pairs((store.trace(id) for id in (store.ids if ids is None else ids)), verbose="default")
    both = [pair for pair in pairs if all(trace.correct and steps(trace) for trace in pair)]
    states = {site: paired_states(store, both, site, read) for site in sites}
    return _axis_of_states(states, {"read": read, "model": store.meta.get("model", {})})


def extract_speed_of_traces(
    model: Model, pairs: Sequence[tuple[Trace, Trace]], sites: Sequence[Site], *, read: Read
) -> SteeringVector:
    """The same from (fast, slow) traces that no run holds; the model reads them again."""
    both = [pair for pair in pairs if all(steps(trace) for trace in pair)]
    if len(both) < 2:
        raise InputError(
            f"in {len(both)} of {len(pairs)} pairs both sides have a blank line in their thinking, and two are needed; make longer pairs"
        )
    about = {"source": "pairs", "read": read, "model": dict(model.fingerprint)}
    return _axis_of_states(replayed_states(model, both, sites, read), about)


def _axis_of_states(states: Mapping[Site, tuple[States, States]], about: Mapping[str, object]) -> SteeringVector:
    directions, levels = {}, {}
    for site, (fast, slow) in states.items():
        direction = speed_axis(fast, slow).direction
        directions[site], levels[str(site)] = direction.astype(np.float32), projection(fast, direction)
    n = len(next(iter(states.values()))[0])
    provenance = {"pairs": n, "towards": levels, **about}
    return SteeringVector(directions=directions, method="speed", norm="unit", provenance=provenance)


def begun_pairs(pairs: Sequence[tuple[Trace, Trace]], *, n_steps: int = 2) -> list[_SpeedPair]:
    """The truncated pairs of (fast, slow) traces; if no fast one has `n_steps` steps, cut after its first.

    Raises InputError for fewer than 2 pairs.
    """
    for n in (n_steps, 1):
        cut = [one for fast, slow in pairs if (one := _truncated_pair(fast, slow, n_steps=n)) is not None]
        if len(cut) > 1:
            return cut
    raise InputError(f"{len(pairs)} pairs, and an axis needs at least two; make more")
