"""Efficiency Steering (arXiv 2506.15647): from the longest to the shortest correct answer to the same problem."""

from collections.abc import Iterable, Sequence

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.vectors.contrast import Read, contrast_vector
from reasonscope.steering.vectors.vector import SteeringVector


def _efficient_pairs(traces: Iterable[Trace]) -> list[tuple[Trace, Trace]]:
    """The correct traces with the fewest and with the most thinking tokens, for each problem with two of different length."""
    correct: dict[str, list[Trace]] = {}
    for trace in traces:
        if trace.correct and trace.state == "closed":
            correct.setdefault(trace.problem.id, []).append(trace)
    ordered = [sorted(of, key=lambda trace: trace.n_thinking_tokens) for of in correct.values()]
    return [(of[0], of[-1]) for of in ordered if of[0].n_thinking_tokens < of[-1].n_thinking_tokens]


def extract_efficiency(
    store: TraceStore, sites: Sequence[Site], *, read: Read, ids: Iterable[str] | None = None
) -> SteeringVector:
    """r = mean(h | shortest correct) − mean(h | longest correct), by problem, at each of `sites`; adding it shortens.

    The paper says neither at which tokens nor at which layers it reads, so `read` and `sites` have no default. Raises InputError if no
    problem has two correct traces of different length: record several samples per problem at a temperature above 0.
    """
    pairs = _efficient_pairs(store.trace(id) for id in (store.ids if ids is None else ids))
    if not pairs:
        raise InputError(
            "no problem has two correct traces of different length; record several samples per problem at a temperature above 0"
        )
    return contrast_vector(store, pairs, sites, read=read, method="efficiency", provenance={})
