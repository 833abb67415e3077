"""What an edit does with a state h and a direction v, at strength s. With û = v/‖v‖ and ĥ = h/‖h‖; at s = 0 each of them is h.

| operator | gives | s = 1 |
|---|---|---|
| `add` | h + s·v | adds the vector as it is |
| `scaled_add` | h + s·‖h‖·û | adds as much as there is |
| `ablate` | h − s·(h·û)·û | nothing is left along û |
| `orthogonal_add` | h + s·(v − (v·ĥ)·ĥ) | adds what of v is orthogonal to h |
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
    return _moved_to(states, direction, 0.0, strength, direction)


def orthogonal_add(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """h + s·(v − (v·ĥ)·ĥ): adds what the state does not have already; what is along the state stays."""
    return states + strength * _orthogonal(direction, states)


def rotate(states: Tensor, direction: Tensor, strength: float) -> Tensor:
    """‖h‖·(cos s·ĥ + sin s·ŵ): turns each state by `strength` radians towards v in the plane of the two; its norm stays.

    A state along v itself has no such plane and stays as it is. Beyond its angle to v a state is turned past it.
    """
    across = _orthogonal(direction, states)
    length, angle = across.norm(dim=-1, keepdim=True), torch.tensor(strength)
    towards = states.norm(dim=-1, keepdim=True) * across / length.clamp(min=torch.finfo(length.dtype).tiny)
    turned = angle.cos() * states + angle.sin() * towards
    return torch.where(length > 1e-6 * direction.norm(), turned, states)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp:
    """h + s·(c − h·û)·û: the projection of each state on û becomes `to` at s = 1 (and half-way there at s = ½).

    `read` (d_model,): the û whose projection says how far a state is moved, where that is not the direction moved along. A random
    direction that reads what the true one does moves every state just as far: the control of a clamp.
    """

    to: float
    read: NDArray[np.float32] | None = None

    def __call__(self, states: Tensor, direction: Tensor, strength: float) -> Tensor:
        read = direction if self.read is None else torch.from_numpy(self.read).to(direction)
        return _moved_to(states, direction, self.to, strength, read)


# By name; `Clamp` has a parameter and is made by hand.
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
    """v − (v·ĥ)·ĥ for each state; v itself where a state is 0."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    return direction - (unit @ direction)[..., None] * unit


def _unit(direction: Tensor) -> Tensor:
    length: Tensor = direction.norm()
    if length == 0:
        raise InputError("the direction has length 0, and so points nowhere; extract it from classes that differ")
    return direction / length
