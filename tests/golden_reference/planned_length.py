"""What a linear probe of the thinking's length says that steering does (arXiv 2506.08390), held by golden numbers."""

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.variants import Variant, is_published


def planned_effect(
    coef: NDArray[np.floating],
    vector: NDArray[np.floating],
    strength: float,
    *,
    intercept: float = 0.0,
    variant: Variant = "corrected",
) -> float:
    """What a linear probe of the thinking tokens (coef (d_model,)) says that adding strength·vector does, in tokens: λ·w·v.

    `variant="published"` is λ·(w·v + b), as released: the intercept does not belong into a difference.
    """
    return float(strength * (coef @ vector + (intercept if is_published(variant) else 0.0)))
