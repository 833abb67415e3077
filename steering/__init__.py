"""What writes to a model: vectors and how they are found, where they apply, controls of the decoding, and what they do."""

from reasonscope.steering.decoding.budget import BudgetGuidance, LengthPredictor, train_predictor
from reasonscope.steering.decoding.prefills import PREFILLS, prefill
from reasonscope.steering.decoding.processors import (
    BudgetForcing,
    CloseTag,
    CyclicReflex,
    ForcedClose,
    SuppressTokens,
    ThoughtSwitchPenalty,
    TokenBias,
)
from reasonscope.steering.experiments.ablation import (
    Ablation,
    AblationEffect,
    AblationIntervention,
    ablation_effect,
    reference_states,
)
from reasonscope.steering.experiments.attention_knockout import Edges, without_edges
from reasonscope.steering.experiments.conditions import BatchedConditions, Condition
from reasonscope.steering.experiments.decoding_responses import (
    DECODING_METHODS,
    DecodingMethod,
    DecodingResponse,
    decoding_response,
)
from reasonscope.steering.experiments.dose_responses import Dose, DoseResponse, compare, dose_response
from reasonscope.steering.experiments.experiment import Arm, SteeringExperiment
from reasonscope.steering.methods.adaptive import AdaptiveSteering, AdaptiveStrength, layer_difference
from reasonscope.steering.methods.affine_refusal import Classes, clamped_refusal, extract_affine_refusal
from reasonscope.steering.methods.asc import (
    Calibration,
    CompletionPair,
    calibrate,
    extract_asc,
    extract_asc_from_pairs,
    load_pairs,
)
from reasonscope.steering.methods.efficiency import extract_efficiency
from reasonscope.steering.methods.expert_routing import (
    Expert,
    cognitive_experts,
    count_experts,
    npmi,
    reinforced,
)
from reasonscope.steering.methods.kl_bounds import KLBound, kl_bound
from reasonscope.steering.methods.reasoning_strength import (
    close_tag_effect,
    extract_strength,
    level_differences,
    planned_effect,
)
from reasonscope.steering.methods.refusal import (
    ablated_everywhere,
    answer_contexts,
    contexts_until,
    extract_refusal,
    mean_projection,
    select_direction,
)
from reasonscope.steering.methods.registry import METHODS, ExtractionData, Method
from reasonscope.steering.methods.seal import extract_seal, seal_direction
from reasonscope.steering.methods.thinking_speed import extract_speed, fast_slow_pairs, speed_axis, speed_pairs
from reasonscope.steering.vectors.application import VectorUse, as_intervention, clamped
from reasonscope.steering.vectors.contrast import mean_difference, vector_of_probe
from reasonscope.steering.vectors.intervention import Composed, Intervention, Steering
from reasonscope.steering.vectors.operators import (
    OPERATORS,
    Clamp,
    ablate,
    add,
    orthogonal_add,
    rotate,
    scaled_add,
)
from reasonscope.steering.vectors.orthogonalise import orthogonalised, save_orthogonalised
from reasonscope.steering.vectors.patching import PatchHandle, patch, patched
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.thinking import Thinking, single_tokens
from reasonscope.steering.vectors.token_regions import ThinkTokenIds
from reasonscope.steering.vectors.vector import CosineTable, SteeringVector, cosine_table, covariance_matched

__all__ = [
    "DECODING_METHODS",
    "METHODS",
    "OPERATORS",
    "PREFILLS",
    "Ablation",
    "AblationEffect",
    "AblationIntervention",
    "AdaptiveSteering",
    "AdaptiveStrength",
    "Arm",
    "BatchedConditions",
    "BudgetForcing",
    "BudgetGuidance",
    "Calibration",
    "Clamp",
    "Classes",
    "CloseTag",
    "CompletionPair",
    "Composed",
    "Condition",
    "CosineTable",
    "CyclicReflex",
    "DecodingMethod",
    "DecodingResponse",
    "Dose",
    "DoseResponse",
    "Edges",
    "Expert",
    "ExtractionData",
    "ForcedClose",
    "Intervention",
    "KLBound",
    "LengthPredictor",
    "Method",
    "PatchHandle",
    "Scope",
    "Steering",
    "SteeringExperiment",
    "SteeringVector",
    "SuppressTokens",
    "ThinkTokenIds",
    "Thinking",
    "ThoughtSwitchPenalty",
    "TokenBias",
    "VectorUse",
    "ablate",
    "ablated_everywhere",
    "ablation_effect",
    "add",
    "answer_contexts",
    "as_intervention",
    "calibrate",
    "clamped",
    "clamped_refusal",
    "close_tag_effect",
    "cognitive_experts",
    "compare",
    "contexts_until",
    "cosine_table",
    "count_experts",
    "covariance_matched",
    "decoding_response",
    "dose_response",
    "extract_affine_refusal",
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
    "mean_projection",
    "npmi",
    "orthogonal_add",
    "orthogonalised",
    "patch",
    "patched",
    "planned_effect",
    "prefill",
    "reference_states",
    "reinforced",
    "rotate",
    "save_orthogonalised",
    "scaled_add",
    "seal_direction",
    "select_direction",
    "single_tokens",
    "speed_axis",
    "speed_pairs",
    "train_predictor",
    "vector_of_probe",
    "without_edges",
]
