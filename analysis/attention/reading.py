"""Views of results of attention and suppression: the mean of a source's effects, and a block of tokens."""

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.attention.vertical import nan_mean
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span


def mean_effect(effects: Values) -> Values:
    """Mean effect of each source on later targets: `effects` (target, source) → (source,), NaN for a source without
    targets."""
    return nan_mean(effects, axis=0)


def token_block(
    key: NDArray[np.integer], weight: NDArray[np.floating], *, first: int, targets: Span, sources: Span
) -> Values:
    """Attention of the tokens `targets` on the tokens `sources`, (target, source), from the strongest keys that were
    stored.

    `key` and `weight` (token, rank) of one head, whose rows begin with token `first`. NaN for a token of `sources` that
    was not stored: it gets less than the last of those stored. Raises InputError if rows of the targets were not
    stored.
    """
    if not 0 <= targets.start - first < targets.stop - first <= len(key):
        raise InputError(
            f"tokens {targets.start} to {targets.stop} were not stored; available are {first} to {first + len(key)}"
        )
    block = np.full((len(targets), len(sources)), np.nan)
    for row, token in enumerate(range(targets.start, targets.stop)):
        keys, weights = key[token - first], weight[token - first]
        inside = (keys >= sources.start) & (keys < sources.stop) & (weights > 0)
        block[row, keys[inside].astype(np.int64) - sources.start] = weights[inside]
    return block
