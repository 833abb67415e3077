"""Plain and steered answers to the same problems from the same seeds: what `steer apply` and the app's playground show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reasonscope.data.summary import Summary, plural
from reasonscope.data.text.align import first_difference, token_strings
from reasonscope.data.trace import Message, Problem, Sampling, Trace
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.generation.rollout import both, rollouts
from reasonscope.probes.models.model import Model
from reasonscope.steering.recipes.controls import controls_of
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.intervention import require_edits

_SHOWN = 16  # tokens on either side of the place where two answers part
# Called with the side (`plain` or `steered`) before each pass.
Follow = Callable[[str, DecodingStep], None]


@dataclass(frozen=True, kw_only=True)
class _AnswerPair:
    """One problem answered by the plain and by the steered model.

    Attributes:
        plain: Without the recipe.
        steered: With it.
    """

    plain: Trace
    steered: Trace

    @property
    def parted(self) -> int | None:
        """The first generated token that differs, where the end of one counts as a difference; None if they are equal."""
        return first_difference(_written(self.plain), _written(self.steered))

    def to_dict(self) -> dict[str, Any]:
        """Both answers and their lengths, for JSON."""
        return {
            "problem": self.plain.problem.id,
            "parted": self.parted,
            **{name: _side(trace) for name, trace in (("plain", self.plain), ("steered", self.steered))},
        }


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a recipe does to the answers of some problems; a few draws, and no measurement.

    Attributes:
        recipe: The recipe.
        pairs: One per problem.
        n_edited: How many tokens were edited.
        told: What each controller did, in a line.
    """

    recipe: Recipe
    pairs: tuple[_AnswerPair, ...]
    n_edited: int
    told: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every pair, for JSON."""
        return {
            "recipe": self.recipe.meta,
            "n_edited": self.n_edited,
            "controllers": list(self.told),
            "answers": [pair.to_dict() for pair in self.pairs],
        }

    def summary(self) -> Summary:
        """Length and answer of each pair, and the words at which they part."""
        n, parted = len(self.pairs), sum(pair.parted is not None for pair in self.pairs)
        return Summary(
            finding=f"With {self.recipe.name} (hash {self.recipe.hash}) {parted} of {n} answers part from the plain ones.",
            columns=("problem", "thinking tokens, plain", "steered", "answer, plain", "steered", "part at token"),
            rows=[_row(pair) for pair in self.pairs],
            quotes=[quote for pair in self.pairs for quote in _quotes(pair)],
            notes=[
                *(f"{line[:1].upper()}{line[1:]}." for line in self.told),
                f"Edited: {plural(self.n_edited, 'token')}. Single draws with one seed; `steer sweep` measures with controls.",
            ],
        )


def question(text: str) -> Problem:
    """A text as a problem, alike on the command line and in the app, so that the same seed gives the same tokens."""
    return Problem(id="prompt", messages=(Message(role="user", content=text),))


def answer_with(
    recipe: Recipe,
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    follow: Follow | None = None,
) -> Answers:
    """Answer problems without and with a recipe, from the same seeds.

    Args:
        recipe: The recipe.
        model: The model.
        problems: What it answers.
        sampling: How, the seed included.
        batch_size: Answers that are written together.
        follow: Called before each pass; what it raises stops the work.

    Returns:
        The answers in pairs.

    Raises:
        InputError: If the recipe does not fit the model, or edited no token.
    """
    how: dict[str, Any] = {"batch_size": batch_size}
    condition = recipe.condition(model, sampling=sampling)
    plain = rollouts(model, problems, sampling, on_step=_telling(follow, "plain"), **how)
    if condition.intervention is not None:
        how |= {"write": condition.intervention.edits}
    on_step = both(condition.intervention.on_step if condition.intervention else None, _telling(follow, "steered"))
    how |= {"processors": condition.processors, "prefill": condition.prefill, "on_step": on_step}
    steered = rollouts(model, problems, sampling, **how)
    if condition.intervention is not None:
        require_edits(condition.intervention, recipe.name)
    pairs = tuple(_AnswerPair(plain=a, steered=b) for a, b in zip(plain, steered, strict=True))
    return Answers(
        recipe=recipe,
        pairs=pairs,
        n_edited=condition.intervention.n_edited if condition.intervention else 0,
        told=tuple(control.told() for control in controls_of(condition)),
    )


def _telling(follow: Follow | None, side: str) -> Callable[[DecodingStep], None]:
    return lambda step: follow(side, step) if follow else None


def _written(trace: Trace) -> list[int]:
    ids: list[int] = trace.token_ids[trace.n_prompt_tokens :].tolist()
    return ids


def _side(trace: Trace) -> dict[str, Any]:
    return {
        "thinking_tokens": trace.n_thinking_tokens,
        "finish_reason": trace.finish_reason,
        "final_answer": trace.final_answer,
        "text": "".join(_pieces(trace)),
    }


def _row(pair: _AnswerPair) -> tuple[str, ...]:
    plain, steered = pair.plain, pair.steered
    return (
        plain.problem.id,
        str(plain.n_thinking_tokens),
        str(steered.n_thinking_tokens),
        plain.final_answer or "–",
        steered.final_answer or "–",
        "never" if pair.parted is None else str(pair.parted),
    )


def _quotes(pair: _AnswerPair) -> list[tuple[str, str]]:
    """The texts of both; if they part late, from a little before that."""
    start = max(0, (pair.parted or 0) - _SHOWN)
    sides = (("plain", pair.plain), ("steered", pair.steered)) if pair.parted is not None else (("both", pair.plain),)
    said = "" if not start else f", from token {start}"
    return [
        ("".join(_pieces(trace)[start:]).strip(), f"{pair.plain.problem.id}, {name}{said}") for name, trace in sides
    ]


def _pieces(trace: Trace) -> list[str]:
    return list(token_strings(trace.text, trace.offsets)[trace.n_prompt_tokens :])
