"""What writes to a model: vectors, where they apply, and what they do."""

from reasonscope.steering.ablation import Ablation, AblationEffect, Replacing, ablation_effect, reference_states
from reasonscope.steering.apply import InOrder, Intervention, Steering
from reasonscope.steering.dose import Arm, Bench, Dose, DoseResponse, compare, dose_response
from reasonscope.steering.edges import Edges, without_edges
from reasonscope.steering.marks import Marks
from reasonscope.steering.methods import METHODS, Method
from reasonscope.steering.operators import OPERATORS, Clamp, ablate, add, orthogonal_add, rotate, scaled_add
from reasonscope.steering.patching import PatchHandle, patch, patched
from reasonscope.steering.scope import Scope
from reasonscope.steering.seal import extract_seal, seal_direction
from reasonscope.steering.vector import CosineTable, SteeringVector, cosine_table

__all__ = [
    "METHODS",
    "OPERATORS",
    "Ablation",
    "AblationEffect",
    "Arm",
    "Bench",
    "Clamp",
    "CosineTable",
    "Dose",
    "DoseResponse",
    "Edges",
    "InOrder",
    "Intervention",
    "Marks",
    "Method",
    "PatchHandle",
    "Replacing",
    "Scope",
    "Steering",
    "SteeringVector",
    "ablate",
    "ablation_effect",
    "add",
    "compare",
    "cosine_table",
    "dose_response",
    "extract_seal",
    "orthogonal_add",
    "patch",
    "patched",
    "reference_states",
    "rotate",
    "scaled_add",
    "seal_direction",
    "without_edges",
]
