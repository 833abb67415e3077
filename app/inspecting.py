"""Analyses that are there to be looked at: what else a token could have been, what steering makes of it, and where each token looks."""

from collections.abc import Iterator

from reasonscope.analysis.attention_map import attention_map
from reasonscope.analysis.next_tokens import alternatives, steering_shift
from reasonscope.analysis.results import Result
from reasonscope.app.study import Study, trace_sentences
from reasonscope.data.errors import InputError
from reasonscope.steering.scope import Scope
from reasonscope.steering.vector import SteeringVector


def analyse_alternatives(study: Study) -> Iterator[Result]:
    """What else could have stood at each token, trace by trace."""
    return (alternatives(study.model, trace, top=study.options.top) for trace in study.traces)


def analyse_shift(study: Study) -> Iterator[Result]:
    """What a steering vector makes of each token that was written, trace by trace, beside random vectors."""
    options = study.options
    path = options.vector
    if path is None or not path.exists():
        raise InputError(
            f"there is no vector at {path}; make one with: reasonscope steer extract seal --run RUN, or name one with --vector"
        )
    vector = SteeringVector.load(path)
    scope = Scope.thinking(study.model, at_separators=options.at_separators)
    for trace in study.traces:
        yield steering_shift(
            study.model, trace, vector, options.strength, scope, name=path.stem, draws=options.draws, seed=options.seed
        )


def analyse_attention(study: Study) -> Iterator[Result]:
    """Where the tokens of each trace look: between sentences, and token by token where they look most."""
    for trace in study.traces:
        yield attention_map(study.model, trace, trace_sentences(trace), keys=study.options.keys)
