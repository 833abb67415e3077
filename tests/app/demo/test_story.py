"""The ten lines of the demo: each says a number and its control, and owns up where something does not beat it."""

import json
from copy import deepcopy

import pytest

from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.app.demo.story import story


@pytest.fixture
def summary():
    """The numbers of the example that ships."""
    return json.loads((EXAMPLE / "summary.json").read_text(encoding="utf-8"))


def test_it_has_ten_lines_each_with_a_number_and_a_topic(summary):
    lines = story(summary)
    assert len(lines) == 10
    assert all(":" in line and any(char.isdigit() for char in line) and line.endswith(".") for line in lines)


def test_what_beats_its_control_and_what_does_not_are_told_apart(summary):
    lines = story(summary)
    assert "Spearman correlation 0.92 [0.90, 0.94] on 240 problems" in lines[2]
    assert "reaches 0.95, which the probe does not beat" in lines[3]
    assert "shorter by 33 % [28, 38]" in lines[4] and "3 to 7 %" in lines[4]
    assert "accuracy falls from 0.85 to 0.80 (−0.05 [" in lines[5]
    assert "thinking speed finds nearly the same direction and writes the same text on 38 of 40 problems" in lines[6]
    assert "random vectors that move states as far change it by −22 to 3 % at accuracy 0.63 to 0.90" in lines[6]
    assert "(first layer) reaches 0.94" in lines[7] and lines[7].endswith("so the probe does not beat it.")
    assert "not more than chance" in lines[8] and lines[9].endswith("so the probe does not beat it.")
    better = deepcopy(summary)
    better["length_probe"]["baselines"]["difficulty"] = 0.5
    better["correctness_probe"]["above_best_baseline"] = [0.1, 0.05, 0.15]
    better["refusal_probe"]["cliff"]["above_random"] = True
    lines = story(better)
    assert "which the probe beats" in lines[3] and lines[8].endswith("which is less.")
    assert "does not beat" not in lines[9]


def test_two_methods_that_write_different_texts_are_told_apart(summary):
    (line,) = [line for line in story(summary | {"same_texts_of_asc_and_speed": 30}) if line.startswith("Two more")]
    assert (
        "thinking speed, clamped, makes the thinking shorter by 73 % [72, 75], accuracy falls" in line
        and "same text" not in line
    )


def test_what_was_not_measured_says_why(summary):
    short = {name: value for name, value in summary.items() if name not in ("asc", "speed")}
    short |= {"refusal_probe": "not measured: 2 problems, 5 folds", "correctness_probe": "not measured: all are right"}
    lines = story(short)
    assert "without --quick" in lines[6] and len(lines) == 10
    assert lines[7:] == [
        "Refusal probe: not measured: 2 problems, 5 folds.",
        "Refusal cliff: not measured: 2 problems, 5 folds.",
        "Correctness probe: not measured: all are right.",
    ]
