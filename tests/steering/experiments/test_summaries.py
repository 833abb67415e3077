"""The findings of sweeps read as sentences, and every number has its control."""

import json
from dataclasses import replace

import numpy as np
import pytest

from reasonscope.data.intervals import Estimate
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering import Arm, DecodingResponse, Dose, DoseResponse
from reasonscope.steering.experiments.summaries import method_title

FLAT = Estimate(value=0.0, low=0.0, high=0.0)


def estimate(value, half):
    return Estimate(value=value, low=value - half, high=value + half)


def arm(name, multiplier, change, accuracy, *, half=0.06, well_formed=1.0, distance=621.0, **measures):
    tokens, right = estimate(350 * (1 + change), 20), estimate(accuracy, 0.1)
    return Arm(
        name=name,
        multiplier=multiplier,
        n_problems=40,
        tokens=tokens,
        accuracy=right,
        change=estimate(change, half),
        n_edited=100,
        distances={Site("resid_post", 4): distance},
        measures={"tokens": tokens, "accuracy": right, "well_formed": estimate(well_formed, 0.02), **measures},
        differences={"accuracy": estimate(accuracy - 0.83, 0.12)},
    )


BASE = arm("base", 0.0, 0.0, 0.83, half=0.0)


def dose(strength, change, accuracy, random, *, excess, **how):
    return Dose(
        strength=strength,
        steered=arm("seal", strength, change, accuracy, **how),
        reversed=arm("seal reversed", -strength, 0.05, 0.8),
        random=tuple(
            arm(f"random {i}", strength, value, 0.82, distance=600 + 10 * i) for i, value in enumerate(random)
        ),
        excess={"tokens": excess},
    )


def response(*doses):
    return DoseResponse(name="seal", sites=(Site("resid_post", 4),), base=BASE, doses=doses, held_out=True)


NOISE = (-0.01, 0.0, 0.01, 0.004, -0.004)
STRONG = dose(1.0, -0.27, 0.68, NOISE, excess=estimate(-90, 20))


def test_a_sweep_says_what_the_method_does_and_what_chance_does():
    weak = dose(0.5, -0.01, 0.83, NOISE, excess=estimate(-3, 20))
    found = response(weak, STRONG).summary()
    assert found.finding == (
        "SEAL at strength 1 makes the thinking 27 % shorter [21, 33], random vectors that move states as far change it by −1 to 1 %; "
        "accuracy falls from 0.83 to 0.68 (−0.15 [−0.27, −0.03])."
    )
    assert found.columns[:4] == ("strength", "thinking tokens", "change", "random vectors")
    assert found.columns[4:] == ("accuracy", "moved by (random)", "reversed", "beyond random?")
    assert [(row[0], row[2], row[3], *row[5:]) for row in found.rows] == [
        ("unsteered", "", "", "", "", ""),
        ("0.5", "−1 % [−7, 5]", "−1 to 1 %", "621 (600 to 640)", "5 % [−1, 11]", "no"),
        ("1", "−27 % [−33, −21]", "−1 to 1 %", "621 (600 to 640)", "5 % [−1, 11]", "yes"),
    ]
    assert found.notes == [
        "Judged on 40 problems that the vector was not made from, with the same seeds at every strength."
    ]


def test_a_sweep_that_does_no_more_than_chance_says_so():
    found = response(dose(1.0, -0.01, 0.83, NOISE, excess=estimate(-3, 20))).summary()
    assert "leaves the length of the thinking as it is (−1 % [−7, 5])" in found.finding
    assert "accuracy stays at 0.83" in found.finding
    assert found.finding.endswith("No strength changes the length beyond what random vectors do.")


def test_answers_that_break_are_named_and_so_is_a_vector_of_unknown_problems():
    broken = dose(2.0, 0.4, 0.1, NOISE, excess=estimate(90, 20), well_formed=0.4)
    found = replace(response(broken), held_out=False).summary()
    assert found.notes == [
        "Judged on 40 problems. The vector does not say which problems it was made from: these may be among them.",
        "At 2, 60 % of the answers are cut off at the token limit or cannot be read (0 % unsteered).",
    ]


