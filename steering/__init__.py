"""What writes to a model: vectors, where they apply, and what they do."""

from reasonscope.steering.apply import InOrder, Intervention, Steering
from reasonscope.steering.dose import Arm, compare
from reasonscope.steering.marks import Marks
from reasonscope.steering.operators import OPERATORS, Clamp, ablate, add, orthogonal_add, rotate, scaled_add
from reasonscope.steering.patch import PatchHandle, patch, patched
from reasonscope.steering.scope import Scope
from reasonscope.steering.seal import extract_seal, seal_direction
from reasonscope.steering.vector import CosineTable, SteeringVector, cosine_table

__all__ = [
    "OPERATORS",
    "Arm",
    "Clamp",
    "CosineTable",
    "InOrder",
    "Intervention",
    "Marks",
    "PatchHandle",
    "Scope",
    "Steering",
    "SteeringVector",
    "ablate",
    "add",
    "compare",
    "cosine_table",
    "extract_seal",
    "orthogonal_add",
    "patch",
    "patched",
    "rotate",
    "scaled_add",
    "seal_direction",
]
