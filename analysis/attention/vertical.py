"""Receiver heads: heads whose attention concentrates on few sentences, and the sentences that they attend to
(Thought Anchors)."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.heads import Head

PROXIMITY = 4  # sentences; a nearer target attends to anything just before it
_TOP_HEADS = 20  # of the paper's 1,920; a small model has fewer to choose from


def vertical_scores(
    matrix: Values, *, proximity: int = PROXIMITY, depth_control: bool = True, exclude: Sequence[int] = ()
) -> Values:
    """How much later sentences attend to each sentence (Thought Anchors, arXiv 2506.19143, section 4).

    Args:
        matrix: (…, target, source), mean attention between sentences.
        proximity: Only targets at least so many sentences after the source count.
        depth_control: Replace a target's attention on such sources by its rank among them over their number. Late
            targets spread their attention over many sources; ranks make them weigh as much as early ones.
        exclude: Sources that do not count, such as one that holds an attention sink.

    Returns:
        (…, source): the mean over targets; NaN for a source without targets.

    Raises:
        InputError: For a proximity below 1.

    Departures: depth control is on by default, and off in the published wrappers.

    Example:
        result = rs.analysis.attention_map(model, trace, rs.sentences(trace))
        scores = rs.analysis.vertical_scores(result.arrays["matrix"])  # (layer, head, sentence)
        scores.mean(axis=(0, 1))
    """
    if proximity < 1:
        raise InputError(f"proximity must be at least 1 sentence, got {proximity}")
    n = matrix.shape[-1]
    chosen = np.full(matrix.shape, np.nan)
    kept = np.setdiff1d(np.arange(n), exclude)
    for target in range(n):
        sources = kept[kept <= target - proximity]
        if not len(sources):
            continue
        attention = matrix[..., target, sources]
        ranks = rankdata(attention, axis=-1, nan_policy="omit") / np.isfinite(attention).sum(-1, keepdims=True).clip(1)
        chosen[..., target, sources] = ranks if depth_control else attention
    return nan_mean(chosen, axis=-2)


def kurtosis(values: Values) -> Values:
    """Excess kurtosis along the last axis, ignoring NaN (population moments): high if few sentences stand out."""
    centred = values - nan_mean(values, axis=-1)[..., None]
    variance = nan_mean(centred**2, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):  # all equal: 0 / 0 is NaN
        return np.asarray(nan_mean(centred**4, axis=-1) / variance**2 - 3)


def top_heads(scores: Values, n: int | None = None, *, from_layer: int = 0) -> list[Head]:
    """The `n` heads with the highest score (layer, head), best first, without layers before `from_layer` and heads
    without a score.

    The default `n` is the paper's 20, but at most a sixth of all heads, so that others are left for comparison.
    """
    n = min(_TOP_HEADS, max(1, scores.size // 6)) if n is None else n
    flat = np.where(np.arange(len(scores))[:, None] >= from_layer, scores, np.nan).ravel()
    order = [int(i) for i in np.argsort(-flat, kind="stable") if np.isfinite(flat[i])]
    return [Head(layer=i // scores.shape[1], index=i % scores.shape[1]) for i in order[:n]]


def split_half_reliability(scores: Values, *, splits: int = 100, seed: int = 0) -> float:
    """Mean correlation over heads of `scores` (trace, layer, head) averaged over two random halves of the traces.

    NaN for fewer than two traces. It says how far a score belongs to the head and not to the trace; it is not corrected
    to full length.
    """
    if len(scores) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    flat = scores.reshape(len(scores), -1)
    found = []
    for _ in range(splits):
        order = rng.permutation(len(flat))
        halves = [nan_mean(flat[part], axis=0) for part in np.array_split(order, 2)]
        known = np.isfinite(halves[0]) & np.isfinite(halves[1])
        found.append(np.corrcoef(halves[0][known], halves[1][known])[0, 1] if known.sum() > 2 else np.nan)
    return float(nan_mean(np.array(found), axis=0))


def nan_mean(values: Values, *, axis: int) -> Values:
    """The mean ignoring NaN; NaN, without a warning, if everything is."""
    known = np.isfinite(values)
    n = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.asarray(np.where(n > 0, total / np.maximum(n, 1), np.nan))
