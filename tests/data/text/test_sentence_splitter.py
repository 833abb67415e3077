import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonscope.data.errors import InputError
from reasonscope.data.text.sentence_splitter import split_sentences

CASES = json.loads((Path(__file__).parents[2] / "golden" / "sentence_split.json").read_text())["cases"]


def chunks(solution, splitter):
    """The sentences between the first think tags, as the published code takes them, without their white space."""
    thinking = solution.split("<think>")[1].strip() if "<think>" in solution else solution
    thinking = thinking.split("</think>")[0].strip() if "</think>" in thinking else thinking
    return [without_blanks(thinking[span.slice]) for span in split_sentences(thinking, splitter)]


def without_blanks(text):
    return "".join(text.split())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_chunks(case):
    for splitter, expected in (("thought_anchors", "corrected"), ("thought_anchors_published", "reference")):
        assert chunks(case["inputs"]["text"], splitter) == [without_blanks(c) for c in case["expected"][expected]]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. Fu has 3.5 percent, i.e. 0.035 of it.", "Mrs. Lee has more, e.g. Two."],
        ["See Fig. 3 and Eq. 2 for this.", "No.", "It costs $5.", "Then $6.", "That is all."],
        ["It is no. 3 of them, or ex. 4 there.", "The fig.", "It fell."],
        ["Dr. Fu saw viz. two.", "It is (cf. 3) there.", "It was etc. then, etc.", "And so on."],
        ["So $x = 2. 5$ holds.", r"And \(a. b\) or \[c. D\] too.", "$$e. F$$ is last."],
        ["Run this: ```\nx = 1. \n\nprint(x). Done\n```", "Then `a. B` is next."],
        ["1. Add them.", "2. Divide by two.", "(a) Stop."],
        ["Where:", "- A is one", "- B is two.", "* C is three"],
        [r"that's 4! / (2! * 2!) = 6.", "Wow!", "And n! is large."],
        ["So... maybe it is.", "Well...", "Yes."],
        ['He said "stop."', "(See it.)", "**Final Answer**", "It is 4 **sure.**"],
        ["It is (roughly 4.)", "We use apples, pears, etc. in it.", "Pears etc.", "Then."],
        ["結果は二十五です。", "つまり二十五。"],
    ],
)
def test_default_keeps_sentences_whole(sentences):
    text = "\n\n".join(sentences)
    assert [text[s.slice] for s in split_sentences(text)] == sentences


def test_default_splits_inside_a_line():
    text = "Is it 7? Yes, it is 3.5 + 3.5. So the answer is 7.\n\nDone"
    assert [text[s.slice] for s in split_sentences(text)] == [
        "Is it 7?",
        "Yes, it is 3.5 + 3.5.",
        "So the answer is 7.",
        "Done",
    ]


@given(
    text=st.text(alphabet="ab.?! \n$`1)(\\[]-\r。", max_size=60),
    splitter=st.sampled_from(["default", "thought_anchors"]),
)
def test_spans_are_ordered_stripped_and_lose_nothing(text, splitter):
    spans = split_sentences(text, splitter)
    assert all(a.stop <= b.start for a, b in pairwise(spans))
    assert all(text[s.slice] == text[s.slice].strip() != "" for s in spans)
    assert "".join("".join(text[s.slice] for s in spans).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "piece", ["Mr. ", "e.g. ", "1. -. ", "3! = ", "... a ", "-- cf. ", ".", "\\[", "\\(", "a\\]\\[", ". ", "\n"]
)
def test_many_stops_in_a_sentence_are_read_in_one_pass(piece):
    text = piece * 20_000 + "a"
    for splitter in ("default", "thought_anchors"):
        spans = split_sentences(text, splitter)
        assert "".join(text[s.slice] for s in spans).replace(" ", "") == "".join(text.split())


def test_what_is_said_before_a_stop_that_goes_on_is_remembered():
    text = "1. -. -. Add. Mr. A. is: 1. so. iv. -. x."
    assert [text[s.slice] for s in split_sentences(text)] == ["1. -. -. Add.", "Mr. A.", "is: 1. so.", "iv. -. x."]


def test_an_unknown_splitter_is_refused():
    with pytest.raises(InputError, match="thought_anchors_published"):
        split_sentences("a", "other")


def test_published_chunks_come_out_again(real_traces):
    for path in sorted(real_traces.rglob("base_solution.json")):
        solution = json.loads(path.read_text())["solution"]
        published = json.loads((path.parent / "chunks_labeled.json").read_text())
        found = chunks(solution, "thought_anchors")
        assert found[: len(published)] == [without_blanks(row["chunk"]) for row in published]
