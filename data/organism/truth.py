"""What the grammar knows of a trace: the sentences of its thinking, their true tags, and their dependencies."""

import random

from reasonscope.data.errors import InputError
from reasonscope.data.organism.problems import ledger_of, request_of
from reasonscope.data.organism.reader import SentenceTruth, read_ledger, read_request
from reasonscope.data.organism.writer import write_ledger
from reasonscope.data.text.steps_and_sentences import sentences_at
from reasonscope.data.trace import Problem, Sentence, Span, Trace


def truths(trace: Trace) -> list[SentenceTruth]:
    """The truth of each sentence of a trace about a ledger problem."""
    return read_ledger(ledger_of(trace.problem), trace.thinking)


def true_sentences(trace: Trace) -> tuple[list[Sentence], list[tuple[int, ...]]]:
    """The grammar's sentences of a trace with their true tags, and for each the earlier sentences that it depends on.

    Raises InputError for a trace that is about neither a ledger nor a request.
    """
    if "ledger" in trace.problem.meta:
        known = truths(trace)
    elif "harmful" in trace.problem.meta:
        known = read_request(request_of(trace.problem), trace.thinking)
    else:
        raise InputError(f"trace {trace.id!r} is not about a problem of the organism, so its truth is not known")
    base = trace.chars.thinking.start
    spans = [Span(base + truth.chars.start, base + truth.chars.stop) for truth in known]
    found = sentences_at(trace, spans, [truth.tag or "unknown" for truth in known])
    return found, [truth.depends_on for truth in known]


def reference_solution(problem: Problem) -> str:
    """The thinking and the answer that the grammar writes for a ledger problem."""
    written = write_ledger(ledger_of(problem), problem.meta.get("mode", "default"), random.Random(0))
    return f"{written.thinking}\n\n{written.answer}"
