"""A small version of `make selftest`, and the widening of intervals that it led to."""

import runpy
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from null_of_probes import p_of_noise

from reasonscope.data.intervals import tails

SIMULATE = runpy.run_path(str(Path(__file__).with_name("simulate.py")))


@pytest.mark.parametrize(
    "name", ["mean of 20, normal", "band of 20", "labels exchanged within problems", "two-sided, 199 draws", "Holm"]
)
def test_intervals_cover_and_p_values_are_uniform(name):
    [row] = SIMULATE["simulate"](200, 200, only=name)
    assert row.met, row


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("one of 4 heads of a block is ablated", 200),
        ("one of 28 heads of a block is ablated", 60),
        ("tokens above the answers of 39 other problems", 30),
        ("sentences that one head attends to", 200),
        ("tokens that a vector changes unlike 20 others do", 60),
        ("a random vector called beyond random", 20),
        ("unrelated signals called alike", 60),
        ("cumulative change of about 10 steps", 200),
    ],
)
def test_on_random_models_the_functions_of_users_see_nothing(name, runs):
    [row] = SIMULATE["simulate"](runs, 60, only=name)
    assert row.met, row


def test_every_row_names_a_function_that_there_is():
    for where in {row.where for row in SIMULATE["_rows"]()}:
        first, *rest = where.split(".")
        module = import_module(f"reasonscope.{first}")
        for name in rest:
            module = getattr(module, name, None) or import_module(f"{module.__name__}.{name}")
        assert callable(module), where


def test_controls_that_repeat_would_be_noticed():
    p = np.random.default_rng(0).choice([0.25, 0.5, 1.0], size=200)  # two of three controls are one and the same
    assert not SIMULATE["_even"](p, 4)[2]


@pytest.mark.parametrize("probe", ["length", "refusal", "correctness"])
def test_a_probe_of_noise_gets_a_p_value_of_its_own_shuffles(probe):
    found = [p_of_noise(probe, 2, index) for index in range(3)]
    assert found == [p_of_noise(probe, 2, index) for index in range(3)]
    assert len(set(found)) > 1 and all(1 / 200 <= p <= 1 for p in found)
    assert np.allclose(np.array(found) * 200, np.round(np.array(found) * 200))  # 199 shuffles and the labels themselves


def test_the_simulation_would_notice_a_narrow_interval():
    narrow = SIMULATE["Interval"](
        name="half as wide", where="", truth=0.0, one=lambda rng, draws: (x := rng.normal(), (x - 0.98, x + 0.98))[1]
    )
    assert not SIMULATE["coverage"](narrow, 200, 1, 0).met


def test_intervals_of_few_are_wider_and_of_many_as_they_were():
    lows = [tails(n)[0] for n in (3, 10, 20, 240, 10**6)]
    assert lows == sorted(lows) and all(low < 0.025 for low in lows)
    assert lows[-1] == pytest.approx(0.025, abs=1e-6)
    assert tails(10)[0] == pytest.approx(0.00855, abs=1e-4)  # Φ(−2.262 √(10/9))
    assert all(np.isclose(sum(tails(n)), 1) for n in (5, 50))
