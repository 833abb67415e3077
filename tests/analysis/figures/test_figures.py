"""Figures say what they show: labelled axes, every arm and score drawn, and a page that needs no network."""

import json
from dataclasses import replace

import numpy as np
import pytest

from reasonscope.analysis import figures
from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.analysis.traces.trajectory import SIGNALS, UNIT
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.comparison import Comparison
from reasonscope.probes.evaluation.conformal import ResidualBand
from reasonscope.probes.evaluation.permutation_null import Null
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.properties.length_probe import LengthReport
from reasonscope.probes.properties.refusal_cliff import Cliff, mean_trajectory
from reasonscope.steering import Arm, Dose, DoseResponse


def estimate(value):
    return Estimate(value=value, low=value - 0.1, high=value + 0.1)


@pytest.fixture
def probe():
    true = np.array([10.0, 20.0, 40.0])
    comparison = Comparison(
        metric="Spearman",
        score=estimate(0.8),
        baselines={"prompt_length": estimate(0.3), "bag_of_words": estimate(0.5)},
        difference=estimate(0.3),
        text_difference=estimate(0.3),
        shuffled=Null(observed=0.8, null=np.zeros(20), p_value=1 / 21),
        metrics={"concordance": estimate(0.9), "r2_log": estimate(0.7), "r2": estimate(0.6)},
        n_rows=3,
        n_problems=3,
        n_groups=3,
    )
    return LengthReport(
        comparison=comparison,
        n_groups=3,
        n_traces=3,
        n_truncated=0,
        predicted=true * 1.1,
        true=true,
        within_difficulty=estimate(0.4),
        within_dataset=None,
        undefined={},
        between_share=None,
        layer=(Site("resid_post", 1),) * 5,
        probe=LinearProbe(
            coef=np.ones(3), intercept=0.0, site=Site("resid_post", 1), task="regression", method="ridge", model={}
        ),
        band=ResidualBand(low=-0.5, high=0.5, coverage=0.9),
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
            n_edited=5,
        )
        for name in ("base", "seal", "random 1")
    ]


def test_axes_are_named_and_every_arm_is_drawn(probe, arms):
    drawn = [figures.length_prediction(probe), figures.steering_plane(arms)]
    assert all(figure.layout.xaxis.title.text and figure.layout.yaxis.title.text for figure in drawn)
    assert [trace.name for trace in drawn[1].data] == ["base", "seal", "random 1"]
    assert list(drawn[1].data[0].error_x.array) == [pytest.approx(0.1)]


def arm(name, tokens, accuracy, multiplier=1.0):
    fields = {"change": estimate(0.0), "n_problems": 9, "n_edited": 5}
    return Arm(name=name, multiplier=multiplier, tokens=estimate(tokens), accuracy=estimate(accuracy), **fields)


def test_the_front_holds_what_nothing_beats_and_the_nulls_are_shaded():
    dose = Dose(
        strength=1.0,
        steered=arm("seal", 60.0, 0.7),
        reversed=arm("seal reversed", 140.0, 0.9, -1.0),
        random=tuple(arm(f"random {i}", 95.0 + i, 0.78 + 0.01 * i) for i in range(5)),
        excess={},
    )
    base = arm("base", 100.0, 0.8, 0.0)
    response = DoseResponse(name="seal", sites=(Site("resid_post", 1),), base=base, doses=(dose,), held_out=True)
    drawn = {
        trace.name: trace for trace in figures.steering_front([response]).data if trace.mode != "markers" or trace.name
    }
    assert list(zip(drawn["Pareto front"].x, drawn["Pareto front"].y, strict=True)) == [
        (60, 0.7),
        (100, 0.8),
        (140, 0.9),
    ]
    shade = drawn["random vectors (n = 5)"]
    assert (min(shade.x), max(shade.x), min(shade.y), max(shade.y)) == (95, 99, 0.78, pytest.approx(0.82))
    assert drawn["seal"].x == (60,) and drawn["seal reversed"].x == (140,) and drawn["unsteered"].x == (100,)


