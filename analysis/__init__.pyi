from .anchors.replacement import replacement_effects as replacement_effects
from .anchors.rollouts import anchors_of_trace as anchors_of_trace, resample as resample
from .attention.head_profiles import head_table as head_table
from .attention.maps import attention_map as attention_map
from .attention.receiver_heads import receiver_scores as receiver_scores, receivers_of as receivers_of
from .attention.uqac import attention_chain as attention_chain
from .attention.vertical_scores import vertical_scores as vertical_scores
from .causal.edge_attribution import emergent_heads as emergent_heads
from .causal.probe_write import probe_write_result as probe_write_result
from .causal.refusal_heads import cliff_heads as cliff_heads
from .causal.suppression import suppression_matrix as suppression_matrix
from .results import Axis as Axis, Band as Band, Result as Result
from .runs.context import Options as Options, Study as Study
from .runs.registry import ANALYSES as ANALYSES
from .runs.runner import analyse as analyse
from .tokens.confidence import confidence_of_trace as confidence_of_trace
from .tokens.entropy import entropy_of_trace as entropy_of_trace
from .tokens.logit_lens import logit_lens as logit_lens
from .tokens.mi import mi_of_trace as mi_of_trace
from .tokens.misalignment import misalignment_of_trace as misalignment_of_trace
from .tokens.recycling import recycling_study as recycling_study
from .tokens.thinking_tokens import token_suppression as token_suppression
from .tokens.token_alternatives import alternatives as alternatives, head_effects as head_effects, steering_shift as steering_shift
from .traces.agreement import signal_agreement as signal_agreement
from .traces.reflection import reflection_of_trace as reflection_of_trace
from .traces.trajectory import trajectory_of_trace as trajectory_of_trace
