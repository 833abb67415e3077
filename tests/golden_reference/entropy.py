"""Published rules over token entropies that the toolkit does not run, held by golden numbers: forking tokens and ARES windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError

Per = Literal["corpus", "batch", "sequence"]


def forking_thresholds(
    entropies: Sequence[Values], *, percentile: float = 80.0, per: Per = "corpus", batch: int = 1
) -> Values:
    """The entropy that a forking token reaches, one a sequence: percentile over the corpus, each batch, or each sequence.

    The paper's analysis takes the corpus, its training each batch, several ports each sequence.
    """
    if not entropies or any(not len(line) for line in entropies):
        raise InputError("a sequence has no entropies; leave it out")
    size = {"corpus": len(entropies), "batch": batch, "sequence": 1}[per]
    parts = [entropies[start : start + size] for start in range(0, len(entropies), size)]
    return np.concatenate([np.full(len(part), np.percentile(np.concatenate(part), percentile)) for part in parts])


def forking_masks(entropies: Sequence[Values], thresholds: Values) -> list[NDArray[np.bool_]]:
    """Which tokens fork: entropy of at least the sequence's threshold."""
    return [np.asarray(line >= threshold) for line, threshold in zip(entropies, thresholds, strict=True)]


def listed_entropy(logprobs: Sequence[float], *, tail: bool = True) -> float:
    """Entropy in nats from the listed log-probabilities of a token's best candidates; `tail` counts the rest as one candidate."""
    listed = np.asarray(logprobs, dtype=np.float64)
    rest = max(0.0, 1.0 - float(np.exp(listed).sum()))
    return float(-(np.exp(listed) * listed).sum() - (rest * np.log(rest) if tail and rest > 0 else 0.0))


@dataclass(frozen=True, kw_only=True)
class WindowCounts:
    """Crucial words before which a stretch of high entropy follows (`valid`) or does not; `soft_cost` in nats above `threshold`."""

    threshold: float
    valid: int
    invalid: int
    soft_cost: float


def high_window_counts(
    words: Sequence[str],
    window_means: Values,
    crucial: Sequence[str],
    *,
    percentile: float = 95.0,
    reference: Values | None = None,
) -> WindowCounts:
    """How many of the `crucial` words open a window above the percentile of the trace's windows (ARES).

    `words` (token,): the most probable token at each place. Departure: only windows that are whole count towards the percentile;
    the published code takes it of windows that it fills in, which `reference` (token,) hands over: `window_entropy` with
    `variant="published"`.
    """
    known = np.isfinite(window_means)
    judged = window_means[known] if reference is None else reference
    threshold = float(np.percentile(judged, percentile)) if len(judged) else float("nan")
    wanted = {word.lower() for word in crucial}
    named = np.array([word.lstrip("Ġ▁ ").strip().lower() in wanted for word in words], dtype=bool)
    chosen = window_means[known & named]
    return WindowCounts(
        threshold=threshold,
        valid=int((chosen >= threshold).sum()),
        invalid=int((chosen < threshold).sum()),
        soft_cost=float(np.maximum(chosen - threshold, 0.0).sum()),
    )
