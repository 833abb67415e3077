"""Vectors in use: each with the tokens at which it acts and the operator that applies it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.intervention import Composed, Steering
from reasonscope.steering.vectors.operators import Clamp, MatchedEdit, Operator, add
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class VectorUse:
    """A vector with its place and its operator: what a steering method consists of.

    Attributes:
        vector: The directions, by site.
        scope: The tokens whose states are edited.
        operator: How they are edited; `add` by default. A `Clamp` acts at one site.
        strength: Its own strength, which the common multiplier of all uses multiplies.

    Raises:
        InputError: For a clamp at several sites.

    Example:
        use = VectorUse(vector=vector, scope=Scope.thinking(model))
        steering = as_intervention([use], 0.5)
        experiment.arms([Condition(name="half", intervention=steering)])
    """

    vector: SteeringVector
    scope: Scope
    operator: Operator = add
    strength: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.operator, Clamp) and len(self.vector.directions) != 1:
            raise InputError(
                f"a clamp at {len(self.vector.directions)} sites; each site has its own projection, so make one use per site (see clamped)"
            )


def clamped(vector: SteeringVector, scope: Scope) -> tuple[VectorUse, ...]:
    """Uses that set the projection on each direction to that of the class that it points to.

    Args:
        vector: A vector whose extraction noted these mean projections (`provenance["towards"]`), as SEAL's does.
        scope: The tokens whose states are edited.

    Returns:
        One use per site, each with a `Clamp`.

    Example:
        uses = clamped(extract_seal(store, Site.parse("resid_post.4")), Scope.thinking(model, at_separators=True))
        intervention = as_intervention(uses, 1.0)  # at 1 the projection is all the way there
        runs = experiment.run("clamp", intervention)
    """
    parts = []
    for site, direction in vector.directions.items():
        one = replace(vector, directions={site: direction})
        parts.append(VectorUse(vector=one, scope=scope, operator=Clamp(to=vector.provenance["towards"][str(site)])))
    return tuple(parts)


def as_intervention(uses: Sequence[VectorUse], multiplier: float, *, measure: bool = True) -> Composed:
    """All uses of a method as one intervention.

    Args:
        uses: The vectors, applied in this order.
        multiplier: Their common strength; negative for the reverse.
        measure: Whether to record how far each edited token is moved, a number per token and site.

    Returns:
        An intervention for one run; make a new one for the next.

    Example:
        uses = extract("seal", store, model)
        reverse = as_intervention(uses, -1.0)
        arms = experiment.arms([Condition(name="reversed", intervention=reverse)])
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def operator(use: VectorUse) -> Operator:
        return use.operator.within(moved) if isinstance(use.operator, MatchedEdit) else use.operator

    return Composed(
        *(
            Steering(use.vector, multiplier * use.strength, use.scope, operator=operator(use), measure=measure)
            for use in uses
        )
    )


def check_uses(uses: Sequence[VectorUse], model: Model) -> None:
    """Raise InputError without uses, or if a vector does not fit the model."""
    if not uses:
        raise InputError("no vector to steer with; give at least one")
    for use in uses:
        use.vector.check(model)
