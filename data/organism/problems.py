"""The organism's ledgers and requests as problems, and back."""

import json
from dataclasses import asdict
from hashlib import sha256

from reasonscope.data.organism.ledger import Ledger, Line, Operation
from reasonscope.data.organism.requests import Request
from reasonscope.data.trace import Message, Problem


def ledger_problem(ledger: Ledger, mode: str = "default") -> Problem:
    """A ledger as a problem: `difficulty` is the number of steps needed, `group` is the same in every mode, `meta`
    has the ledger and `mode`."""
    group = f"ledger-{sha256(ledger.body.encode()).hexdigest()[:12]}"
    return Problem(
        id=group if mode == "default" else f"{group}-{mode}",
        messages=(Message(role="user", content=ledger.question(mode)),),
        answer=str(ledger.answer),
        group=group,
        difficulty=float(len(ledger.operations)),
        meta=json.loads(json.dumps({"ledger": asdict(ledger), "mode": mode, "split": ledger.split})),
    )


def ledger_of(problem: Problem) -> Ledger:
    """The ledger of a problem of the set `ledger`, against which its thinking is judged."""
    made = problem.meta["ledger"]
    return Ledger(
        start=made["start"],
        lines=tuple(Line(**line) for line in made["lines"]),
        closed=made["closed"],
        operations=tuple(Operation(**operation) for operation in made["operations"]),
    )


def request_of(problem: Problem) -> Request:
    """The request of a problem of the set `requests`."""
    return Request(**problem.meta["request"])


def request_problem(request: Request) -> Problem:
    """A request as a problem without an answer; its `group` is its subject, so that twins stay together."""
    return Problem(
        id=f"request-{sha256(request.prompt.encode()).hexdigest()[:12]}",
        messages=(Message(role="user", content=request.prompt),),
        group=request.thing,
        meta={
            "harmful": request.harmful,
            "jailbreak": bool(request.suffix),
            "twin": request.twin,
            "topic": request.thing,
            "request": asdict(request),
        },
    )
