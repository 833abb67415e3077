"""Reads thinking in the organism's language: the true label, truth and dependencies of every sentence.

Works on text by the grammar and by a model. A sentence outside the language has no form and no truth.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from reasonscope.data.organism.forms import recognise
from reasonscope.data.organism.ledger import Ledger, Operation
from reasonscope.data.organism.requests import Request
from reasonscope.data.trace import Span, StepKind

_REFLECTION = {"doubt", "check", "recheck"}
_SIGNS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, a: left + a,
    "-": lambda left, a: left - a,
    "*": lambda left, a: left * a,
}


@dataclass(frozen=True, kw_only=True)
class SentenceTruth:
    """What is true of one sentence.

    Attributes:
        chars: Its span in the thinking.
        step: Its paragraph.
        kind: Its act (see `forms`); None outside the language.
        tag: Its function.
        right: Whether its claim holds; None if it claims nothing.
        depends_on: The earlier sentences whose values or lines it uses.
        operation: The needed operation (from 0) that it computes, checks or restates.
        value: The balance that it states.
    """

    chars: Span
    step: int
    kind: str | None = None
    tag: str | None = None
    right: bool | None = None
    depends_on: tuple[int, ...] = ()
    operation: int | None = None
    value: int | None = None


@dataclass(frozen=True, kw_only=True)
class _StepTruth:
    """What is true of one paragraph: its span in the thinking, SEAL's class, and whether all its claims hold."""

    chars: Span
    kind: StepKind
    right: bool


def read_ledger(ledger: Ledger, thinking: str) -> list[SentenceTruth]:
    """The truth of each sentence of the thinking about a ledger problem, in order."""
    reading = _LedgerReading(ledger)
    return [_truth(reading, index, chars, step, thinking) for index, (chars, step) in enumerate(_sentences(thinking))]


def read_request(request: Request, thinking: str) -> list[SentenceTruth]:
    """The truth of each sentence of the thinking about a request, in order."""
    reading = _RequestReading(request)
    return [_truth(reading, index, chars, step, thinking) for index, (chars, step) in enumerate(_sentences(thinking))]


def read_steps(thinking: str, sentences: list[SentenceTruth]) -> list[_StepTruth]:
    """The truth of each paragraph, from that of its sentences."""
    steps = []
    for index, chars in enumerate(_paragraphs(thinking)):
        inside = [sentence for sentence in sentences if sentence.step == index]
        kinds = {sentence.kind for sentence in inside}
        kind: StepKind = "reflection" if kinds & _REFLECTION else "transition" if "split_plan" in kinds else "execution"
        steps.append(_StepTruth(chars=chars, kind=kind, right=all(sentence.right is not False for sentence in inside)))
    return steps


def _paragraphs(thinking: str) -> list[Span]:
    return [Span(*match.span()) for match in re.finditer(r"\S(?:(?!\n\n).)*", thinking, flags=re.DOTALL)]


def _sentences(thinking: str) -> list[tuple[Span, int]]:
    return [
        (Span(paragraph.start + match.start(), paragraph.start + match.end()), step)
        for step, paragraph in enumerate(_paragraphs(thinking))
        for match in re.finditer(r"\S.*?(?:[.?!](?=\s)|$)", thinking[paragraph.slice].rstrip(), flags=re.DOTALL)
    ]


def _truth(
    reading: "_LedgerReading | _RequestReading", index: int, chars: Span, step: int, thinking: str
) -> SentenceTruth:
    found = recognise(thinking[chars.slice])
    if found is None:
        return SentenceTruth(chars=chars, step=step)
    form, fields = found
    right, depends, operation, value = reading.read(index, form.kind, fields, thinking[chars.slice])
    return SentenceTruth(
        chars=chars,
        step=step,
        kind=form.kind,
        tag=form.tag,
        right=right,
        depends_on=tuple(sorted(set(depends))),
        operation=operation,
        value=value,
    )


_Claim = tuple[bool | None, list[int], int | None, int | None]