def test_refusal_is_reported_if_there_are_requests():
    before, after = ({"refused_harmful": estimate(share, 0.0)} for share in (1.0, 0.0))
    one = Dose(
        strength=1.0,
        steered=arm("refusal-ablate", 1.0, 0.0, 0.83, **after),
        reversed=arm("r", -1.0, 0.0, 0.83, **before),
        random=tuple(arm(f"random {i}", 1.0, 0.0, 0.83, refused_harmful=estimate(0.6 + i / 10, 0)) for i in range(5)),
        excess={"tokens": FLAT},
    )
    found = replace(response(one), base=arm("base", 0.0, 0.0, 0.83, **before)).summary()
    wanted = "the refused share of harmful requests falls from 1.00 to 0.00, with random controls it is 0.60 to 1.00"
    assert wanted in found.finding and "harmful requests refused" in found.columns


def test_decoding_methods_are_compared_with_their_own_controls():
    two = DecodingResponse(
        name="tip",
        unit="logits",
        base=BASE,
        arms=(arm("tip", 1.0, -0.02, 0.83), arm("tip", 3.0, -0.2, 0.8)),
        controls=(arm("random tokens 1", 1.0, 0.0, 0.83), arm("random tokens 1", 3.0, 0.03, 0.83)),
    )
    closing = replace(two, name="forced-close", unit="tokens", controls=(), control_name="")
    first, last = two.summary(), closing.summary()
    assert first.finding.startswith(
        "TIP at 3 logits makes the thinking 20 % shorter [14, 26], random tokens change it by 3 %"
    )
    assert [row[3] for row in first.rows] == ["", "0 %", "3 %"]
    assert "and has no random control" in last.finding and [row[3] for row in last.rows] == ["", "–", "–"]


def test_titles_of_methods():
    assert [method_title(name) for name in ("seal-clamp", "asc", "speed")] == ["SEAL-clamp", "ASC", "speed"]


@pytest.mark.parametrize("k", [5, 12])
def test_a_random_direction_is_rarely_beyond_random(k):
    """It leaves Student's interval for one more of k draws in 5 %, if its problems agree; and never if they do not."""
    rng = np.random.default_rng(k)
    beyond = {True: 0, False: 0}
    for value, *random in rng.normal(size=(4000, 1 + k)):
        for agree in beyond:
            excess = estimate(value, abs(value) / 2 if agree else abs(value) + 1)
            beyond[agree] += dose(1.0, value, 0.8, random, excess=excess).beyond_random
    assert beyond[True] / 4000 == pytest.approx(0.05, abs=0.011) and beyond[False] == 0


@pytest.mark.parametrize(
    ("low", "high", "beyond"), [(0.0, 9.0, False), (-9.0, 0.0, False), (1.0, 9.0, True), (-9.0, -1.0, True)]
)
def test_an_excess_that_reaches_nothing_is_not_beyond_random(low, high, beyond):
    far = dose(1.0, -0.27, 0.68, NOISE, excess=Estimate(value=0.0, low=low, high=high))
    assert far.beyond_random is beyond


def test_a_sweep_comes_back_from_its_file():
    whole = response(dose(0.5, -0.01, 0.83, NOISE, excess=estimate(-3, 20)), STRONG)
    known = json.loads(json.dumps(whole.to_dict()))
    assert DoseResponse.from_dict("seal", known) == whole
    assert known["n_problems"] == 40 and known["held_out"] is True and known["sites"] == ["resid_post.4"]
    assert [one["beyond_random"] for one in known["doses"]] == [False, True]
    assert known["doses"][1]["excess_over_random"] == {"tokens": {"value": -90, "low": -110, "high": -70}}
    assert [arm.name for arm in whole.arms[:4]] == ["base", "seal", "seal reversed", "random 0"]
    assert whole.controls == tuple(arm for one in whole.doses for arm in one.random)
    assert list(whole.curves) == ["seal", "seal reversed"]
    assert [arm.multiplier for arm in whole.curves["seal reversed"]] == [-0.5, -1.0]
