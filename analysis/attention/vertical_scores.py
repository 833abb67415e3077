"""Receiver heads: heads whose attention narrows to few sentences, and the sentences that they look at (Thought Anchors)."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.heads import Head

PROXIMITY = 4  # sentences: a nearer target attends to whatever stands before it
TOP_HEADS = 20  # of the paper's 1,920; a small model has fewer to choose from


def vertical_scores(
    matrix: Values, *, proximity: int = PROXIMITY, depth_control: bool = True, exclude: Sequence[int] = ()
) -> Values:
    """How much later sentences attend to each: `matrix` (…, target, source) → (…, source), arXiv 2506.19143, section 4.

    The mean over targets at least `proximity` sentences behind the source; NaN where there is none. `depth_control` replaces a
    target's attention on such sources by its rank among them over their number, so that a late target, who spreads his over many
    sources, weighs as much as an early one. `exclude` are sources that count for nothing, such as one that holds an attention sink.

    Departure: depth control is on by default, and off in the published wrappers.
    """
    if proximity < 1:
        raise InputError(f"proximity {proximity}: a target has to stand at least 1 sentence behind its source")
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
    """Excess kurtosis along the last axis, over what is a number (population moments): high where few sentences stand out."""
    centred = values - nan_mean(values, axis=-1)[..., None]
    variance = nan_mean(centred**2, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):  # all alike: 0 / 0 is NaN, no kurtosis
        return np.asarray(nan_mean(centred**4, axis=-1) / variance**2 - 3)


def top_heads(scores: Values, n: int | None = None, *, from_layer: int = 0) -> list[Head]:
    """The `n` heads of highest score (layer, head), best first; layers before `from_layer` and heads without a score left out.

    Without `n` the paper's 20, but no more than a sixth of all heads, so that others are left to compare them with.
    """
    n = min(TOP_HEADS, max(1, scores.size // 6)) if n is None else n
    flat = np.where(np.arange(len(scores))[:, None] >= from_layer, scores, np.nan).ravel()
    order = [int(i) for i in np.argsort(-flat, kind="stable") if np.isfinite(flat[i])]
    return [Head(layer=i // scores.shape[1], index=i % scores.shape[1]) for i in order[:n]]


def receiver_score(vertical: Values, heads: Sequence[Head]) -> Values:
    """Mean vertical score (sentence,) of `vertical` (layer, head, sentence) over `heads`."""
    if not heads:
        raise InputError("no receiver head to score sentences by; give at least one")
    return np.asarray(np.mean([vertical[head.layer, head.index] for head in heads], axis=0))


def split_half_reliability(scores: Values, *, splits: int = 100, seed: int = 0) -> float:
    """Mean correlation over heads of `scores` (trace, layer, head) averaged over two random halves of the traces.

    NaN for fewer than two traces. It says how far a head's score is the head's and not the trace's; it is not stepped up to full length.
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
    """The mean over what is a number; NaN, without a warning, where nothing is."""
    known = np.isfinite(values)
    n = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.asarray(np.where(n > 0, total / np.maximum(n, 1), np.nan))
