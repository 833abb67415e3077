"""Analyses that take the traces one by one, in any order and on any machine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study
from reasonscope.data.trace import Trace

# From an opened run to its results.
Run = Callable[[Study[Any]], Iterator[Result]]


@dataclass(frozen=True, kw_only=True)
class PerTraceAnalysis:
    """An analysis that handles one trace at a time and may then aggregate.

    `per_trace` may look at the other traces of the study but not at their results. `aggregate` gets the results of all traces in their
    order. `next_stage` builds the analysis that follows from the aggregated results. `depends_on` names the files beside the store that
    the results of a trace depend on. Calling it with a Study runs the analysis.
    """

    per_trace: Callable[[Study[Any], Trace], Iterator[Result]]
    aggregate: Callable[[Study[Any], Sequence[Result]], Iterator[Result]] | None = None
    next_stage: "Callable[[Sequence[Result]], PerTraceAnalysis] | None" = None
    depends_on: Callable[[Study[Any], Trace], Iterable[Path]] = field(default=lambda study, trace: ())

    def __call__(self, study: Study[Any]) -> Iterator[Result]:
        found = []
        for trace in study.traces:
            for result in self.per_trace(study, trace):
                if self.aggregate is not None:
                    found.append(result)
                yield result
        over = list(self.aggregate(study, found)) if self.aggregate is not None else []
        yield from over
        if self.next_stage is not None:
            yield from self.next_stage(over)(study)


def per_trace_analysis(each: Callable[[Study[Any], Trace], Iterator[Result]]) -> PerTraceAnalysis:
    """An analysis of single traces, with no result over all of them."""
    return PerTraceAnalysis(per_trace=each)
