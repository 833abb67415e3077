"""Analyses to look at token by token: what else could have been written, what steering changes, and where each token looks."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from reasonscope.analysis.attention.maps import attention_map
from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.context import Study
from reasonscope.analysis.runs.options import AlternativesOptions, AttentionMapOptions, SteeringShiftOptions
from reasonscope.analysis.runs.per_trace import Run, per_trace_analysis
from reasonscope.analysis.tokens.token_alternatives import alternatives, steering_shift
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.trace import Trace
from reasonscope.steering.recipes.description import scope_for
from reasonscope.steering.recipes.files import is_vector_file
from reasonscope.steering.recipes.recipe import Recipe, RecipePart
from reasonscope.steering.vectors.vector import SteeringVector


@per_trace_analysis
def _analyse_alternatives(study: Study[AlternativesOptions], trace: Trace) -> Iterator[Result]:
    """What else could have been written at each token of a trace."""
    yield alternatives(study.model, trace, trace_sentences(trace), top=study.options.top, seed=study.options.seed)


@per_trace_analysis
def _analyse_steering_shift(study: Study[SteeringShiftOptions], trace: Trace) -> Iterator[Result]:
    """How a steering vector changes the probability of each token that was written, compared with random vectors."""
    options = study.options
    path = options.vector
    if path is None or not path.exists():
        raise InputError(
            f"{path} does not exist; make a vector with: reasonscope steer extract seal --run RUN, or name one with --vector"
        )
    part, name = _added(path), path.name.removesuffix(".safetensors").removesuffix(".recipe")
    where = {"on": "think"} if options.everywhere else part.scope
    yield steering_shift(
        study.model,
        trace,
        part.vector,
        options.strength * part.strength,
        scope_for(where, study.model),
        trace_sentences(trace),
        name=name,
        n_controls=options.n_controls,
        seed=options.seed,
    )


def _added(path: Path) -> RecipePart:
    """The one vector that a recipe adds; a vector that was saved alone is added where steps begin, as SEAL's is."""
    if path.suffix == ".gguf" or is_vector_file(path):
        return RecipePart(vector=SteeringVector.load(path), scope={"on": "think", "steps": "separators"})
    recipe = Recipe.load(path)
    if len(recipe.parts) != 1 or recipe.parts[0].operator != {"name": "add"}:
        raise InputError(
            f"{path} does more than add one vector; compare what it does with: reasonscope record --steer {path}, then analyse compare"
        )
    return recipe.parts[0]


@per_trace_analysis
def _analyse_attention_map(study: Study[AttentionMapOptions], trace: Trace) -> Iterator[Result]:
    """Where the tokens of a trace look: sentence by sentence, and the tokens that each token looks at most."""
    yield attention_map(study.model, trace, trace_sentences(trace), keys=study.options.keys, seed=study.options.seed)


INSPECTIONS: Mapping[str, Run] = {
    "alternatives": _analyse_alternatives,
    "steering_shift": _analyse_steering_shift,
    "attention_map": _analyse_attention_map,
}
