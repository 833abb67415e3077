"""SEAL's vector equals the golden numbers; bad classes and states are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.steering import seal_direction

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "seal_vector.json").read_text(encoding="utf-8"))
KINDS = {"E": "execution", "R": "reflection", "T": "transition"}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_vectors(case):
    labels = [KINDS[label] for trace in case["inputs"]["labels"] for label in trace]
    for layer, expected in zip(case["inputs"]["hidden"], case["expected"]["vector"], strict=True):
        states = np.array([state for trace in layer for state in trace])
        if expected is None or None in expected:
            with pytest.raises(InputError, match="both classes"):
                seal_direction(states, labels)
            continue
        tolerance = case["tolerance"]
        # the released code's sign is the reverse of the paper's, which is ours
        np.testing.assert_allclose(-seal_direction(states, labels), expected, rtol=tolerance, atol=tolerance)


def test_one_class_alone_can_be_left():
    states = np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    kinds = ["execution", "reflection", "transition"]
    np.testing.assert_array_equal(seal_direction(states, kinds, away_from=("reflection",)), [1.0, -1.0])


def test_a_missing_class_and_nan_are_refused():
    with pytest.raises(InputError, match="2 execution steps and 0 of reflection or transition"):
        seal_direction(np.zeros((2, 3)), ["execution", "execution"])
    with pytest.raises(InputError, match="NaN"):
        seal_direction(np.array([[np.nan], [0.0]]), ["execution", "reflection"])
