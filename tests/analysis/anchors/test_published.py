"""Published importances are read unchanged, recomputed, and written in the published layout."""

import json

import numpy as np
import pytest

from reasonscope.analysis.anchors.published import (
    _effect_matrix,
    _recomputed_resampling_accuracy,
    published_dependencies,
    published_importances,
    with_importances,
)
from reasonscope.analysis.results import Axis, Result
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.export import export_thought_anchors
from reasonscope.data.exchange.importers import import_thought_anchors
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Problem

THINKING = "First I read the problem. Then I add three and four. So the sum is seven."


def trace(**meta):
    return trace_from_text(
        id="a/0",
        problem=Problem(id="a", prompt="Add 3 and 4.", answer="7"),
        prompt="Add 3 and 4.\n<think>\n",
        completion=f"{THINKING}\n</think>\n\n\\boxed{{7}}",
        tokenizer=None,
        meta=meta,
    )


def chunk(i, accuracy, **more):
    return {"chunk": f"s{i}", "chunk_idx": i, "function_tags": ["unknown"], "accuracy": accuracy, **more}


def test_resampling_accuracy_is_the_step_of_the_accuracies():
    chunks = [chunk(0, 0.5), chunk(1, 0.75), chunk(3, 0.25), chunk(4, None)]
    np.testing.assert_allclose(_recomputed_resampling_accuracy(chunks), [0.25, 0, np.nan, 0])
    np.testing.assert_allclose(
        _recomputed_resampling_accuracy([chunk(0, 0.5), chunk(0, 0.25), chunk(1, 1.0)]), [0.5, 0.75, 0]
    )
    assert published_dependencies([{"depends_on": ["0"]}, {"depends_on": ["0", "x", "²", "5"]}, {}]) == [[], [0], []]


def test_the_published_numbers_equal_the_recomputed(real_traces):
    equal = total = 0
    for found in map(published_importances, import_thought_anchors(real_traces)):
        equal += found.numbers["recomputed_equal"] * found.numbers["recomputed_of"]
        total += found.numbers["recomputed_of"]
        assert found.arrays["effects"].shape == (len(found.axis("sentence")),) * 2
        assert 0.4 < found.numbers["dependencies"]["auroc"] < 1
    assert total > 500 and equal / total >= 0.99


def test_a_trace_without_chunks_is_undefined_and_a_wrong_index_refused():
    found = published_importances(trace())
    assert not found.measured and "no importances" in found.reason
    with pytest.raises(InputError, match="of 2"):
        _effect_matrix([{"source_chunk_idx": 0, "target_impacts": [{"target_chunk_idx": 2, "importance_score": 1}]}], 2)


@pytest.mark.parametrize(
    "effects",
    [
        {"a": 1},
        [1],
        [{"source_chunk_idx": 0}],
        [{"source_chunk_idx": "x", "target_impacts": []}],
        [{"source_chunk_idx": 0, "target_impacts": [{"target_chunk_idx": 1}]}],
    ],
)
def test_effects_in_another_layout_are_refused(effects):
    with pytest.raises(InputError, match="step_importance is damaged"):
        _effect_matrix(effects, 2)


@pytest.mark.parametrize(
    "chunks", [7, [7], [{"chunk": "a"}], [chunk(0, 0.5, depends_on=3)], [{**chunk(0, 0.5), "chunk_idx": None}]]
)
def test_sentences_in_another_layout_are_refused(chunks):
    with pytest.raises(InputError, match="published with trace 'a/0' is damaged"):
        published_importances(trace(chunks=chunks))


def test_our_importances_leave_and_come_back_in_the_published_layout(tmp_path):
    known = sentences(trace())
    effects = np.full((3, 3), np.nan)
    effects[2, 1] = 0.4
    result = Result(
        method="anchors",
        quantity="importance",
        unit="1",
        axes=(Axis.of("metric", ("accuracy", "resampling_accuracy", "forced_kl")), Axis.of("sentence", 3)),
        values=np.array([[0.5, 0.6, 0.9], [0.1, 0.3, np.nan], [0.0, 1.0, 2.0]]),
        reason="the last sentence has none",
        arrays={"effects": effects},
    )
    assert export_thought_anchors([with_importances(trace(), known, result)], tmp_path) == 1
    written = json.loads((tmp_path / "a" / "0" / "chunks_labeled.json").read_text())
    assert [row["resampling_importance_accuracy"] for row in written] == [0.1, 0.3, None]
    (back,) = import_thought_anchors(tmp_path)
    found = published_importances(back)
    np.testing.assert_allclose(found.at(metric="accuracy"), [0.5, 0.6, 0.9])
    assert found.arrays["effects"][2, 1] == 0.4 and found.numbers["recomputed_of"] == 2
