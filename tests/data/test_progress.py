"""Signs of life: what work says about itself, one plain line every ten seconds, and silence if nobody listens."""

import io
from contextlib import contextmanager

import pytest
from rich.console import Console

from reasonscope.data.progress import Work, count_tokens, counted, listening, say, tracked, working
from reasonscope.data.terminal_progress import _Bars, _Lines, _progress_line, _summary_line, show_progress, spoken_time


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@contextmanager
def heard():
    """Inside, work is written as lines: the clock, the listener, and what it wrote."""
    clock, out = Clock(), io.StringIO()
    lines = _Lines(out, clock)
    with listening(lines):
        yield clock, lines, out


def pass_seconds(clock, lines, seconds):
    """Let time pass as the thread that refreshes sees it."""
    for _ in range(seconds):
        clock.now += 1
        lines.refresh()


def test_work_is_silent_if_nobody_listens(capsys):
    with working("recording", total=2, unit="traces") as work:
        say("a line")
        work.advance()
    assert capsys.readouterr() == ("", "")


def test_one_line_every_ten_seconds_and_a_last_one():
    with heard() as (clock, lines, out), working("recording", total=32, unit="traces") as work:
        pass_seconds(clock, lines, 9)
        assert out.getvalue() == ""
        work.done, work.tokens = 8, 2140
        pass_seconds(clock, lines, 1)
        assert out.getvalue() == "recording: 8 of 32 traces, 2,140 tokens, 214 tokens/s, about 30 s left\n"
        pass_seconds(clock, lines, 9)
        assert out.getvalue().count("\n") == 1
        work.done, work.tokens = 32, 4000
        pass_seconds(clock, lines, 1)
    assert out.getvalue().splitlines()[1:] == [
        "recording: 32 of 32 traces, 4,000 tokens, 200 tokens/s",
        "recording: 32 of 32 traces, 4,000 tokens, 200 tokens/s, 20 s",
    ]


def test_what_takes_less_than_two_seconds_is_not_mentioned():
    with heard() as (clock, lines, out):
        for seconds in (0, 1):
            with working("reading"):
                pass_seconds(clock, lines, seconds)
        assert out.getvalue() == ""
        with working("reading"):
            pass_seconds(clock, lines, 2)
        assert out.getvalue() == "reading: 2 s\n"


def test_a_single_long_step_is_not_silent():
    with heard() as (clock, lines, out), working("loading tiny"):
        pass_seconds(clock, lines, 25)
        assert out.getvalue().splitlines() == ["loading tiny: 10 s so far", "loading tiny: 20 s so far"]


def test_work_inside_work_is_one_line():
    with heard() as (clock, lines, out):
        for trace in tracked(["a/0", "b/0"], "heads", "traces", name=str):
            with working("without each head", total=4, unit="heads") as inner:
                pass_seconds(clock, lines, 5)
                inner.advance()
                pass_seconds(clock, lines, 5)
            assert trace in out.getvalue()
    assert out.getvalue().splitlines() == [
        "heads: 0 of 2 traces (a/0), 10 s so far; without each head: 1 of 4 heads, about 30 s left",
        "heads: 1 of 2 traces (b/0), about 20 s left; without each head: 1 of 4 heads, about 30 s left",
        "heads: 2 of 2 traces, 20 s",
    ]


def test_tokens_are_counted_in_all_work_that_is_open():
    with working("outer") as outer:
        count_tokens(1)
        with working("inner") as inner:
            count_tokens(4)
        count_tokens(2)
    count_tokens(8)
    assert (outer.tokens, inner.tokens) == (7, 4)


def test_the_time_left_counts_what_this_run_has_done():
    work = Work(what="recording", unit="traces", total=240, done=96, started_at=96)
    assert work.fraction == 0
    work.advance(36)
    assert _progress_line(work, 60) == "recording: 132 of 240 traces, about 3 min left"


