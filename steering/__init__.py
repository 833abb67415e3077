"""What writes to a model: vectors, where they apply, and what they do."""

from reasonscope.steering.apply import Steering
from reasonscope.steering.dose import Arm, compare
from reasonscope.steering.scope import Scope
from reasonscope.steering.seal import extract_seal, seal_direction
from reasonscope.steering.vector import SteeringVector

__all__ = ["Arm", "Scope", "Steering", "SteeringVector", "compare", "extract_seal", "seal_direction"]
