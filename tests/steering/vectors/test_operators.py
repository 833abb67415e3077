"""Each operator does what its formula says; all are the identity at strength 0."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.steering import OPERATORS, Clamp
from reasonscope.steering.vectors.operators import MatchedEdit, ablate, add, orthogonal_add, rotate, scaled_add

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


def test_plans_name_the_operators():
    expected = {
        "add": add,
        "scaled_add": scaled_add,
        "ablate": ablate,
        "orthogonal_add": orthogonal_add,
        "rotate": rotate,
    }
    assert expected == OPERATORS


@pytest.mark.parametrize(
    "operator",
    [*OPERATORS.values(), Clamp(to=3.0), MatchedEdit(like=Clamp(to=3.0), read=np.ones(16, dtype=np.float32))],
)
def test_each_state_is_moved_by_itself(operator):
    states = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    direction = torch.arange(16.0)
    moved = operator(states, direction, 0.7)
    one_by_one = [[operator(state[None], direction, 0.7)[0] for state in rows] for rows in states]
    torch.testing.assert_close(moved, torch.stack([torch.stack(rows) for rows in one_by_one]))


def test_a_clamp_reads_one_direction_and_moves_along_another():
    moved = MatchedEdit(like=Clamp(to=1.0), read=np.array([0.0, 5.0], dtype=np.float32))(STATES, EAST, 1.0)
    torch.testing.assert_close(moved, torch.tensor([[3.0 + 1 - 4, 4.0], [0.0 + 1 - 2, 2.0]]))


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_turning_does_not_depend_on_the_length_of_the_direction(length):
    """A state within a millionth of the direction has no plane; one 1e-4 away has, whatever the direction's length."""
    near = torch.tensor([[1.0, 1e-4]])
    torch.testing.assert_close(rotate(near, length * EAST, 1e-4), torch.tensor([[1.0, 0.0]]), atol=1e-6, rtol=0)


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