def test_scores_stand_beside_their_baselines(probe):
    figure = figures.length_scores(probe)
    assert [drawn.y[0] for drawn in figure.data] == ["probe", "prompt length", "bag of words"]
    assert figure.data[0].marker.color != figure.data[1].marker.color == figure.data[2].marker.color


def test_the_map_is_white_at_chance():
    scores = np.array([[0.5, 0.6], [0.9, np.nan]])
    figure = figures.layer_position_map(
        scores, ["resid_post.0", "resid_post.1"], ["prompt", "window"], title="t", measure="AUROC", chance=0.5
    )
    drawn = figure.data[0]
    assert (drawn.zmin, drawn.zmax) == (pytest.approx(0.1), pytest.approx(0.9))
    assert list(drawn.x) == ["prompt", "window"] and list(drawn.y) == ["resid_post.0", "resid_post.1"]


def test_trajectories_show_the_last_tokens_one_by_one_and_how_many_traces_there_are():
    curve = mean_trajectory([np.linspace(0, 1, 50), np.linspace(0, 1, 30) / 2], groups=["a", "b"])
    figure = figures.mean_trajectories({"harmful complied": curve}, title="t", measure="probability", last=20)
    low, high, whole, whole_n, _, _, close, close_n = figure.data
    assert np.isnan(low.y[0]) and low.y[-1] < whole.y[-1] < high.y[-1]  # one problem alone has no interval
    assert len(whole.x) == 50 and len(close.x) == 20
    assert list(close.x) == list(range(-19, 1))
    assert list(close.y) == list(curve.mean[-20:])
    assert (whole_n.y[0], whole_n.y[-1], close_n.y[0]) == (1, 2, 2)


def test_cliffs_are_drawn_trace_by_trace_beside_the_null():
    plateaus, ends = np.array([0.9, 0.8]), np.array([0.2, 0.4])
    drop = Cliff(
        ids=("a", "b"), plateaus=plateaus, ends=ends, plateau=estimate(0.85), end=estimate(0.3), drop=estimate(0.55)
    )
    figure = figures.cliff_distribution({"harmful complied": drop}, np.zeros(100), title="t")
    assert list(figure.data[0].y) == pytest.approx([0.7, 0.4])
    assert [box.name for box in figure.data] == ["harmful complied (n = 2)", "random directions (means, n = 100)"]


def test_things_without_an_order_are_points_and_each_metric_has_its_unit():
    values = np.array([[0.5, 100.0], [0.7, 300.0]])
    result = Result(
        method="selection", quantity="what a rule does", unit="1 (accuracy), tokens",
        axes=(Axis.of("rule", ("single", "majority")), Axis.of("metric", ("accuracy", "tokens"))),
        values=values, null=Band.of(values[:1] - 0.1, values[:1], values.shape, "a single sample"),
        interval=Band.of(values - 0.2, values + 0.1, values.shape, "bootstrap"),
    )  # fmt: skip
    drawn = figures.of_result(result)["points"]
    null, accuracy, _, tokens = drawn.data
    assert (
        list(accuracy.x) == [0.5, 0.7] and list(tokens.x) == [100, 300] and list(accuracy.y) == ["single", "majority"]
    )
    assert list(accuracy.error_x.array) == pytest.approx([0.1, 0.1]) and list(null.x[:2]) == [0.4, 0.5]
    assert (drawn.layout.xaxis.title.text, drawn.layout.xaxis2.title.text) == ("", "tokens")


def test_tokens_stand_at_their_number_and_a_signed_map_is_white_at_zero():
    line = Result(
        method="mi", quantity="q", unit="1", axes=(Axis.of("token", [str(i) for i in range(90, 140)]),),
        values=np.arange(50.0), null_missing="by hand", arrays={"peaks": np.arange(50) == 3},
    )  # fmt: skip
    measured, peak = figures.along(line).data
    assert (measured.x[0], peak.x[0], peak.y[0]) == (90, 93, 3)
    map_ = Result(
        method="probe_write", quantity="q", unit="logits", axes=(Axis.of("layer", 1), Axis.of("head", 2)),
        values=np.array([[-3.0, 1.0]]), null=Band.of(0.5, 0.5, (1, 2), "even"),
    )  # fmt: skip
    drawn = figures.value_maps(map_)
    (heat,) = drawn.data
    assert (heat.zmin, heat.zmax) == (-3, 3) and "null 0.5" in drawn.layout.annotations[0].text
    assert drawn.layout.xaxis.title.text == "head<br>null: even"


