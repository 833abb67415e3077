"""Problem sets whose thinking follows a known grammar, which tells the true sentences of a trace and how they depend on each other."""

from typing import Protocol

from reasonscope.data.trace import Problem, Sentence, Trace


class Grammar(Protocol):
    """What a problem set knows about the thinking that answers its problems."""

    def true_sentences(self, trace: Trace) -> tuple[list[Sentence], list[tuple[int, ...]]]:
        """The sentences of a trace with their true tags, and for each the earlier sentences that it depends on."""
        ...

    def reference_solution(self, problem: Problem) -> str:
        """A solution of the problem with its answer, as a model of this grammar would write it."""
        ...


def grammar_of(problem: Problem) -> Grammar | None:
    """The grammar of the set that the problem belongs to; None if it has none."""
    if "ledger" not in problem.meta:
        return None
    from reasonscope.data.organism import truth

    return truth
