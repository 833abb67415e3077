"""Signs of life: long work says what it does and how far it is. Nobody hears it until `listening` or `show_progress` is used."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

_T = TypeVar("_T")


@dataclass(kw_only=True, eq=False)
class Work:
    """Something that takes a while, and how far it is. Whoever does the work changes the fields; a listener reads them.

    Attributes:
        what: What is being done, such as "recording".
        unit: What is counted, such as "traces".
        total: How many there are; None if that is not known.
        done: How many are done.
        started_at: How many were done before the work began (by an earlier run).
        tokens: Tokens written so far.
        detail: The item in hand.
        share: The share of the work that is done, in [0, 1], if it is known more finely than `done / total`.
        at_most: `share` is a lower bound, so the time left is an upper one.
        shown_elsewhere: Another library draws its own bars for it on a terminal.
    """

    what: str
    unit: str = ""
    total: int | None = None
    done: int = 0
    started_at: int = 0
    tokens: int = 0
    detail: str = ""
    share: float | None = None
    at_most: bool = False
    shown_elsewhere: bool = False

    def advance(self, n: int = 1) -> None:
        """Count `n` more as done."""
        self.done += n

    @property
    def fraction(self) -> float | None:
        """The share of the work that is done; None if it is not known."""
        if self.share is not None:
            return self.share
        if not self.total or self.total <= self.started_at:
            return None
        return (self.done - self.started_at) / (self.total - self.started_at)


class Listener(Protocol):
    """Whoever shows the work: it learns when work begins and ends, and reads `Work` in between."""

    def begin(self, work: Work) -> None: ...

    def end(self, work: Work) -> None: ...

    def say(self, text: str) -> None: ...


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_open: ContextVar[tuple[Work, ...]] = ContextVar("open", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, `listener` hears of all work of this thread."""
    before = _listener.get()
    _listener.set(listener)
    try:
        yield
    finally:
        _listener.set(before)


@contextmanager
def working(
    what: str, *, total: int | None = None, unit: str = "", done: int = 0, shown_elsewhere: bool = False
) -> Iterator[Work]:
    """Work that lasts as long as the block. `done` of `total` were done before it began."""
    work = Work(what=what, unit=unit, total=total, done=done, started_at=done, shown_elsewhere=shown_elsewhere)
    listener = _listener.get()
    _open.set((*_open.get(), work))
    if listener is not None:
        listener.begin(work)
    try:
        yield work
    finally:
        # What began inside is over, too, although the generator that began it may be dropped later, or was already.
        opened = _open.get()
        if work in opened:
            _open.set(opened[: opened.index(work)])
        if listener is not None:
            listener.end(work)


def tracked(items: Sequence[_T], what: str, unit: str, *, name: Callable[[_T], str] | None = None) -> Iterator[_T]:
    """The items one by one; each counts as done once the next is asked for. `name` says which one is in hand."""
    with working(what, total=len(items), unit=unit) as work:
        for item in items:
            if name is not None:
                work.detail = name(item)
            yield item
            work.advance()


def counted(items: Iterable[_T], work: Work) -> Iterator[_T]:
    """The items one by one, each counted in `work` once the next is asked for."""
    for item in items:
        yield item
        work.advance()


def count_tokens(n: int) -> None:
    """Count `n` tokens as written, in all work that is open."""
    for work in _open.get():
        work.tokens += n


def say(text: str) -> None:
    """Tell the listener a line that stays."""
    if (listener := _listener.get()) is not None:
        listener.say(text)
