"""What writes to a model: vectors and how they are found, where they apply, controls of the decoding, and what they do."""

from reasonscope.steering.adaptive import AdaptiveSteering, AdaptiveStrength, layer_difference
from reasonscope.steering.apply import Steering
from reasonscope.steering.asc import (
    Calibration,
    CompletionPair,
    calibrate,
    extract_asc,
    extract_asc_from_pairs,
    load_pairs,
)
from reasonscope.steering.budget import BudgetGuidance, LengthPredictor, train_predictor
from reasonscope.steering.contrast import covariance_matched, mean_difference, vector_of_probe
from reasonscope.steering.decoding import (
    BudgetForcing,
    CloseTag,
    CyclicReflex,
    ForcedClose,
    SuppressTokens,
    ThoughtSwitchPenalty,
    TokenBias,
)
from reasonscope.steering.dose import Arm, compare
from reasonscope.steering.efficiency import extract_efficiency
from reasonscope.steering.kl_bound import KLBound, kl_bound
from reasonscope.steering.orthogonalise import orthogonalised, save_orthogonalised
from reasonscope.steering.prefill import PREFILLS, prefill
from reasonscope.steering.refusal import ablation, answer_contexts, extract_refusal, select_direction
from reasonscope.steering.rice import Expert, cognitive_experts, count_experts, npmi, reinforced
from reasonscope.steering.scope import Scope
from reasonscope.steering.seal import extract_seal, seal_direction
from reasonscope.steering.speed import extract_speed, fast_slow_pairs, speed_axis, speed_pairs
from reasonscope.steering.strength import close_tag_effect, extract_strength, level_differences, planned_effect
from reasonscope.steering.thinking import Thinking, single_tokens
from reasonscope.steering.vector import SteeringVector

__all__ = [
    "PREFILLS",
    "AdaptiveSteering",
    "AdaptiveStrength",
    "Arm",
    "BudgetForcing",
    "BudgetGuidance",
    "Calibration",
    "CloseTag",
    "CompletionPair",
    "CyclicReflex",
    "Expert",
    "ForcedClose",
    "KLBound",
    "LengthPredictor",
    "Scope",
    "Steering",
    "SteeringVector",
    "SuppressTokens",
    "Thinking",
    "ThoughtSwitchPenalty",
    "TokenBias",
    "ablation",
    "answer_contexts",
    "calibrate",
    "close_tag_effect",
    "cognitive_experts",
    "compare",
    "count_experts",
    "covariance_matched",
    "extract_asc",
    "extract_asc_from_pairs",
    "extract_efficiency",
    "extract_refusal",
    "extract_seal",
    "extract_speed",
    "extract_strength",
    "fast_slow_pairs",
    "kl_bound",
    "layer_difference",
    "level_differences",
    "load_pairs",
    "mean_difference",
    "npmi",
    "orthogonalised",
    "planned_effect",
    "prefill",
    "reinforced",
    "save_orthogonalised",
    "seal_direction",
    "select_direction",
    "single_tokens",
    "speed_axis",
    "speed_pairs",
    "train_predictor",
    "vector_of_probe",
]