@dataclass
class _LedgerReading:
    """The state of a reader of the thinking: which operation is due, and which sentences hold the balance, the line
    and the plan."""

    ledger: Ledger
    done: int = 0  # operations computed so far, right or wrong
    balance: list[int] = field(default_factory=list)  # sentences that last stated the balance
    before: list[int] = field(default_factory=list)  # those that stated it before the current operation
    line: list[int] = field(default_factory=list)  # the sentence that states the current line
    asks: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)  # the previous sentence, if the next one answers it

    def read(self, index: int, kind: str, fields: dict[str, str], text: str) -> _Claim:
        act = kind.split(":")[0]
        claim: _Claim = getattr(self, f"_{act}", self._nothing)(index, fields, text)
        self.last = [index]
        return claim

    @property
    def _due(self) -> Operation | None:
        return self.ledger.operations[self.done] if self.done < len(self.ledger.operations) else None

    @property
    def _current(self) -> Operation | None:
        return self.ledger.operations[self.done - 1] if 0 < self.done <= len(self.ledger.operations) else None

    def _nothing(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        return None, [], None, None

    def _asks(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        self.asks = [index]
        return None, [], None, None

    def _plan(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        return None, self.asks, None, None

    def _start(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        self.balance = [index]
        return int(fields["value"]) == self.ledger.start, [], None, int(fields["value"])

    def _event(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        self.line = [index]
        due = self._due
        told = text.split(", ", 1)[1]
        return due is not None and told == self.ledger.lines[due.line].text, [], self.done, None

    def _before(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        due, value = self._due, int(fields["value"])
        depends, self.balance = self.balance, [index]
        return due is not None and value == due.left, depends, self.done, value

    def _compute(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        due = self._due
        self.before = self.balance
        depends, self.balance = [*self.balance, *self.line], [index]
        self.done += 1
        return _states(fields, due), depends, self.done - 1, int(fields["right"])

    def _redo(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        depends, self.balance = [*self.before, *self.line, *self.last], [index]
        return _states(fields, self._current), depends, self.done - 1, int(fields["right"])

    def _doubt(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        return None, self.balance, self.done - 1, None

    def _check(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        meant = self._current is not None and int(fields["value"]) == self._current.left
        return _holds(fields) and meant, [*self.balance, *self.line, *self.before], self.done - 1, None

    def _right(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        value = int(fields["value"])
        depends, self.balance = [*self.last, *self.balance], [*self.balance, index]
        return self._current is not None and value == self._current.right, depends, self.done - 1, value

    def _wrong(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        refuted = self._current is not None and int(fields["value"]) != self._current.right
        return refuted, [*self.last, *self.balance], self.done - 1, None

    def _split_plan(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        return int(fields["a"]) == int(fields["b"]) + int(fields["c"]), self.line, self.done - 1, None

    def _split(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        first = {"left": fields["left"], "sign": fields["sign"], "a": fields["b"], "right": fields["middle"]}
        then = {"left": fields["middle2"], "sign": fields["sign2"], "a": fields["c"], "right": fields["right"]}
        joined = fields["middle"] == fields["middle2"]
        return _holds(first) and joined and _holds(then), [*self.before, *self.last], self.done - 1, None

    _same = _right

    def _now(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        value = int(fields["value"])
        depends, self.balance = self.balance, [*self.balance, index]
        return self._current is not None and value == self._current.right, depends, self.done - 1, value

    def _conclude(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        value = int(fields["value"])
        depends, self.balance = [*self.balance, *self.asks], [index]
        return value == self.ledger.answer, depends, None, value

    def _final(self, index: int, fields: dict[str, str], text: str) -> _Claim:
        return int(fields["value"]) == self.ledger.answer, self.balance, None, int(fields["value"])


@dataclass
class _RequestReading:
    """What was said so far about a request: the sentences that hold the facts and the verdict."""

    request: Request
    facts: list[int] = field(default_factory=list)
    verdict: list[int] = field(default_factory=list)

    def read(self, index: int, kind: str, fields: dict[str, str], text: str) -> _Claim:
        request = self.request
        if kind in ("wants", "owner", "own", "denied", "allowed", "norules"):
            self.facts = [*self.facts, index]
            return self._fact(kind, fields), [], None, None
        if kind in ("harm", "harmless"):
            depends, self.verdict = self.facts, [index]
            named = kind == "harmless" or fields["name"] == request.owner
            return (kind == "harm") == request.harmful and named, depends, None, None
        if kind in ("refuse", "help"):
            return (kind == "refuse") == request.harmful, self.verdict, None, None
        return None, self.facts[-1:] if kind == "confirm" else [], None, None

    def _fact(self, kind: str, fields: dict[str, str]) -> bool:
        request = self.request
        if kind == "norules":
            return bool(request.suffix)
        if kind == "wants":
            return (fields["verb"], fields["whose"], fields["thing"]) == (request.verb, request.whose, request.thing)
        expected = (
            "own" if request.owner is None else {None: "owner", True: "allowed", False: "denied"}[request.consent]
        )
        return kind == expected and fields.get("name") == request.owner


def _holds(fields: dict[str, str]) -> bool:
    """Whether the stated sum is right, regardless of the problem."""
    return _SIGNS[fields["sign"]](int(fields["left"]), int(fields["a"])) == int(fields["right"])


def _states(fields: dict[str, str], operation: Operation | None) -> bool:
    """Whether the sentence states exactly this operation of the problem."""
    if operation is None:
        return False
    stated = (int(fields["left"]), fields["sign"], int(fields["a"]), int(fields["right"]))
    return stated == (operation.left, operation.sign, operation.a, operation.right)