def test_lines_of_different_units_have_a_panel_and_a_unit_each():
    result = Result(
        method="trajectory", quantity="change", unit=UNIT,
        axes=(Axis.of("signal", SIGNALS), Axis.of("site", ["resid_post.0", "resid_post.1"])),
        values=np.array([[300.0, 400.0], [900.0, 950.0], [0.1, -0.2]]), null_missing="by hand",
    )  # fmt: skip
    drawn = figures.of_result(result)["lines"]
    assert {curve.yaxis: list(curve.y) for curve in drawn.data} == {
        "y": [300, 400],
        "y2": [900, 950],
        "y3": [0.1, -0.2],
    }
    titles = [axis.title.text for axis in (drawn.layout.yaxis, drawn.layout.yaxis2, drawn.layout.yaxis3)]
    assert titles == ["residual norm", "residual norm", "cosine"]
    assert list(drawn.layout.xaxis3.ticktext) == ["resid_post.0", "resid_post.1"]


def test_a_unit_is_that_of_the_line():
    common = {"method": "m", "quantity": "q", "axes": (Axis.of("metric", ["span", "sink"]),), "values": np.ones(2)}
    named = Result(
        **common, unit="tokens, or shares", numbers={"units": {"span": "tokens", "sink": "1"}}, null_missing="-"
    )
    assert (named.unit_of("span"), named.unit_of("sink")) == ("tokens", "")
    keyed = Result(**common, unit="1 (accuracy), nats (kl)", null_missing="by hand")
    assert (keyed.unit_of("resampling_kl"), keyed.unit_of("accuracy")) == ("nats", "")
    assert Result(**common, unit="nats", null_missing="by hand").unit_of("anything") == "nats"


def test_a_null_of_no_width_is_a_line_that_is_seen():
    line = Result(
        method="close_attention", quantity="q", unit="1", axes=(Axis.of("sentence", 3),), values=np.arange(3.0),
        null=Band.of(0.5, 0.5, (3,), "alike"),
    )  # fmt: skip
    low, high, _ = figures.along(line).data
    assert low.line.width == high.line.width == 1
    assert list(high.y) == [0.5] * 3


def test_the_dose_response_has_a_curve_through_both_signs_and_a_band_of_random_vectors():
    doses = tuple(
        Dose(
            strength=strength,
            steered=arm("seal", 60.0 / strength, 0.7, strength),
            reversed=arm("seal reversed", 140.0 * strength, 0.9, -strength),
            random=tuple(arm(f"random {i}", 95.0 + i, 0.78, strength) for i in range(5)),
            excess={},
        )
        for strength in (1.0, 2.0)
    )
    base = arm("base", 100.0, 0.8, 0.0)
    response = DoseResponse(name="seal", sites=(Site("resid_post", 1),), base=base, doses=doses, held_out=True)
    drawn = figures.dose_curves(response)
    low, high, seal, unsteered, *_ = drawn.data
    assert list(seal.x) == [-2, -1, 1, 2] and list(seal.y) == [280, 140, 60, 30]
    assert list(low.x) == [1, 2] and list(low.y) == [95, 95] and list(high.y) == [99, 99]
    assert set(unsteered.y) == {100} and "9 held-out" in drawn.layout.title.text
    assert list(figures.sweep_figures([response])) == ["steering_front", "dose_seal"]
    low, high, *_ = figures.dose_curves(replace(response, doses=doses[:1])).data
    assert list(low.x) == list(high.x) == [0.95, 1.05]  # of a single strength, too, there is something to see
    assert list(low.y) == [95, 95] and list(high.y) == [99, 99]
    bare = figures.dose_curves(replace(response, doses=(replace(doses[0], random=()),)))
    assert "random" not in " ".join(curve.name for curve in bare.data)


