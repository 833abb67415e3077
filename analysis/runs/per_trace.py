"""Analyses whose traces can be analysed one by one, in any order and anywhere."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study
from reasonscope.data.trace import Trace


@dataclass(frozen=True, kw_only=True)
class PerTraceAnalysis:
    """The results of `each` trace, then what is made of all of them in the order of the traces (`over_all`).

    `each` may look at the other traces of the study, not at their results. `then`: the analysis that follows, made from the results over
    all. `reads`: files beside the store that a trace's results hang on. Called with a study it is an analysis as any other.
    """

    each: Callable[[Study, Trace], Iterator[Result]]
    over_all: Callable[[Study, Sequence[Result]], Iterator[Result]] | None = None
    then: "Callable[[Sequence[Result]], PerTraceAnalysis] | None" = None
    reads: Callable[[Study, Trace], Iterable[Path]] = field(default=lambda study, trace: ())

    def __call__(self, study: Study) -> Iterator[Result]:
        found = []
        for trace in study.traces:
            for result in self.each(study, trace):
                if self.over_all is not None:
                    found.append(result)
                yield result
        over = list(self.over_all(study, found)) if self.over_all is not None else []
        yield from over
        if self.then is not None:
            yield from self.then(over)(study)


def per_trace_analysis(each: Callable[[Study, Trace], Iterator[Result]]) -> PerTraceAnalysis:
    """An analysis of single traces and of nothing over all of them."""
    return PerTraceAnalysis(each=each)
