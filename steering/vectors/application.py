"""What a method makes: vectors, each with where it acts and how; and the random ones that it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.intervention import Composed, Intervention, Steering
from reasonscope.steering.vectors.operators import Clamp, MatchedEdit, Operator, add
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class VectorUse:
    """A vector, the tokens at which it acts, and what is done there. A `Clamp` takes one site."""

    vector: SteeringVector
    scope: Scope
    operator: Operator = add

    def __post_init__(self) -> None:
        if isinstance(self.operator, Clamp) and len(self.vector.directions) != 1:
            raise InputError(f"a clamp at {len(self.vector.directions)} sites; each has a projection of its own")


def clamped(vector: SteeringVector, scope: Scope) -> tuple[VectorUse, ...]:
    """At each site of `vector`, projections become those of the class that it points to: the mean that its extraction has noted."""
    parts = []
    for site, direction in vector.directions.items():
        one = replace(vector, directions={site: direction})
        parts.append(VectorUse(vector=one, scope=scope, operator=Clamp(to=vector.provenance["towards"][str(site)])))
    return tuple(parts)


def as_intervention(uses: Sequence[VectorUse], multiplier: float) -> Intervention:
    """All uses at one multiplier, in order, as one intervention that measures how far it moves the states."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def operator(use: VectorUse) -> Operator:
        return use.operator.within(moved) if isinstance(use.operator, MatchedEdit) else use.operator

    return Composed(
        *(Steering(use.vector, multiplier, use.scope, operator=operator(use), measure=True) for use in uses)
    )


def check_uses(parts: Sequence[VectorUse], model: Model) -> None:
    """Raise InputError for no part, or where a vector does not fit the model."""
    if not parts:
        raise InputError("no vector to steer with; give at least one")
    for part in parts:
        part.vector.check(model)
