"""Views of results: effects of a source, blocks of tokens, paired runs; each against a case computed by hand."""

import numpy as np
import pytest

from reasonscope.analysis import figures
from reasonscope.analysis.anchors.importance import Rollout, resampled_sentences
from reasonscope.analysis.attention.reading import mean_effect, token_block
from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.analysis.traces.run_difference import paired_difference
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span


def test_the_effect_of_a_source_is_the_mean_over_its_targets():
    effects = np.array([[np.nan, np.nan, np.nan], [1.0, np.nan, np.nan], [3.0, -2.0, np.nan]])
    np.testing.assert_array_equal(mean_effect(effects), [2.0, -2.0, np.nan])


def test_a_block_holds_the_kept_keys_and_nothing_else():
    key = np.array([[3, 1], [4, 2], [5, 3]], dtype=np.uint16)
    weight = np.array([[0.5, 0.25], [0.75, 0.0], [1.0, 0.0]], dtype=np.float16)
    block = token_block(key, weight, first=3, targets=Span(3, 5), sources=Span(1, 4))
    np.testing.assert_array_equal(block, [[0.25, np.nan, 0.5], [np.nan, np.nan, np.nan]])
    with pytest.raises(InputError, match="3 to 6"):
        token_block(key, weight, first=3, targets=Span(2, 5), sources=Span(1, 4))


def test_runs_are_paired_by_problem():
    ours, pairs = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0] * 3), [i // 2 for i in range(24)]
    found = paired_difference(ours, np.zeros(24), [str(pair) for pair in pairs], verdicts=True)
    assert found.difference == pytest.approx(7 / 8) and found.n == 24 and found.n_groups == 12
    assert 0.5 < found.interval[0] <= found.difference <= found.interval[1] <= 1
    assert found.chance[0] < 0 < found.chance[1] <= found.difference
    same = paired_difference(ours[:8], ours[:8], list("aabbccdd"), verdicts=True)
    assert same.interval[0] < 0 < same.interval[1] and same.chance == (0, 0), (
        "four problems that agree do not prove that all do"
    )
    assert np.isnan(paired_difference(ours[:8], np.zeros(8), ["a"] * 8).interval).all()
    with pytest.raises(InputError, match="at least one"):
        paired_difference(np.zeros(0), np.zeros(0), [])


def test_what_was_written_instead_is_counted_and_judged():
    written = ["So 7.", "So  8.", "So 8.", "No.", ""]
    answers = [None if text == "No." else "7" for text in written]
    rollouts = [
        Rollout(answer=answer, correct=None if answer is None else text == "So 8.", resampled=text)
        for text, answer in zip(written, answers, strict=True)
    ]
    most, other = resampled_sentences("So 7. ", rollouts)
    assert (most["text"], most["n"], most["of"], most["right"], most["judged"]) == ("So 8.", 2, 5, 0.5, 2)
    assert most["ci"][0] < 0.5 < most["ci"][1]
    assert (other["text"], other["right"], other["ci"]) == ("No.", None, None)


def test_arms_stand_beside_the_null_and_cells_can_be_clicked():
    values = np.array([[0.5, 0.1], [0.9, 0.2]])
    result = Result(
        method="cliff",
        quantity="share of answers",
        unit="1",
        axes=(Axis.of("arm", ["untouched", "ablated"]), Axis.of("metric", ["harmful refused", "accuracy"])),
        values=values,
        null=Band.of(0.4, 0.6, values.shape, "random heads"),
        interval=Band.of(values - 0.1, values + 0.1, values.shape, "bootstrap"),
    )
    (figure,) = figures.of_result(result).values()
    drawn = {curve.name: curve for curve in figure.data if curve.name}
    assert list(drawn["ablated"].y) == [0.9, 0.2] and drawn["ablated"].error_y.array is not None
    assert max(drawn["random heads"].y) == 0.6
    figure = figures.square_map(
        np.array([[np.nan, 0.0], [0.5, 0.1]]), title="<b>", measure="attention", rows="r", columns="c",
        names=(["a", "b"], ["<i>", "d"]), clickable=True,
    )  # fmt: skip
    assert sorted(zip(figure.data[1].x, figure.data[1].y, strict=True)) == [(0, 1), (1, 1)]
    assert figure.layout.title.text == "&lt;b&gt;" and figure.layout.xaxis.ticktext[0] == "&lt;i&gt;"
    assert figure.data[0].customdata[1][0] == "b → &lt;i&gt;"


def test_another_line_stands_beside_a_measured_one():
    result = Result(
        method="mi", quantity="MI", unit="1", axes=(Axis.of("site", ["a", "b"]), Axis.of("token", 3)),
        values=np.arange(6.0).reshape(2, 3), null_missing="made up",
    )  # fmt: skip
    figure = figures.along(result, only=["b"], beside={"base": np.array([1.0, 2.0, 3.0])})
    assert [curve.name for curve in figure.data] == ["measured", "base"] and list(figure.data[1].y) == [1, 2, 3]
