"""What a measured number says of its goal, in the words of every table."""

from collections.abc import Sequence
from math import inf

import numpy as np

MET, MISSED, NOISE = "met", "**missed**", " within the noise"


def verdict(values: float | Sequence[float], *, at_most: float = inf, at_least: float = -inf) -> str:
    """Of one number, or of the median over turns; "within the noise" where their quartiles lie on both sides of the goal."""
    over_turns = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    low, middle, high = (bool(at_least <= value <= at_most) for value in over_turns)
    return (MET if middle else MISSED) + (NOISE if low != high else "")


def quartiles(values: Sequence[float]) -> str:
    """The median, followed by the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f} – {high:.3f})"
