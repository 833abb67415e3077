import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonscope.data.grading import grader
from reasonscope.data.text.answers import equivalent, extract_answer, judge


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{a} and \boxed{b{c}}", "b{c}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 5. Then 7", "5"),
        (r"It is 4 or \boxed{5", "5"),  # an unclosed box is no box: the last number counts
        ("The answer is 6.17%. Bye 3", "6.17%"),
        ("**Final Answer**\nThe answer is: **42**.", "42"),
        ("Answer: $\\frac{1}{2}$", r"\frac{1}{2}"),
        ("The final answer is 42.<|im_end|>", "42"),
        ("48 / 2 = 24\n#### 1,024", "1,024"),
        ("it is 3, then 1,234.5", "1,234.5"),
        ("Of 4 it is the second. The correct option is (B).", "(B)"),
        ("I'm sorry, but I can't help with that.", None),
        ("", None),
    ],
)
def test_extract(text, expected):
    assert extract_answer(text) == expected


SAME = [
    ("7", "7.0"), ("1,234", "1234"), ("$18", "18"), ("50%", r"50\%"), (r"\frac{1}{2}", "0.5"), (r"\frac12", "1/2"),
    (r"\dfrac{3}{4}", r"\frac34"), ("x=5", "5"), ("(1,2)", "(1, 2)"), (r"\sqrt{8}", r"2\sqrt{2}"), ("Evelyn", r"\text{Evelyn}"),
    (r"\text{(C)}", "C"), (r"\boxed{5}", "5"), ("x^2+2x+1", "(x+1)^2"), (r"\{1,2\}", r"\{2,1\}"), (r"90^\circ", "90"),
    ("-3.50", "-7/2"), ("5.", "5"), (r"\infty", r"+\infty"), ("9^9^9^9", "9^9^9^9"), ("5!", "120"),
    (r"x^2\!+1", "1+x^2"), ("{Evelyn}", "Evelyn"),
]  # fmt: skip
DIFFERENT = [
    ("7", "8"), ("-3", "3"), ("(2,1)", "(1,2)"), ("blah", "7"), ("", ""), ("", "7"), (None, "7"), ("1/0", "3"), ("0.333333", "1/3"),
    (r"\frac{", "3"), ("(((((", "1"), ("{" * 500, "3"), ("\x00", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("given_", "gold"), SAME)
def test_equal_answers(given_, gold):
    assert equivalent(given_, gold)


def test_long_answers_are_the_same_but_for_their_decoration():
    """They are too long for math-verify, so what is taken off is all that makes them the same."""
    long = "word" * 100
    for decorated, plain in (
        ("{%s}", "%s"),
        (r"%s\%%", "%s%%"),
        (r"\dfrac%s", r"\frac%s"),
        (r"\tfrac %s.", r"\frac%s"),
        (r"\boxed{%s}", "%s"),
    ):
        assert equivalent(decorated % long, plain % long), decorated
    assert not equivalent(long + "a", long + "b") and not equivalent("{" + long + "}{a}", long + "}{a")


@pytest.mark.parametrize(("given_", "gold"), DIFFERENT)
def test_different_answers(given_, gold):
    assert not equivalent(given_, gold)


@pytest.mark.parametrize(
    "tower",
    [
        "9^9^9^9^9",
        "10^{10^{10}}",
        "1000000!",
        "2^{1000000}",
        "3!!!!",
        "(9999)!",
        "{3^{99}}!",
        "2^{99!}",
        "(99!)!",
        "x!^{9}",
        "9**9**9**9",
    ],
)
def test_what_would_take_for_ever_does_not(tower):
    start = time.process_time()
    assert not judge(tower, "3") and not equivalent(tower, "3")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("piece", [r"\boxed{", r"\boxed{}{", r"\fboxed {\{", r"\boxed ."])
def test_many_boxes_are_read_in_one_pass(piece):
    assert extract_answer(piece * 100_000) in (None, "")


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="0123456789abx\\{}()[]^_+-*/=,.$% fracsqrtboxed\n", max_size=25))
def test_garbage_never_raises(text):
    assert judge(text, "17") in (True, False, None)
    assert extract_answer(text) is None or isinstance(extract_answer(text), str)


def test_it_works_outside_the_main_thread(caplog):
    found = []
    thread = threading.Thread(target=lambda: found.append(equivalent(r"\frac{2}{4}", r"\frac{1}{2}x/x")))
    thread.start()
    thread.join()
    assert len(found) == 1 and not caplog.records


@pytest.mark.parametrize("answer", [r"\binom{1000000}{500000}", r"\sum_{k=1}^{3000000} \frac{1}{k^2}"])
def test_mathematics_that_takes_too_long_is_not_decided(answer):
    start = time.monotonic()
    assert judge(answer, "3") is None and not equivalent(answer, "3")
    assert time.monotonic() - start < 20  # the limits of the worker, and its start on a busy machine
    assert judge("x^2+2x+1", "(x+1)^2") is True  # by the next worker


def test_easy_answers_start_no_process(monkeypatch):
    monkeypatch.setattr(grader, "_running", lambda: pytest.fail("a process for an easy answer"))
    for given_, gold in (("7", "7.0"), ("1,234", "1234"), ("Evelyn", r"\text{Evelyn}"), (None, "x"), ("", "x")):
        assert judge(given_, gold) in (True, False)
    assert judge("9^9^9^9", "3") is None


def test_one_worker_compares_all():
    assert judge("a+b", "b+a") is True
    first = grader._worker.pid
    assert judge("a+c", "c+a") is True and judge("a+c", "c") is False
    assert grader._worker.pid == first


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="only Linux tells the limits of a process")
def test_the_worker_has_a_limit_of_memory():
    assert judge("a+g", "g+a") is True
    limits = Path(f"/proc/{grader._worker.pid}/limits").read_text(encoding="utf-8")
    (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(2 * 2**30)


def test_a_worker_that_was_killed_is_replaced():
    assert judge("a+d", "d+a") is True
    grader._worker.kill()
    grader._worker.wait()
    assert judge("a+e", "e+a") is True


def test_without_a_process_nothing_is_decided_and_nothing_raised(monkeypatch):
    grader._stop_worker()
    monkeypatch.setattr(grader.sys, "executable", "/no/such/python")
    assert judge("a+f", "f+a") is None and not equivalent("a+f", "f+a")
    grader.same_mathematics.cache_clear()


def test_a_choice_is_the_same_with_and_without_parentheses():
    assert equivalent("(B)", "B")
    assert not equivalent("(B)", "A")


def test_a_choice_is_the_same_with_and_without_its_brackets():
    assert equivalent("(b)", "b") and equivalent("B", "(b)") and not equivalent("(b)", "c")
