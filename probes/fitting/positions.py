"""Where in a trace a probe reads: at the last prompt token, after a share of the thinking, or at the close window."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Span, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import (
    Points,
)


def states_at(store: TraceStore, points: Points, sites: Sequence[Site]) -> NDArray[np.float32]:
    """The states of `points` at every site: (row, layer, 1, d_model). Points of one trace have to be adjacent."""
    states: list[NDArray[np.float32]] = []
    rows: dict[str, list[int]] = {}
    for trace, token in zip(points.traces, points.tokens, strict=True):
        rows.setdefault(trace.id, []).append(token)
    for trace_id, tokens in tracked(list(rows.items()), "reading activations", "traces"):
        read = [store.activations(trace_id, str(site))[tokens] for site in sites]
        states.append(np.stack([np.asarray(values, dtype=np.float32) for values in read], axis=1))
    return np.concatenate(states)[:, :, None]


# The last prompt token, the share of the thinking that has passed, or the last token of the close window.
Position: TypeAlias = Literal["prompt", "window"] | float


POSITIONS: tuple[Position, ...] = ("prompt", 0.25, 0.5, 0.75, 1.0, "window")


def thinking_to_window(trace: Trace) -> Span:
    """The rows from the first token of the thinking to the last of the close window.

    Raises InputError if the thinking is empty or was not closed, or nothing was written after the closing tag.
    """
    if not has_cliff(trace):
        raise InputError(
            f"trace {trace.id!r} ({trace.state} thinking, {len(trace.token_ids)} tokens): a cliff needs at least two tokens of thinking, "
            "a closing tag and an answer; leave it out"
        )
    return Span(trace.tokens.thinking.start, trace.tokens.close_window.stop)


def has_cliff(trace: Trace) -> bool:
    """Whether the thinking of `trace` is closed and followed by an answer, as `thinking_to_window` needs."""
    window = trace.tokens.close_window
    return trace.state == "closed" and trace.tokens.thinking.start < window.start and window.stop < len(trace.token_ids)


def has_position(trace: Trace, position: Position) -> bool:
    """Whether a trace has `position`: a share of the thinking needs thinking, "window" needs closed thinking and an answer."""
    if position == "window":
        return has_cliff(trace)
    return trace.n_prompt_tokens > 0 if position == "prompt" else trace.n_thinking_tokens > 0


def row_at(trace: Trace, position: Position) -> int:
    """The row of `position`. The model never read the last token of a truncated trace, so its share 1.0 is the token before."""
    if position == "prompt":
        return trace.n_prompt_tokens - 1
    if position == "window":
        return trace.tokens.close_window.stop - 1
    if not isinstance(position, float) or not 0 <= position <= 1:
        raise InputError(
            f"unknown position {position!r}: write prompt, window, or a share of the thinking from 0.0 to 1.0"
        )
    token = int(trace.thinking_positions[round(position * (trace.n_thinking_tokens - 1))])
    return min(token, len(trace.token_ids) - 2)


def position_name(position: Position) -> str:
    """`prompt`, `window`, or `thinking 25 %`."""
    return position if isinstance(position, str) else f"thinking {100 * position:g} %"
