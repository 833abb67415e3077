"""Published importance measures that the toolkit does not report, held by golden numbers."""

from collections.abc import Sequence

import numpy as np

from reasonscope.analysis.anchors.importance import Rollout
from reasonscope.data.errors import InputError


def correctness_kl(p: Sequence[Rollout], q: Sequence[Rollout], *, smoothing: float, empty: float = 0.0) -> float:
    """KL in nats between right and wrong of two sets of rollouts, of those that were judged; `empty` if a side has none."""
    judged = [[r.correct for r in side if r.correct is not None] for side in (p, q)]
    if not all(judged):
        return empty
    counts = np.array([[sum(side), len(side) - sum(side)] for side in judged], dtype=np.float64) + smoothing
    left, right = counts / counts.sum(axis=1, keepdims=True)
    return float(max(0.0, (left * np.log(left / right)).sum()))


def match_rate(similarities: Sequence[Sequence[float]], threshold: float) -> float:
    """Share of rollouts with a sentence at least `threshold` like the target; `similarities` of each sentence of each rollout."""
    if not similarities:
        raise InputError("no rollout to look for the sentence in")
    return float(np.mean([any(value >= threshold for value in row) for row in similarities]))
