"""Shows work on standard error: bars on a terminal, and a plain line every ten seconds anywhere else."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from reasonscope.data.progress import Listener, Work, listening

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

_LINE_SECONDS = 10.0  # between two plain lines
PATIENCE = 2.0  # work that takes less than this is not mentioned
_BAR_SECONDS = 0.25  # between two drawings of the bars
_LEVELS = 3  # of work inside work


@contextmanager
def show_progress() -> Iterator[None]:
    """Show what takes a while on standard error, for as long as the block lasts.

    On a terminal there are bars with rate and time left; anywhere else a plain line every ten seconds. Standard output is left alone.

    Example:
        with rs.show_progress():
            store = rs.record(model, problems, "runs/mine", sampling=rs.Sampling())
    """
    terminal = sys.stderr.isatty() and _draws()
    shown: _Bars | _Lines = _Bars() if terminal else _Lines(sys.stderr)
    stop = threading.Event()
    period = _BAR_SECONDS if terminal else 1.0

    def refresh() -> None:
        with suppress(OSError, ValueError):  # nobody reads standard error any more
            while not stop.wait(period):
                shown.refresh()

    # A thread of its own, so that a single long step is not silent either.
    thread = threading.Thread(target=refresh, name="progress", daemon=True)
    thread.start()
    try:
        with listening(shown):
            yield
    finally:
        stop.set()
        thread.join()
        shown.close()


def _draws() -> bool:
    from rich.console import Console

    return not Console(stderr=True).is_dumb_terminal


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """Work with the time at which it began, in seconds of the listener's clock."""

    work: Work
    at: float


def _shown(begun: Sequence[_Begun]) -> list[_Begun]:
    """The outermost work, and the innermost: at most `_LEVELS` in all."""
    return [*begun[:1], *begun[1:][1 - _LEVELS :]]


class _Lines(Listener):
    """Writes one line every `_LINE_SECONDS`, and a last one when work that took `PATIENCE` or more has ended."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._lock = threading.Lock()
        self._begun: list[_Begun] = []
        self._written_at = clock()

    def begin(self, work: Work) -> None:
        with self._lock:
            if not self._begun:
                self._written_at = max(self._written_at, self._clock())
            self._begun.append(_Begun(work=work, at=self._clock()))

    def end(self, work: Work) -> None:
        with self._lock:
            last = _remove(self._begun, work)
            if last is not None and not self._begun and self._clock() - last.at >= PATIENCE:
                self._write(_summary_line(work, self._clock() - last.at))

    def say(self, text: str) -> None:
        with self._lock:
            self._write(text)

    def refresh(self) -> None:
        """Write a line if the last one was written long enough ago."""
        with self._lock:
            if self._begun and self._clock() - self._written_at >= _LINE_SECONDS:
                self._write("; ".join(line for _, line in _progress_lines(self._begun, self._clock())))

    def close(self) -> None:
        """Forget what has not ended: after an error, a generator may end its work much later."""
        with self._lock:
            self._begun.clear()

    def _write(self, line: str) -> None:
        self._written_at = self._clock()
        print(line, file=self._out, flush=True)


class _Bars(Listener):
    """Draws a bar for each work that is open, below what is printed meanwhile."""

    def __init__(self, console: "Console | None" = None, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True, soft_wrap=False)
        self._clock = clock
        self._lock = threading.RLock()
        self._begun: list[_Begun] = []
        self._live: Live | None = None

    def begin(self, work: Work) -> None:
        with self._lock:
            self._begun.append(_Begun(work=work, at=self._clock()))
            if work.shown_elsewhere:
                self._hide()

    def end(self, work: Work) -> None:
        with self._lock:
            last = _remove(self._begun, work)
            if self._begun or last is None:
                return
            self._hide()
            if self._clock() - last.at >= PATIENCE:
                self.say(_summary_line(work, self._clock() - last.at))

    def say(self, text: str) -> None:
        with self._lock:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """Draw the bars, once the outermost work has gone on for a while."""
        from rich.live import Live

        with self._lock:
            if not self._begun or any(one.work.shown_elsewhere for one in self._begun):
                return
            if self._live is None:
                if self._clock() - self._begun[0].at < PATIENCE / 2:
                    return
                # What is printed to a terminal has to go through the live display, and what is piped must not.
                self._live = Live(
                    console=self._console,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=sys.stdout.isatty(),
                )
                self._live.start()
            self._live.update(self._drawn(), refresh=True)

    def close(self) -> None:
        """Take the bars away, and forget what has not ended."""
        with self._lock:
            self._begun.clear()
            self._hide()

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _drawn(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid(padding=(0, 1))
        now = self._clock()
        for work, line in _progress_lines(self._begun, now):
            fraction = work.fraction
            bar = ProgressBar(
                total=1.0, completed=fraction or 0.0, width=20, pulse=fraction is None, animation_time=now
            )
            rows.add_row(bar, Text(line, overflow="ellipsis", no_wrap=True))
        return rows


def _progress_lines(begun: Sequence[_Begun], now: float) -> list[tuple[Work, str]]:
    """The works to show, each with its line. Tokens and the time so far are those of the outermost, and a name is not said twice."""
    outer, *inner = _shown(begun)
    found = [(outer.work, _progress_line(outer.work, now - outer.at))]
    for one in inner:
        line = _progress_line(one.work, now - one.at, inside=True)
        others = (other.work for other in (outer, *inner) if other is not one)
        if not any(line in (work.what, work.detail) for work in others):
            found.append((one.work, line))
    return found


def _progress_line(work: Work, seconds: float, *, inside: bool = False) -> str:
    """How far work is that began `seconds` ago, as in `recording: 12 of 32 traces, 214 tokens/s, about 2 min left`.

    Of work `inside` other work, which tells the tokens and the time, only its name, its count and the time left.
    """
    said = [_count(work), *([] if inside else _tokens(work, seconds))]
    fraction = work.fraction
    if fraction is not None and 0 < fraction < 1 and seconds >= 1:
        left = seconds * (1 - fraction) / fraction
        said.append(f"{'at most' if work.at_most else 'about'} {spoken_time(left)} left")
    elif not work.done and not inside:
        said.append(f"{spoken_time(seconds)} so far")
    return ": ".join(part for part in (work.what, ", ".join(part for part in said if part)) if part)


def _summary_line(work: Work, seconds: float) -> str:
    """What work did that is over, as in `recording: 32 of 32 traces, 214 tokens/s, 2 min`."""
    said = [_count(work, finished=True), *_tokens(work, seconds), spoken_time(seconds)]
    return f"{work.what}: {', '.join(part for part in said if part)}"


def _count(work: Work, *, finished: bool = False) -> str:
    # Of a single item there is nothing to count.
    counted = "" if work.total is None or work.total == 1 else f"{work.done:,} of {work.total:,} {work.unit}"
    if finished or not work.detail:
        return counted
    return f"{counted} ({work.detail})" if counted else work.detail


def _tokens(work: Work, seconds: float) -> list[str]:
    if seconds <= 0 or work.tokens / seconds < 1:  # work that is not about writing
        return []
    return [f"{work.tokens:,} tokens", f"{work.tokens / seconds:,.0f} tokens/s"]


def spoken_time(seconds: float) -> str:
    """A length of time as one says it: 40 s, 3 min, 2 h 10 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _remove(begun: list[_Begun], work: Work) -> _Begun | None:
    found = next((one for one in begun if one.work is work), None)
    if found is not None:
        del begun[begun.index(found) :]  # what began inside is over, too
    return found