def test_a_lower_bound_of_what_is_done_is_an_upper_bound_of_what_is_left():
    work = Work(what="recording", unit="traces", total=4, share=0.5, at_most=True, tokens=50)
    assert _progress_line(work, 10) == "recording: 0 of 4 traces, 50 tokens, 5 tokens/s, at most 10 s left"
    assert _summary_line(work, 10) == "recording: 0 of 4 traces, 50 tokens, 5 tokens/s, 10 s"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7800, "2 h 10 min")])
def test_times_are_as_one_says_them(seconds, said):
    assert spoken_time(seconds) == said


def test_what_is_said_stays_and_counts_as_a_line():
    with heard() as (clock, lines, out), working("verifying", total=3, unit="checks") as work:
        pass_seconds(clock, lines, 8)
        for _ in counted(range(2), work):
            say("batch: passed")
        pass_seconds(clock, lines, 9)
        assert out.getvalue() == "batch: passed\nbatch: passed\n"


def test_work_ends_with_an_error():
    with heard() as (clock, lines, out):
        with pytest.raises(KeyError), working("outer"), working("inner"):
            pass_seconds(clock, lines, 3)
            raise KeyError
        pass_seconds(clock, lines, 20)
    assert out.getvalue() == "outer: 3 s\n"


def test_a_generator_that_is_dropped_late_ends_nothing_else(capsys):
    clock, out = Clock(), io.StringIO()
    lines = _Lines(out, clock)
    with listening(lines):
        with working("outer"):
            items = iter(tracked([1, 2], "inner", "items"))
            next(items)
            pass_seconds(clock, lines, 3)
        with working("next") as later:
            items.close()
            count_tokens(5)
            pass_seconds(clock, lines, 3)
        assert later.tokens == 5
        left = iter(tracked([1, 2], "left", "items"))
        next(left)
        clock.now += 5
    lines.close()
    left.close()
    assert out.getvalue().splitlines() == ["outer: 3 s", "next: 5 tokens, 2 tokens/s, 3 s"]


def test_bars_are_drawn_after_a_moment_and_taken_away():
    clock, out = Clock(), io.StringIO()
    bars = _Bars(Console(file=out, force_terminal=True, width=100), clock)
    with listening(bars), working("recording", total=4, unit="traces") as work:
        bars.refresh()
        assert out.getvalue() == ""
        clock.now += 5
        work.advance()
        bars.refresh()
        assert "recording: 1 of 4 traces, about 15 s left" in out.getvalue()
        assert "━" in out.getvalue()
        with working("loading", shown_elsewhere=True):
            drawn = out.getvalue()
            bars.refresh()
            assert out.getvalue() == drawn
    assert out.getvalue().endswith("recording: 1 of 4 traces, 5 s\n")


def test_nothing_is_written_to_standard_output(capsys, monkeypatch):
    monkeypatch.setattr("reasonscope.data.terminal_progress.PATIENCE", 0.0)
    with show_progress(), working("reading", total=3, unit="files"):
        say("a line")
    assert capsys.readouterr() == ("", "a line\nreading: 0 of 3 files, 0 s\n")


def test_deep_work_shows_the_outermost_and_what_is_in_hand():
    """A study says which text it reads, though four kinds of work are open."""
    with heard() as (clock, lines, out):
        levels = working("study"), working("sweeping"), working("steering")
        with levels[0], levels[1], levels[2], working("reading again", total=96, unit="texts") as work:
            work.done = 24
            pass_seconds(clock, lines, 10)
        told = out.getvalue().splitlines()[0]
    assert told == "study: 10 s so far; steering; reading again: 24 of 96 texts, about 30 s left"


def test_each_fact_is_said_once():
    """A step of a study, its analysis and its loop have one name, and write the same tokens."""
    with heard() as (clock, lines, out):
        with working("study") as study, working("anchors"), working("anchors", total=6, unit="traces") as loop:
            study.detail, loop.detail = "anchors", "test-104/0"
            count_tokens(640)
            pass_seconds(clock, lines, 10)
        told = out.getvalue().splitlines()[0]
    assert told == "study: anchors, 640 tokens, 64 tokens/s, 10 s so far; anchors: 0 of 6 traces (test-104/0)"
