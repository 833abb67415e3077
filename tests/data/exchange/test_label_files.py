"""Files of labels: by trace or by problem, as CSV or JSONL, and every fault named with its line."""

import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.label_files import labels_of, read_labels
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem


def trace(id, problem):
    return trace_from_text(id=id, problem=Problem(id=problem, prompt="Q"), prompt="Q", completion="A")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,label\nq1/0,yes\nq2,no\nq3,\n"),
        ("a.csv", "\ufeffproblem,verdict\nq1/0,yes\nq2,no\n"),
        ("a.tsv", "trace_id\tlabel\tnote\nq1/0\tyes\tx\nq2\tno\ty\n"),
        (
            "a.jsonl",
            '{"trace": "q1/0", "label": "yes"}\n{"problem_id": "q2", "label": "no"}\n{"id": "q9", "label": null}\n',
        ),
    ],
)
def test_a_label_is_for_a_trace_or_for_all_samples_of_a_problem(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    labels = read_labels(tmp_path / name)
    assert labels == {"q1/0": "yes", "q2": "no"}
    assert labels_of(labels, [trace("q1/0", "q1"), trace("q1/1", "q1"), trace("q2/0", "q2"), trace("q2/1", "q2")]) == [
        "yes", None, "no", "no",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,label\nq,yes\nq,no\n", "line 3: 'q' is 'no' here and 'yes' before"),
        ("a.csv", "name,label\nq,yes\n", "line 2: names no trace or problem"),
        ("a.csv", "id,one,two\nq,1,2\n", "call the one with the labels `label`"),
        ("a.csv", "id,label\n", "has no labels"),
        ("a.jsonl", "[1]\n", "line 1: must be an object"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
        ("absent.csv", None, "cannot be read as CSV"),
    ],
)
def test_a_fault_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / name)


def test_labels_of_another_run_are_an_error_that_shows_ids():
    with pytest.raises(InputError, match=r"'other'.*ids look like 'q1/0' and 'q1'"):
        labels_of({"other": 1}, [trace("q1/0", "q1")])
