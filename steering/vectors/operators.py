"""How an edit combines a state h with a direction v at strength s, with û = v/‖v‖ and ĥ = h/‖h‖. At s = 0 every operator returns h.

| operator | result | at s = 1 |
|---|---|---|
| `add` | h + s·v | adds the vector as it is |
| `scaled_add` | h + s·‖h‖·û | adds a vector as long as the state |
| `ablate` | h − s·(h·û)·û | nothing is left along û |
| `orthogonal_add` | h + s·(v − (v·ĥ)·ĥ) | adds the part of v that is orthogonal to h |
| `Clamp(to=c)` | h + s·(c − h·û)·û | the projection on û is c |
| `rotate` | ‖h‖·(cos s·ĥ + sin s·ŵ), w = v − (v·ĥ)·ĥ | turned by one radian towards v, at the same length |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.errors import InputError

# (states (row, d_model), direction (d_model,), strength) to states, all in float32 or wider.
Operator: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]


def add(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """h + s·v: the strength is in units of the vector's own length."""
    return states + strength * direction


def scaled_add(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """h + s·‖h‖·û: the strength is a share of each state's own norm, so that one strength fits every layer."""
    length: Tensor = states.norm(dim=-1, keepdim=True)
    return states + strength * length * _unit(direction)


def ablate(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """h − s·(h·û)·û: projects the direction out (Arditi et al., arXiv 2406.11717, eq. 4, at s = 1)."""
    return project_out(states, _unit(direction), strength)


def project_out(states: Tensor, unit: Tensor, share: float = 1.0) -> Tensor:
    """Take `share` of the states' part along `unit` (d_model,), of length 1, out of them (…, d_model); in their dtype."""
    return states - share * (states @ unit)[..., None] * unit


def orthogonal_add(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """h + s·(v − (v·ĥ)·ĥ): adds the part of v that is orthogonal to the state."""
    return states + strength * _orthogonal(direction, states)


def rotate(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """‖h‖·(cos s·ĥ + sin s·ŵ): turns each state by `strength` radians towards v, and keeps its norm.

    A state parallel to v stays as it is. At strengths above its angle to v, a state is turned past v.
    """
    across = _orthogonal(direction, states)
    length, angle = across.norm(dim=-1, keepdim=True), torch.tensor(strength)
    towards = states.norm(dim=-1, keepdim=True) * across / length.clamp(min=torch.finfo(length.dtype).tiny)
    turned = angle.cos() * states + angle.sin() * towards
    return torch.where(length > 1e-6 * direction.norm(), turned, states)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp:
    """h + s·(c − h·û)·û: sets the projection of each state on û to `to` at s = 1, and half-way there at s = ½.

    Attributes:
        to: c, in units of the residual stream.

    Example:
        use = VectorUse(vector=vector, scope=scope, operator=Clamp(to=0.0))  # at s = 1 the same as ablate
        steering = as_intervention([use], 1.0)
        run = experiment.run("clamped", steering)
    """

    to: float

    def __call__(self, states: Tensor, direction: Tensor, strength: float) -> Tensor:
        return _moved_to(states, direction, self.to, strength, direction)


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchedEdit:
    """The control of an edit whose size depends on the state (a clamp, `ablate`, `orthogonal_add`): as far, along another direction.

    Such an edit acts on a state that the edits of earlier blocks have already moved. So the control keeps track of D, by how much it has
    moved each state so far in this pass, and of T, by how much the true edits would have moved it. It tries the true edit on h − D + T
    and moves the state along û by the length of that edit, with the sign of its part along the true direction.

    Attributes:
        like: The operator of the true edit.
        read: (d_model,) the true direction.
        chain: Number of the edits that act on the same tokens; they share D and T.
        opens: Whether this is the first of its chain that a state meets, so that D and T are 0.
    """

    like: Operator
    read: NDArray[np.float32]
    chain: int = 0
    opens: bool = True

    def within(self, moved: dict[int, tuple[Tensor, Tensor]]) -> Operator:
        """The operator of one intervention, whose edits share `moved`: D and T, each (row, d_model), by chain."""

        def operator(states: Tensor, direction: Tensor, strength: float) -> Tensor:
            nothing = torch.zeros_like(states)
            ours, theirs = (nothing, nothing) if self.opens or self.chain not in moved else moved[self.chain]
            true = torch.from_numpy(self.read).to(direction)
            shadow = states - ours + theirs
            edit = self.like(shadow, true, strength) - shadow
            size = edit.norm(dim=-1, keepdim=True) * (edit @ true).sign()[..., None]
            across = _orthogonal(direction, states) if self.like is orthogonal_add else direction.expand_as(states)
            step: Tensor = size * torch.nn.functional.normalize(across, dim=-1)
            moved[self.chain] = ours + step, theirs + edit
            return states + step

        return operator

    def __call__(self, states: Tensor, direction: Tensor, strength: float) -> Tensor:
        moved: Tensor = self.within({})(states, direction, strength)
        return moved


# By name. `Clamp` is missing, as it needs a parameter.
OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "add": add,
        "scaled_add": scaled_add,
        "ablate": ablate,
        "orthogonal_add": orthogonal_add,
        "rotate": rotate,
    }
)


def _moved_to(states: Tensor, direction: Tensor, projection: float, strength: float, read: Tensor) -> Tensor:
    return states + strength * (projection - states @ _unit(read))[..., None] * _unit(direction)


def _orthogonal(direction: Tensor, states: Tensor) -> Tensor:
    """v − (v·ĥ)·ĥ for each state; v itself for a state of 0."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    return direction - (unit @ direction)[..., None] * unit


def _unit(direction: Tensor) -> Tensor:
    length: Tensor = direction.norm()
    if length == 0:
        raise InputError("the direction has length 0; extract it from classes that differ")
    return direction / length
