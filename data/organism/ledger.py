"""Ledger problems: a starting balance, named events, lines without effect, and the balance when the ledger closes.

The number of steps that an answer needs depends on the order of the lines and on the running balance, hardly on the
words or the length of the text: lines after the closing do not count, a line may repeat, and "until" depends on the
balance.
"""

import hashlib
import random
from dataclasses import dataclass

from reasonscope.data.organism.forms import COUNTS, EVENTS

NAMES = tuple(
    "Ann Bob Carl Dan Eve Fay Gus Hal Ida Joe Kim Leo Max Nan Oli Pam Quin Rob Sue Tom Una Vic Wes Zoe".split()
)
# Lines without a name: a line that counts always opens with a name.
_DISTRACTORS = (
    "The shop is shut on Sunday.",
    "It rains all day.",
    "The clerk reads the ledger.",
    "The clerk is {a} years old.",
    "The shelf holds {a} stamps.",
    "There are {a} chairs.",
)
_CLOSING = "The ledger closes here."
MODES = {"default": "", "brief": " Think briefly.", "detail": " Think in detail."}
SPLITS = ("train", "validation", "test")
MAX_STEPS = 8
_LARGEST = 99


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One needed step: `left sign a = right`, from line `line`; `limit` if the line says "until the balance passes"."""

    line: int
    left: int
    sign: str
    a: int
    right: int
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One sentence of the problem. `event` is a key of `EVENTS`, done by `name`; both None for a line without
    effect."""

    text: str
    name: str | None = None
    event: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A problem with its solution: every operation needed for the answer, in order (1 to 8).

    The ledger closes after the first `closed` lines; later lines are in the text but do not count.
    """

    start: int
    lines: tuple[Line, ...]
    closed: int
    operations: tuple[Operation, ...]

    @property
    def answer(self) -> int:
        return self.operations[-1].right

    @property
    def body(self) -> str:
        lines = [line.text for line in self.lines]
        told = " ".join([*lines[: self.closed], _CLOSING, *lines[self.closed :]])
        return f"The ledger starts at {self.start}. {told} What is the final balance?"

    def question(self, mode: str = "default") -> str:
        """The user's message: the problem and how much to think about it (a key of `MODES`)."""
        return self.body + MODES[mode]

    @property
    def split(self) -> str:
        """The set of the problem, by a hash of its text: the three sets are disjoint for any seeds."""
        bucket = int.from_bytes(hashlib.sha256(self.body.encode()).digest()[:2]) % 20
        return SPLITS[max(0, bucket - 17)]


def sample_ledger(rng: random.Random, *, split: str, steps: int | None = None) -> Ledger:
    """Draw a problem of `split` that needs `steps` operations (None: 1 to 8, equally often)."""
    needed = rng.randint(1, MAX_STEPS) if steps is None else steps
    while True:
        ledger = _draw(rng, needed)
        if ledger is not None and ledger.split == split:
            return ledger


def _draw(rng: random.Random, needed: int) -> Ledger | None:
    names = rng.sample(NAMES, len(NAMES))
    start = rng.randint(5, 60)
    balance = start
    lines: list[Line] = []
    operations: list[Operation] = []
    while len(operations) < needed:
        if len(lines) - len(operations) < 4 and rng.random() < 0.2:
            lines.append(_distractor(rng))
            continue
        line, new = _event(rng, names.pop(), balance, len(lines), needed - len(operations))
        if line is None:
            return None
        lines.append(line)
        operations += new
        balance = operations[-1].right
    closed = len(lines)
    for _ in range(rng.randint(0, max(0, 9 - len(lines)))):  # after the closing
        line = _distractor(rng) if rng.random() < 0.3 else None
        if line is None:
            line, new = _event(rng, names.pop(), balance, len(lines), 4)
            if line is None:
                break
            balance = new[-1].right
        lines.append(line)
    return Ledger(start=start, lines=tuple(lines), closed=closed, operations=tuple(operations))


def _distractor(rng: random.Random) -> Line:
    return Line(text=rng.choice(_DISTRACTORS).format(a=rng.randint(2, 60)))


def _event(
    rng: random.Random, name: str, balance: int, line: int, room: int
) -> tuple[Line, list[Operation]] | tuple[None, list[Operation]]:
    """A line that keeps the balance within 0 to 99 and takes at most `room` operations; (None, []) if none was
    found."""
    kinds = ["add", "subtract", "double", "add_times", "subtract_times", "add_until"]
    for _ in range(12):
        event = rng.choices(kinds, weights=(30, 30, 8, 12, 8, 20))[0]
        a = rng.randint(2, 34) if event in ("add", "subtract") else rng.randint(2, 12)
        count, limit = 1, None
        if event.endswith("_times"):
            count = rng.randint(2, 4)
        if event == "add_until":
            limit = min((balance + rng.randint(0, 4 * a)) // 10 * 10, (_LARGEST - a) // 10 * 10)
            count = max(1, (limit - balance) // a + 1)
        operations = []
        value = balance
        for _ in range(count):
            sign, operand = ("*", 2) if event == "double" else ("+" if event.startswith("add") else "-", a)
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
            operations.append(Operation(line=line, left=value, sign=sign, a=operand, right=result, limit=limit))
            value = result
        if 1 <= count <= min(room, 4) and all(0 <= operation.right <= _LARGEST for operation in operations):
            template = rng.choice(EVENTS[event])
            text = template.format(name=name, a=a, count=COUNTS.get(count, ""), limit=limit)
            return Line(text=text, name=name, event=event), operations
    return None, []
