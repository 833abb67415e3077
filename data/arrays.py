"""The arrays that are named across the toolkit, what was measured and on which rows, and measured numbers as JSON takes them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Measured numbers, always in double precision.
Values = NDArray[np.float64]

# Indices into the first axis of an array.
Rows = NDArray[np.intp]


def plain(value: Any) -> Any:
    """Nested numbers and arrays as dicts, lists and Python's own numbers; NaN and infinite ones become None, as JSON has neither."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
