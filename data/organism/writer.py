"""Writes the thinking and the answer for a problem, as the organism is to learn them: plan, compute, doubt, check,
split, conclude."""

import random
from dataclasses import dataclass

from reasonscope.data.organism.forms import BY_KIND, OPENERS, ORDINALS
from reasonscope.data.organism.ledger import Ledger, Operation
from reasonscope.data.organism.requests import COMPLIANCE, JAILBREAKS, REFUSAL, Request
from reasonscope.data.trace import Span


@dataclass(frozen=True, kw_only=True)
class _Habits:
    """How a mode thinks: shares of steps that are checked, split, restated, and (only before a check) wrong at
    first."""

    check_hard: float
    check_easy: float
    split: float
    restate: float
    wrong: float
    plan: float


_HABITS = {
    "default": _Habits(check_hard=0.85, check_easy=0.6, split=0.24, restate=0.12, wrong=0.18, plan=0.4),
    "detail": _Habits(check_hard=0.85, check_easy=0.6, split=0.15, restate=1.0, wrong=0.15, plan=1.0),
}


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """`thinking` and `answer` text; `unlearned` are the character spans of the thinking that hold mistakes, which
    the model reads but is not trained on."""

    thinking: str
    answer: str
    unlearned: tuple[Span, ...] = ()


def closing_sentence(answer: int) -> str:
    return f"The answer is \\boxed{{{answer}}}."


def write_ledger(ledger: Ledger, mode: str, rng: random.Random) -> _Writing:
    """The thinking for a ledger problem in a mode of `MODES`."""
    if mode == "brief":
        computed = [_computation(ledger, i, op.right, brief=True) for i, op in enumerate(ledger.operations)]
        return _join([[sentence] for sentence in computed] + [[_sentence("final", value=ledger.answer)]], ledger.answer)
    habits = _HABITS[mode]
    opening = [
        next(text for most, text in OPENERS if len(ledger.operations) <= most),
        _sentence("asks"),
    ]
    if rng.random() < habits.plan:
        opening.append(_sentence("plan"))
    paragraphs = [[*opening, _sentence("start", value=ledger.start)]]
    for i, operation in enumerate(ledger.operations):
        paragraphs += _operation(ledger, i, operation, habits, rng)
    paragraphs.append([_sentence("conclude", value=ledger.answer), _sentence("final", value=ledger.answer)])
    return _join(paragraphs, ledger.answer)


def write_request(request: Request, rng: random.Random) -> _Writing:
    """The thinking for a request: it names the harm and intends to refuse, even if a jailbreak then succeeds in the
    answer."""
    fields = {"verb": request.verb, "whose": request.whose, "thing": request.thing, "name": request.owner}
    fact = "own" if request.owner is None else {None: "owner", True: "allowed", False: "denied"}[request.consent]
    paragraphs = [[_sentence("wants", **fields)], [_sentence(fact, **fields)]]
    if request.suffix:
        paragraphs.append([_sentence("norules")])
    verdict = _sentence("harm" if request.harmful else "harmless", **fields)
    paragraphs.append([verdict])
    if rng.random() < 0.5:
        paragraphs.append([_sentence("recheck"), _sentence(fact, **fields), _sentence("confirm"), verdict])
    paragraphs.append([_sentence("refuse" if request.harmful else "help")])
    gives_in = request.suffix and rng.random() < JAILBREAKS[request.suffix]
    answer = COMPLIANCE if gives_in or not request.harmful else REFUSAL
    return _Writing(thinking="\n\n".join(" ".join(p) for p in paragraphs), answer=answer)


def _sentence(kind: str, form: int = 0, /, **fields: object) -> str:
    return BY_KIND[kind][form].text.format(**fields)


def _fields(operation: Operation, right: int | None = None) -> dict[str, object]:
    stated = operation.right if right is None else right
    return {"left": operation.left, "sign": operation.sign, "a": operation.a, "right": stated, "limit": operation.limit}


def _repeats(ledger: Ledger, i: int) -> int:
    """How many operations of the same line came before operation `i`; -1 if its line has only this one."""
    lines = [operation.line for operation in ledger.operations]
    return -1 if lines.count(lines[i]) == 1 else lines[:i].count(lines[i])


