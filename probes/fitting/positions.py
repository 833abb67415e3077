"""Where in a trace a probe reads: at single tokens, at every N-th token of the thinking, or in its mean."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import Points


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


def thinking_to_window(trace: Trace) -> NDArray[np.int64]:
    """The rows of the thinking and of the close window after it, without what is written between two blocks of thinking.

    Raises InputError if the thinking is empty or was not closed, or nothing was written after the closing tag.
    """
    if not has_cliff(trace):
        raise InputError(
            f"trace {trace.id!r} ({trace.state} thinking, {len(trace.token_ids)} tokens): a cliff needs at least two tokens of thinking "
            "and an answer after it; leave it out"
        )
    window, thinking = trace.tokens.close_window, trace.thinking_positions
    return np.concatenate([thinking[thinking < window.start], np.arange(window.start, window.stop)])


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


# What a probe of any label can read: one token, every N-th token of the thinking (`every:N`), or the mean over the thinking.
PLACES = ("last_prompt", "first_thinking", "closing", "last", "mean")
_ALIASES = {"prompt": "last_prompt", "window": "closing", "thinking": "mean"}
_PLACE_WORDS = {
    "last_prompt": "The state at the end of the prompt",
    "first_thinking": "The state at the first token of the thinking",
    "closing": "The state where the thinking ends",
    "last": "The state at the last token",
    "mean": "The mean state of the thinking",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a probe of a label reads.

    Attributes:
        name: One of `PLACES`, `every:N`, or a share of the thinking such as `0.5`.
        every: N of `every:N`, else 0.
        share: The share of the thinking, or None.
    """

    name: str
    every: int = 0
    share: float | None = None

    @classmethod
    def parse(cls, text: str | float) -> Self:
        """Read the name of a place. Raises InputError for any other text."""
        name = _ALIASES.get(str(text), str(text))
        kind, _, number = name.replace(" ", ":").partition(":")
        if name in PLACES:
            return cls(name=name)
        if kind == "every" and number.isdigit() and int(number) > 0:
            return cls(name=f"every:{int(number)}", every=int(number))
        with suppress(ValueError):
            if 0 <= (share := float(name)) <= 1:
                return cls(name=f"{share:g}", share=share)
        raise InputError(
            f"unknown position {str(text)!r}: write {', '.join(PLACES)}, every:N, or a share of the thinking from 0.0 to 1.0"
        )

    @property
    def words(self) -> str:
        """The subject of a sentence: "The state at …"."""
        if self.every:
            return (
                f"The state at a thinking token (every {self.every}th)"
                if self.every > 1
                else "The state at a thinking token"
            )
        return _PLACE_WORDS.get(self.name) or f"The state after {100 * (self.share or 0):g} % of the thinking"

    def rows(self, trace: Trace) -> list[int]:
        """The tokens that are read; none if the trace lacks the place. Without tags, the thinking ends at its last token."""
        last = len(trace.token_ids) - 2  # the model never read the last token
        thinking: list[int] = trace.thinking_positions[trace.thinking_positions <= last].tolist()
        if self.name in ("last_prompt", "last"):
            return [row for row in [trace.n_prompt_tokens - 1 if self.name == "last_prompt" else last] if row >= 0]
        if self.name == "closing":
            end = max(trace.tokens.close_window.stop, trace.tokens.thinking.stop) - 1
            return [end] if trace.state == "closed" and trace.n_thinking_tokens and end <= last else []
        if self.every:
            return thinking[:: self.every]
        if self.share is not None and thinking:
            return [min(row_at(trace, self.share), last)]
        return thinking[:1] if self.name == "first_thinking" else thinking

    def points(self, traces: Sequence[Trace]) -> Points:
        """One row for each token that is read, and one for each trace if their mean is; traces without the place have none."""
        pairs = [(trace, row) for trace in traces for row in self._shown(trace)]
        return Points(traces=[trace for trace, _ in pairs], tokens=[row for _, row in pairs])

    def states(self, store: TraceStore, points: Points, sites: Sequence[Site]) -> NDArray[np.float32]:
        """The states of `points` at every site, (row, layer, 1, d_model)."""
        return (
            mean_states(store, points.traces, self, sites) if self.name == "mean" else states_at(store, points, sites)
        )

    def _shown(self, trace: Trace) -> list[int]:
        rows = self.rows(trace)
        return rows[-1:] if self.name == "mean" else rows


def mean_states(store: TraceStore, traces: Sequence[Trace], place: Place, sites: Sequence[Site]) -> NDArray[np.float32]:
    """The mean over the tokens of `place` at every site, (row, layer, 1, d_model)."""
    means = []
    for trace in tracked(traces, "reading activations", "traces"):
        rows = place.rows(trace)
        read = [store.activations(trace.id, str(site))[rows] for site in sites]
        means.append(np.stack([np.asarray(values, dtype=np.float32).mean(axis=0) for values in read]))
    return np.stack(means)[:, :, None]
