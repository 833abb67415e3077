"""What is read off results of attention and suppression to be looked at: the mean of a source's effects, and a block of tokens."""

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.attention.vertical_scores import nan_mean
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span


def mean_effect(effects: Values) -> Values:
    """Mean effect of each source on the targets behind it: `effects` (target, source) → (source,), NaN for a source without a target."""
    return nan_mean(effects, axis=0)


def token_block(
    key: NDArray[np.integer], weight: NDArray[np.floating], *, first: int, targets: Span, sources: Span
) -> Values:
    """Attention of the tokens `targets` on the tokens `sources`, (target, source), of the strongest keys that were kept.

    `key` and `weight` (token, rank) of one head, whose rows begin with token `first`. NaN where a token of `sources` is not among those
    kept: it gets less than the last of them. Raises InputError where rows of the targets were not kept.
    """
    if not 0 <= targets.start - first < targets.stop - first <= len(key):
        raise InputError(
            f"tokens {targets.start} to {targets.stop} were not kept; there are {first} to {first + len(key)}"
        )
    block = np.full((len(targets), len(sources)), np.nan)
    for row, token in enumerate(range(targets.start, targets.stop)):
        keys, weights = key[token - first], weight[token - first]
        inside = (keys >= sources.start) & (keys < sources.stop) & (weights > 0)
        block[row, keys[inside].astype(np.int64) - sources.start] = weights[inside]
    return block
