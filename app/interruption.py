"""Ctrl-C and SIGTERM: what was kept, and how to go on, in one line."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from reasonscope.data.errors import ReasonscopeError

NOTHING_KEPT = "no result was kept; run the same command again to start over."


@contextmanager
def keeping(describe: Callable[[], str]) -> Iterator[None]:
    """If the block is interrupted, `describe` says what is kept of its work and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not getattr(interrupt, "__notes__", ()):
            try:
                interrupt.add_note(describe())
            except (ReasonscopeError, OSError):  # there is nothing yet that could be read
                interrupt.add_note(NOTHING_KEPT)
        raise


def interruption_line(interrupt: KeyboardInterrupt) -> str:
    """The line that an interrupted command leaves on standard error."""
    notes = getattr(interrupt, "__notes__", ())
    # The terminal has written ^C at the beginning of the line.
    start = "\r" if sys.stderr.isatty() else ""
    return f"{start}Interrupted: {notes[0] if notes else NOTHING_KEPT}"


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside the block, SIGTERM does what Ctrl-C does: a batch system that ends a job sends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
