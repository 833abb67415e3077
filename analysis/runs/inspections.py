"""Analyses that are there to be looked at: what else a token could have been, what steering makes of it, and where each token looks."""

from collections.abc import Iterator

from reasonscope.analysis.attention.maps import attention_map
from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study, trace_sentences
from reasonscope.analysis.runs.per_trace import per_trace_analysis
from reasonscope.analysis.tokens.token_alternatives import alternatives, steering_shift
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector


@per_trace_analysis
def analyse_alternatives(study: Study, trace: Trace) -> Iterator[Result]:
    """What else could have stood at each token, trace by trace."""
    yield alternatives(study.model, trace, trace_sentences(trace), top=study.options.top, seed=study.options.seed)


@per_trace_analysis
def analyse_steering_shift(study: Study, trace: Trace) -> Iterator[Result]:
    """What a steering vector makes of each token that was written, trace by trace, beside random vectors."""
    options = study.options
    path = options.vector
    if path is None or not path.exists():
        raise InputError(
            f"there is no vector at {path}; make one with: reasonscope steer extract seal --run RUN, or name one with --vector"
        )
    vector = SteeringVector.load(path)
    scope = Scope.thinking(study.model, at_separators=options.at_separators)
    known, name = trace_sentences(trace), path.stem
    yield steering_shift(
        study.model,
        trace,
        vector,
        options.strength,
        scope,
        known,
        name=name,
        n_controls=options.n_controls,
        seed=options.seed,
    )


@per_trace_analysis
def analyse_attention_map(study: Study, trace: Trace) -> Iterator[Result]:
    """Where the tokens of each trace look: between sentences, and token by token where they look most."""
    yield attention_map(study.model, trace, trace_sentences(trace), keys=study.options.keys, seed=study.options.seed)
