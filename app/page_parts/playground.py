"""The playground: one problem answered with and without steering, from the same seed, and where the two diverge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.data.errors import InputError, ReasonscopeError
from reasonscope.data.storage.manifest import RECIPE
from reasonscope.data.text.align import token_strings
from reasonscope.data.trace import Sampling, Trace

if TYPE_CHECKING:
    from reasonscope.probes.generation.decoding import DecodingStep
    from reasonscope.probes.models.model import Model
    from reasonscope.steering.recipes.recipe import Recipe

# The tokens that a file without tokens of its own acts on: a vector that was saved alone.
SCOPES = {"every token of the thinking": {"on": "think"}, "where steps begin": {"on": "think", "steps": "separators"}}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One completion: its tokens as text, its answer, and how it ended."""

    tokens: tuple[str, ...]
    thinking_tokens: int
    answer: str
    finish: str


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Two completions of one problem.

    Attributes:
        base: Without steering.
        steered: With steering.
        parted: The first generated token that differs; None if none does.
        kl: Mean divergence of the steered model from the base over the base's tokens, in nats per token; None if the recipe does more
            than edit states.
        n_edited: How many tokens were edited.
    """

    base: Side
    steered: Side
    parted: int | None
    kl: float | None
    n_edited: int


def vectors_of(run: OpenRun) -> list[Path]:
    """What steered the run, its recipes, and vectors that were saved alone."""
    own = run.store.recipe
    return [*([own] if own is not None and own.exists() else []), *sorted(run.where.vectors.glob("*.safetensors"))]


def label(path: Path) -> str:
    """The name of a file without its endings; a run's own recipe is called so."""
    return (
        "what steered this run"
        if path.name == RECIPE
        else path.name.removesuffix(".safetensors").removesuffix(".recipe")
    )


def has_strength(path: Path) -> bool:
    """Whether what a file holds can be multiplied: an exit rule or a prefill acts or does not. True for a file that cannot be read."""
    from reasonscope.steering.recipes.files import is_vector_file
    from reasonscope.steering.recipes.recipe import Recipe

    try:
        recipe = None if is_vector_file(path) else Recipe.load(path)
    except ReasonscopeError:  # said when it is used
        return True
    return recipe is None or recipe.scaled(2.0).hash != recipe.hash


@lru_cache(maxsize=1)
def loaded(name: str, run: OpenRun) -> "Model":
    """The model, kept while the app runs; it finds thinking and renders prompts as the run says."""
    from reasonscope.probes.models.model import load_as_recorded

    return load_as_recorded(run.store.meta, name, {})


def mixed(weights: Mapping[Path, float], scope: str) -> "Recipe":
    """The recipes together, each with its strengths multiplied; `scope` (of SCOPES) is for vectors that were saved alone.

    Raises InputError if all weights are 0 or the vectors differ in width.
    """
    from reasonscope.steering.recipes.files import is_vector_file
    from reasonscope.steering.recipes.recipe import Recipe, RecipePart
    from reasonscope.steering.vectors.vector import SteeringVector

    chosen = [(path, weight) for path, weight in weights.items() if weight]
    if not chosen:
        raise InputError("every vector has strength 0; move a slider to steer")
    recipes = [
        Recipe(name=label(path), parts=(RecipePart(vector=SteeringVector.load(path), scope=SCOPES[scope]),)).scaled(
            weight
        )
        if is_vector_file(path)
        else Recipe.load(path).scaled(weight)
        for path, weight in chosen
    ]
    mix = recipes[0]
    for recipe in recipes[1:]:
        mix = mix.merged(recipe)
    return mix


def duel(
    model: "Model", question: str, recipe: "Recipe", *, sampling: Sampling, tell: Callable[[str, int], None]
) -> Duel:
    """Answer `question` with and without a recipe, as `reasonscope steer apply` does.

    `tell` is called with the side and the number of each token; what it raises stops the work.
    """
    from reasonscope.steering.experiments.side_effects import divergences, generated, logits_function
    from reasonscope.steering.recipes.answers import answer_with
    from reasonscope.steering.recipes.answers import question as as_problem

    def follow(side: str, step: "DecodingStep") -> None:
        tell(side, step.index)

    found = answer_with(recipe, model, [as_problem(question)], sampling, follow=follow)
    (pair,), again = found.pairs, recipe.condition(model)
    kl = None
    if again.acts_on_states_alone:
        reader = logits_function(model, again.intervention)
        divergent = divergences(model, [pair.plain], [reader], {"all": generated})[0]["all"]
        kl = float(divergent.kl.sum() / divergent.n_tokens.sum())
    return Duel(base=_side(pair.plain), steered=_side(pair.steered), parted=pair.parted, kl=kl, n_edited=found.n_edited)


def _side(trace: Trace) -> Side:
    pieces = token_strings(trace.text, trace.offsets)[trace.n_prompt_tokens :]
    return Side(
        tokens=tuple(pieces),
        thinking_tokens=trace.n_thinking_tokens,
        answer=trace.answer_text.strip(),
        finish=trace.finish_reason,
    )
