"""Analyses to look at token by token: what else could have been written, what steering changes, and where each token looks."""

from collections.abc import Iterator

from reasonscope.analysis.attention.maps import attention_map
from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study, trace_sentences
from reasonscope.analysis.runs.options import AlternativesOptions, AttentionMapOptions, SteeringShiftOptions
from reasonscope.analysis.runs.per_trace import per_trace_analysis
from reasonscope.analysis.tokens.token_alternatives import alternatives, steering_shift
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector


@per_trace_analysis
def analyse_alternatives(study: Study[AlternativesOptions], trace: Trace) -> Iterator[Result]:
    """What else could have been written at each token of a trace."""
    yield alternatives(study.model, trace, trace_sentences(trace), top=study.options.top, seed=study.options.seed)


@per_trace_analysis
def analyse_steering_shift(study: Study[SteeringShiftOptions], trace: Trace) -> Iterator[Result]:
    """How a steering vector changes the probability of each token that was written, compared with random vectors."""
    options = study.options
    path = options.vector
    if path is None or not path.exists():
        raise InputError(
            f"{path} does not exist; make a vector with: reasonscope steer extract seal --run RUN, or name one with --vector"
        )
    vector = SteeringVector.load(path)
    scope = Scope.thinking(study.model, at_separators=not options.everywhere)
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
def analyse_attention_map(study: Study[AttentionMapOptions], trace: Trace) -> Iterator[Result]:
    """Where the tokens of a trace look: sentence by sentence, and the tokens that each token looks at most."""
    yield attention_map(study.model, trace, trace_sentences(trace), keys=study.options.keys, seed=study.options.seed)