def test_a_head_that_pushes_down_is_told_from_one_that_pushes_up_by_colour():
    signed = figures.head_grid(np.array([[-3.0, 1.0]]), title="t", measure="logits").data[0]
    assert (signed.zmin, signed.zmax) == (-3, 3)
    assert figures.head_grid(np.array([[3.0, 1.0]]), title="t", measure="m").data[0].zmin is None


def test_a_long_name_is_broken_for_a_phone_and_stays_whole_in_the_data():
    line = Result(
        method="m", quantity="q", unit="1", axes=(Axis.of("sentence", 3),), values=np.arange(3.0),
        null=Band.of(0.0, 0.5, (3,), "as many other words as a legend of a phone cannot hold in one line"),
    )  # fmt: skip
    figure = figures.along(line)
    shown = [curve.name for curve in figures.in_theme(figure, dark=True).data if curve.name]
    assert max(len(part) for name in shown for part in name.split("<br>")) <= 40
    assert any(len(str(row["curve"])) > 60 for row in figures.figure_data(figure))


HOSTILE_FIGURES = {
    "an image from elsewhere": {"data": [], "layout": {"images": [{"source": "http://evil.example/x.png"}]}},
    "a kind that loads maps": {"data": [{"type": "scattergeo", "lat": [0], "lon": [0]}]},
}


@pytest.mark.parametrize("name", list(HOSTILE_FIGURES))
def test_a_kept_figure_that_asks_elsewhere_is_refused(name, tmp_path):
    path = tmp_path / "figure.json"
    path.write_text(json.dumps(HOSTILE_FIGURES[name]), encoding="utf-8")
    with pytest.raises(InputError, match="run the analysis again"):
        figures.read_figure(path)


@pytest.mark.parametrize(
    "raw",
    [b"[" * 100_000, b'{"data": ' + b"[" * 900 + b"]" * 900 + b"}", b"\xff", b'{"data": [{"type": "bar", "[[]]": 1}]}'],
)
def test_what_is_no_figure_is_refused(raw, tmp_path):
    (tmp_path / "figure.json").write_bytes(raw)
    with pytest.raises(InputError, match="run the analysis again"):
        figures.read_figure(tmp_path / "figure.json")


def test_no_link_of_a_label_works():
    link = "<a href='http://evil.example'>more</a>"
    result = Result(
        method="m", quantity=link, unit=link, axes=(Axis.of("sentence", [link, "<A\thref=x>b</A>"]),), values=np.arange(2.0),
        null=Band.of(0.0, 0.5, (2,), link), numbers={"texts": [link, link]},
    )  # fmt: skip
    figure = figures.along(result)
    assert link in figure.to_dict()["layout"]["yaxis"]["title"]["text"]
    for shown in (str(figures.in_theme(figure, dark=True).to_dict()), figures.to_html(figure, with_library=False)):
        assert "<a" not in shown.lower() and "u003ca" not in shown.lower() and "evil.example" in shown


def test_a_kept_figure_is_read_as_it_was_written(tmp_path, probe):
    figure = figures.length_scores(probe)
    figures.write_figure(figure, tmp_path / "figure.json")
    assert figures.read_figure(tmp_path / "figure.json") == figure


def test_the_null_is_shaded_where_it_is_known_and_nowhere_between():
    low = np.array([0.1, 0.2, np.nan, 0.1, np.nan, 0.3, 0.3])
    result = Result(
        method="x", quantity="q", unit="1", axes=(Axis.of("bin", 7),), values=np.full(7, 0.5), null=Band.of(low, low + 0.2, (7,), "even"),
    )  # fmt: skip
    shades = [one for one in figures.along(result).data if one.legendgroup == "null"]
    assert [list(one.x) for one in shades[::2]] == [[0, 1], [2.75, 3.25], [5, 6]]
    assert all(np.isfinite(one.y).all() for one in shades) and sum(bool(one.showlegend) for one in shades) == 1