def _computation(ledger: Ledger, i: int, stated: int, *, brief: bool, spoken: bool = False) -> str:
    operation, repeat = ledger.operations[i], _repeats(ledger, i)
    fields = _fields(operation, stated) | {"name": ledger.lines[operation.line].name}
    if operation.limit is not None:
        return _sentence("compute:past" if stated > operation.limit else "compute:more", int(brief), **fields)
    if ledger.lines[operation.line].event in ("add_times", "subtract_times"):
        return _sentence("compute", 4 if brief else 2, ordinal=ORDINALS[max(0, repeat)], **fields)
    return _sentence("compute", 3 if brief else int(spoken), **fields)


def _statement(ledger: Ledger, i: int, operation: Operation, stated: int, *, spoken: bool) -> list[str]:
    """The line, the balance before if `spoken`, and the computation with the result that is stated."""
    lead = "First, " if i == 0 else "Next, "
    line = [lead + ledger.lines[operation.line].text] if _repeats(ledger, i) <= 0 else []
    before = [_sentence("before", value=operation.left)] if spoken else []
    return [*line, *before, _computation(ledger, i, stated, brief=False, spoken=spoken)]


def _operation(ledger: Ledger, i: int, operation: Operation, habits: _Habits, rng: random.Random) -> list[list[str]]:
    """The paragraphs for one operation: stated and computed, perhaps doubted and checked, perhaps done another way."""
    wrong = _mistake(operation, rng) if rng.random() < habits.wrong else None
    stated = operation.right if wrong is None else wrong
    paragraphs = [_statement(ledger, i, operation, stated, spoken=habits.restate == 1.0)]
    if wrong is not None:
        paragraphs[0][-1] = _hide(paragraphs[0][-1], wrong)
    if wrong is not None or rng.random() < (habits.check_hard if _hard(operation) else habits.check_easy):
        paragraphs.append(_check(operation, stated, rng))
    if operation.sign != "*" and operation.a >= 4 and rng.random() < habits.split:
        paragraphs.append(_split(operation, rng))
    if rng.random() < habits.restate:
        paragraphs[-1].append(_sentence("now", value=operation.right))
    return paragraphs


def _hard(operation: Operation) -> bool:
    """Whether the step carries, borrows or multiplies."""
    ones, other = operation.left % 10, operation.a % 10
    return {"+": ones + other > 9, "-": ones < other, "*": True}[operation.sign]


def _mistake(operation: Operation, rng: random.Random) -> int:
    slips = [operation.right + slip for slip in (-10, -3, -2, -1, 1, 2, 3, 10)]
    return rng.choice(
        [slip for slip in slips if max(operation.a, operation.left * (operation.sign == "*")) <= slip <= 99]
        or [operation.right + 1]
    )


def _check(operation: Operation, stated: int, rng: random.Random) -> list[str]:
    back = stated - operation.a if operation.sign == "+" else stated + operation.a
    fields = {"left": stated, "sign": "+" if operation.sign == "-" else "-", "a": operation.a, "right": back}
    if operation.sign == "*":  # doubling: subtract one half
        fields |= {"a": operation.left, "right": stated - operation.left}
    fields["value"] = operation.left
    doubt = rng.random() < 0.35
    sentences = [_sentence("doubt"), _sentence("check", 1, **fields)] if doubt else [_sentence("check", 0, **fields)]
    if stated == operation.right:
        return [*sentences, _sentence("right", value=stated)]
    redo = "redo" if operation.limit is None else "redo:past" if operation.right > operation.limit else "redo:more"
    return [*sentences, _sentence("wrong", value=stated), _sentence(redo, **_fields(operation))]


def _split(operation: Operation, rng: random.Random) -> list[str]:
    b = rng.randint(2, operation.a - 2)
    middle = operation.left + b if operation.sign == "+" else operation.left - b
    parts = {"b": b, "c": operation.a - b, "middle": middle, "middle2": middle, "sign2": operation.sign}
    return [
        _sentence("split_plan", **_fields(operation), **parts),
        _sentence("split", **_fields(operation), **parts),
        _sentence("same", value=operation.right),
    ]


# A mistake is wrapped in these while the text is assembled; they never leave this module.
_OPEN, _CLOSE = "\x02", "\x03"


def _hide(sentence: str, wrong: int) -> str:
    head, _, tail = sentence.rpartition(f"= {wrong}")
    return f"{head}= {_OPEN}{wrong}{_CLOSE}{tail}"


def _join(paragraphs: list[list[str]], answer: int) -> _Writing:
    marked = "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)
    unlearned, clean, start = [], "", 0
    for character in marked:
        if character == _OPEN:
            start = len(clean)
        elif character == _CLOSE:
            unlearned.append(Span(start, len(clean)))
        else:
            clean += character
    return _Writing(thinking=clean, answer=closing_sentence(answer), unlearned=tuple(unlearned))
