"""The axis of thinking speed and the adaptive controller equal the golden numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.steering.methods.adaptive import _AdaptiveStrength, layer_difference
from reasonscope.steering.methods.thinking_speed import speed_axis

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "thinking_speed.json").read_text(encoding="utf-8"))


def golden(kind):
    cases = [case for case in GOLDEN["cases"] if case["inputs"]["kind"] == kind]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


@golden("pca_reader")
def test_golden_axes(case):
    given, expected, tolerance = case["inputs"], case["expected"], case["tolerance"]
    first = np.array(given["fast_first"], dtype=bool)
    for layer, (fast, slow) in enumerate(zip(np.array(given["fast"]), np.array(given["slow"]), strict=True)):
        axis = speed_axis(fast, slow, fast_first=first)
        np.testing.assert_allclose(axis.direction, expected["signed_direction"][layer], atol=tolerance)
        np.testing.assert_allclose(axis.mean, expected["mean_difference"][layer], atol=tolerance)
        ordered = np.where(first[:, None, None], np.stack([fast, slow], 1), np.stack([slow, fast], 1))
        projected = (ordered.reshape(-1, fast.shape[1]) - axis.mean) @ axis.direction
        np.testing.assert_allclose(projected, expected["signed_projection"][layer], atol=10 * tolerance)


@golden("layer_difference")
def test_golden_differences_between_layers(case):
    early = torch.tensor(case["inputs"]["early_logits"], dtype=torch.float64)
    final = torch.tensor(case["inputs"]["final_logits"], dtype=torch.float64)
    for variant, key in (("corrected", "corrected"), ("published", "reference")):
        found = layer_difference(early, final, variant=variant)
        np.testing.assert_allclose(found, case["expected"][key], atol=case["tolerance"])


@golden("alpha_trace")
def test_golden_strengths_of_the_controller(case):
    given = dict(case["inputs"])
    difficulty, _ = given.pop("difficulty"), given.pop("kind")
    names = {"alpha_min": "lowest", "alpha_max": "highest", "alpha_step": "step", "window": "window", "lambda": "width"}
    strength = _AdaptiveStrength(**{names[name]: value for name, value in given.items()})
    assert [strength.update(value) for value in difficulty] == case["expected"]["alpha_after"]


def test_strengths_are_the_published_ones_unless_said():
    """From -4 to 8 by 2, over 8 tokens and two standard deviations; alike tokens are not easier than their mean."""
    given, named = _AdaptiveStrength(), _AdaptiveStrength(lowest=-4.0, highest=8.0, step=2.0, window=8, width=2.0)
    rng = np.random.default_rng(0)
    for value in rng.normal(size=60):
        assert given.update(value) == named.update(value)
    assert given.value in range(-4, 9, 2)
    flat = _AdaptiveStrength(window=2)
    assert [flat.update(1.0) for _ in range(6)] == [-4.0] * 6
    rising = _AdaptiveStrength(window=2, lowest=0.0, highest=0.0, step=0.0)
    assert rising.update(1.0) == 0.0
    for wrong in ({"window": 1}, {"lowest": 9.0}, {"step": -1.0}):
        with pytest.raises(InputError, match="give a window of at least 2"):
            _AdaptiveStrength(**wrong)


def test_invalid_pairs_are_refused():
    with pytest.raises(InputError, match="pairs or more"):
        speed_axis(np.zeros((1, 3)), np.zeros((1, 3)))
    with pytest.raises(InputError, match="pairs or more"):
        speed_axis(np.zeros((3, 3)), np.zeros((2, 3)))
    with pytest.raises(InputError, match="NaN"):
        speed_axis(np.full((2, 3), np.nan), np.zeros((2, 3)))


@pytest.mark.parametrize("variant", ["corrected", "published"])
def test_forbidden_tokens_leave_the_divergence_finite(variant):
    generator = torch.Generator().manual_seed(0)
    early, final = torch.randn(2, 1, 7, generator=generator), torch.randn(1, 7, generator=generator)
    forbidden = final.clone()
    forbidden[:, 3] = -torch.inf
    found = layer_difference(early, forbidden, variant=variant)
    assert torch.isfinite(found).all() and (found > 0).all()
    if variant == "corrected":
        assert (found <= np.log(2)).all()
        nearly = forbidden.nan_to_num(neginf=-80.0)
        torch.testing.assert_close(found, layer_difference(early, nearly), atol=1e-5, rtol=0)
