"""A finding reads as a sentence, a table whose numbers carry their intervals, and the command that follows."""

import pytest

from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import Summary, in_hundredths, in_percent, in_words, shortest_range


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Estimate(value=0.5717, low=0.454, high=0.6566), "0.572 [0.454, 0.657]"),
        (Estimate(value=0.5, low=float("nan"), high=float("nan")), "0.5"),
        (352.8, "353"),
        (1234.5, "1234"),
        (7, "7"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_numbers_in_words(number, text):
    assert in_words(number) == text


def test_a_summary_is_plain_text_with_aligned_columns():
    summary = Summary(
        finding="The probe beats the text.",
        columns=("what", "Spearman"),
        rows=(("probe", "0.92"), ("bag of words", "0.32")),
        quotes=(("Wait, let me check.", "sentence 12"),),
        notes=("8 traces were cut off.",),
        next_command="reasonscope app runs/mine",
    )
    assert str(summary).splitlines() == [
        "The probe beats the text.",
        "",
        "what          Spearman",
        "probe         0.92",
        "bag of words  0.32",
        "",
        "sentence 12: Wait, let me check.",
        "8 traces were cut off.",
        "Next: reasonscope app runs/mine",
    ]


def test_changes_and_shares_in_words():
    change = Estimate(value=-0.2652, low=-0.3211, high=-0.2055)
    assert in_percent(change) == "−27 % [−32, −21]" and in_percent(-0.001) == "0 %" and in_percent(0.4) == "40 %"
    assert in_percent(float("nan")) == "–"
    assert in_hundredths(change, signed=True) == "−0.27 [−0.32, −0.21]"
    assert in_hundredths(0.825) == "0.83" and in_hundredths(float("nan")) == "–"
    assert in_hundredths(0.1, signed=True) == "+0.10" and in_hundredths(-0.001) == "0.00"
    assert shortest_range(["0.60", "0.80", "1.00"]) == "0.60 to 1.00" and shortest_range(["0.83", "0.83"]) == "0.83"
