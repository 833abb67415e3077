"""Which tokens of a response set its rhythm, and how much more credit each of them should get (arXiv 2510.13554,
section 5)."""

from dataclasses import dataclass

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledCredit:
    """`gamma` (token,) multiplies a token's advantage. `anchors` carry influence; a `dominated` one hands part of
    its bonus back to its `intros`, the token where the local rhythm broke just before it."""

    gamma: Values
    anchors: tuple[int, ...]
    dominated: tuple[int, ...]
    intros: tuple[int, ...]


def coupled_credit(
    waad: Values,
    fai: Values,
    *,
    top_share: float = 0.4,
    gain: float = 1.5,
    back_share: float = 0.5,
    lookback: int = 3,
) -> CoupledCredit:
    """Anchors are the `top_share` of tokens by FAI; one is dominated if its WAAD is at most the median and the largest
    |ΔWAAD| of the `lookback` tokens before it is at least the median of |ΔWAAD|.

    The paper leaves the thresholds open; lower medians are one third party's choice. Raises InputError for different
    lengths.
    """
    if waad.shape != fai.shape or waad.ndim != 1 or not len(waad):
        raise InputError(f"WAAD {waad.shape} and FAI {fai.shape}: give both for the same tokens")
    change = np.append(np.abs(np.diff(waad)), 0.0)
    anchors = np.flatnonzero(fai >= np.quantile(fai, 1 - top_share))
    low, broken = (np.sort(values)[(len(values) - 1) // 2] for values in (waad, change))
    dominated, intros = [], []
    for token in anchors[anchors > 0]:
        before = np.arange(max(0, token - lookback), token)
        intro = int(before[np.argmax(change[before])])
        if waad[token] <= low and change[intro] >= broken:
            dominated.append(int(token))
            intros.append(intro)
    gamma = np.ones(len(waad))
    gamma[anchors] = gain
    gamma[dominated] = 1 + (1 - back_share) * (gain - 1)
    gamma[intros] = 1 + back_share * (gain - 1)
    return CoupledCredit(
        gamma=gamma, anchors=tuple(anchors.tolist()), dominated=tuple(dominated), intros=tuple(sorted(set(intros)))
    )
