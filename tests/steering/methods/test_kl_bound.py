"""The strength under a KL bound equals the golden numbers, and no larger one is allowed."""

import json
import math
from pathlib import Path

import pytest

from reasonscope.data.errors import InputError
from reasonscope.steering.methods.kl_bounds import _discriminant, kl_bound

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "asc_gamma.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(tuple(case["inputs"].values())))
def test_golden_strengths(case):
    expected, tolerance = case["expected"], case["tolerance"]
    for variant, key in (("corrected", "corrected"), ("published", "reference")):
        found = kl_bound(case["inputs"]["a"], case["inputs"]["L"], case["inputs"]["epsilon"], variant=variant)
        assert found.gamma_star == pytest.approx(expected["gamma_star"], abs=tolerance)
        for name, value in expected[key].items():
            wanted = math.nan if value is None else value
            assert getattr(found, name) == pytest.approx(wanted, abs=tolerance, nan_ok=True), name
    if expected["discriminant"] is not None:
        assert _discriminant(expected["beta"]) == pytest.approx(expected["discriminant"], rel=1e-9, abs=tolerance)


@pytest.mark.parametrize("a", [0.05, 1.0, 30.0])
def test_the_exact_strength_spends_the_whole_bound_and_the_papers_never_more(a):
    found = kl_bound(a, 1.0, 1e-3)
    assert found.bound(found.gamma_star) == pytest.approx(1e-3)
    assert found.gamma_max <= found.gamma_star <= found.gamma_raw
    assert found.bound(found.gamma_max) <= 1e-3


@pytest.mark.parametrize("given", [(-1, 1, 1), (0, 0, 1), (1, 1, 0), (math.nan, 1, 1)])
def test_invalid_bounds_are_refused(given):
    with pytest.raises(InputError, match="ε"):
        kl_bound(*given)
