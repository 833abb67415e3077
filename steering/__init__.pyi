from .decoding.budget import BudgetGuidance as BudgetGuidance
from .decoding.processors import BudgetForcing as BudgetForcing, CloseTag as CloseTag, CyclicReflex as CyclicReflex, ForcedClose as ForcedClose, SuppressTokens as SuppressTokens, ThoughtSwitchPenalty as ThoughtSwitchPenalty, TokenBias as TokenBias
from .experiments.ablation import Ablation as Ablation, AblationEffect as AblationEffect, ablation_effect as ablation_effect
from .experiments.conditions import Condition as Condition
from .experiments.decoding_responses import DECODING_METHODS as DECODING_METHODS, DecodingMethod as DecodingMethod, DecodingResponse as DecodingResponse, decoding_response as decoding_response
from .experiments.dose_responses import Dose as Dose, DoseResponse as DoseResponse, dose_response as dose_response
from .experiments.experiment import Arm as Arm, SteeringExperiment as SteeringExperiment
from .methods.adaptive import AdaptiveSteering as AdaptiveSteering
from .methods.registry import ExtractionData as ExtractionData, METHODS as METHODS, Method as Method, extract as extract
from .vectors.application import VectorUse as VectorUse, as_intervention as as_intervention, clamped as clamped
from .vectors.intervention import Composed as Composed, Intervention as Intervention, Steering as Steering
from .vectors.operators import Clamp as Clamp, OPERATORS as OPERATORS
from .vectors.orthogonalise import orthogonalised as orthogonalised
from .vectors.patching import patch as patch
from .vectors.scope import Scope as Scope
from .vectors.vector import SteeringVector as SteeringVector, cosine_table as cosine_table
