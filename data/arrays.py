"""The arrays that are named across the toolkit: what was measured, and which rows it was measured on."""

import numpy as np
from numpy.typing import NDArray

# Measured numbers, always in double precision.
Values = NDArray[np.float64]

# Indices into the first axis of an array.
Rows = NDArray[np.intp]
