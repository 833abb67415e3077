"""Figures say what they show: labelled axes, every arm and score drawn, and a page that needs no network."""

import numpy as np
import pytest

from reasonscope.analysis import figures
from reasonscope.app.report import write_report
from reasonscope.probes.evaluate import Estimate
from reasonscope.probes.length import LengthProbe
from reasonscope.steering import Arm


def estimate(value):
    return Estimate(value=value, low=value - 0.1, high=value + 0.1)


@pytest.fixture
def probe():
    true = np.array([10.0, 20.0, 40.0])
    return LengthProbe(
        spearman=estimate(0.8),
        baselines={"prompt_length": estimate(0.3), "bag_of_words": estimate(0.5)},
        n_groups=3,
        n_truncated=0,
        predicted=true * 1.1,
        true=true,
    )


@pytest.fixture
def arms():
    return [
        Arm(
            name=name,
            multiplier=1.0,
            n_problems=9,
            tokens=estimate(100.0),
            accuracy=estimate(0.8),
            change=estimate(0.0),
            touched=5,
        )
        for name in ("base", "seal", "random 1")
    ]


def test_axes_are_named_and_every_arm_is_drawn(probe, arms):
    drawn = [figures.length_prediction(probe), figures.steering_plane(arms)]
    assert all(figure.layout.xaxis.title.text and figure.layout.yaxis.title.text for figure in drawn)
    assert [trace.name for trace in drawn[1].data] == ["base", "seal", "random 1"]
    assert list(drawn[1].data[0].error_x.array) == [pytest.approx(0.1)]


def test_scores_stand_beside_their_baselines(probe):
    figure = figures.length_scores(probe)
    assert list(figure.data[0].y) == ["probe", "prompt length", "bag of words"]


def test_the_report_holds_its_script_once_and_every_number(tmp_path, probe):
    drawn = [figures.length_scores(probe), figures.length_prediction(probe)]
    text = write_report(tmp_path, {"a": {"b": 0.25}, "c": [1, 2]}, drawn).read_text(encoding="utf-8")
    assert "<script src=" not in text and text.count("plotly.js v") == 1
    assert "a.b" in text and "0.25" in text and "1 … 2" in text
