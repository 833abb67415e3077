"""Each operator does what its formula says; all are the identity at strength 0."""

import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.steering import OPERATORS, Clamp, ablate, add, orthogonal_add, rotate, scaled_add

STATES = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
EAST = torch.tensor([2.0, 0.0])


@pytest.mark.parametrize(
    ("operator", "strength", "expected"),
    [
        (add, 0.5, [[4.0, 4.0], [1.0, 2.0]]),
        (scaled_add, 0.5, [[5.5, 4.0], [1.0, 2.0]]),
        (ablate, 1.0, [[0.0, 4.0], [0.0, 2.0]]),
        (ablate, 0.5, [[1.5, 4.0], [0.0, 2.0]]),
        (Clamp(to=-1.0), 1.0, [[-1.0, 4.0], [-1.0, 2.0]]),
        (orthogonal_add, 1.0, [[3.0 + 1.28, 4.0 - 0.96], [2.0, 2.0]]),
        (rotate, torch.pi / 2, [[4.0, -3.0], [2.0, 0.0]]),
    ],
)
def test_formulas_by_hand(operator, strength, expected):
    torch.testing.assert_close(operator(STATES, EAST, strength), torch.tensor(expected))


@pytest.mark.parametrize("operator", [*OPERATORS.values(), Clamp(to=3.0)])
def test_strength_zero_is_the_identity(operator):
    torch.testing.assert_close(operator(STATES, EAST, 0.0), STATES, rtol=0, atol=0)


def test_invariants():
    states, direction = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), torch.ones(16)
    assert (ablate(states, direction, 1.0) @ direction).abs().max() < 1e-5
    added = orthogonal_add(states, direction, 0.7) - states
    assert (added * states).sum(dim=-1).abs().max() < 1e-4
    torch.testing.assert_close(rotate(states, direction, 0.3).norm(dim=-1), states.norm(dim=-1))
    torch.testing.assert_close(rotate(direction[None], direction, 0.3), direction[None])  # no plane to turn in


def test_a_direction_without_length_points_nowhere():
    with pytest.raises(InputError, match="length 0"):
        ablate(STATES, torch.zeros(2), 1.0)
