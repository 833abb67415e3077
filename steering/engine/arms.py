"""The arms of an experiment in vLLM: each condition is a recipe, and the requests of all of them share the engine's batches."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from reasonscope.data.errors import InputError
from reasonscope.data.progress import working
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.generation.rollout import as_trace, asked_of, trace_seed
from reasonscope.probes.models.model import Model
from reasonscope.probes.vllm.identity import Watch
from reasonscope.probes.vllm.verified import verified
from reasonscope.probes.vllm.writer import VllmWriter, vllm_writer
from reasonscope.steering.engine.in_engine import in_engine
from reasonscope.steering.exits.control import ExitControl
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.recipes.controls import ControlPart, exit_part
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.application import VectorUse
from reasonscope.steering.vectors.intervention import Steering, parts_of

_AT_ONCE = 8  # conditions whose requests are in the engine together


@dataclass(frozen=True, kw_only=True)
class EngineArms:
    """Writes what a model says under each condition with vLLM, for `SteeringExperiment(writer=…)`.

    Attributes:
        url: Address of a server of vLLM with vllm-lens, without /v1.
        workers: Requests at a time, of all conditions together.
        trusted: Send hooks, which the server runs as code, to an address that is not of this machine.
        how: Other options of `vllm_writer`.

    Raises:
        InputError: As it writes, for a condition that vLLM cannot run; nothing is asked for then.

    Example:
        writer = EngineArms(url="http://127.0.0.1:8000")
        experiment = SteeringExperiment(model, problems, sampling, writer=writer)
        response = dose_response(experiment, uses, [0.5, 1.0])
    """

    url: str
    workers: int = 16
    trusted: bool = False
    how: dict[str, Any] = field(default_factory=dict)

    def write(
        self,
        model: Model,
        problems: Sequence[Problem],
        sampling: Sampling,
        conditions: Sequence[Condition],
        *,
        samples: int = 1,
    ) -> list[list[Trace]]:
        """What each condition makes the model write: its traces in the order of the problems, with their samples together.

        Raises InputError for a condition that vLLM cannot run, and if the server cannot be reached or lies; StoreError if another model
        answers in between.
        """
        recipes = [recipe_of(one) for one in conditions]
        at_once = min(_AT_ONCE, len(recipes), self.workers)
        writers = [self._writer(model, recipe, self.workers // at_once) for recipe in recipes]
        known = Watch(self._writer(model, None, 1)).states
        with working("steering in vLLM", total=len(recipes), unit="conditions") as work:

            def arm(i: int) -> list[Trace]:
                prompt = _asking(model, problems, samples, conditions[i].prefill)
                found = _written(model, prompt, sampling, writers[i], Watch(writers[i], known))
                work.advance()
                return found

            return _side_by_side(arm, len(recipes), at_once)

    def _writer(self, model: Model, recipe: Recipe | None, workers: int) -> VllmWriter:
        steering = None if recipe is None else in_engine(recipe, model)
        return vllm_writer(self.url, model, steering=steering, trusted=self.trusted, workers=workers, **self.how)


def recipe_of(condition: Condition) -> Recipe | None:
    """The condition as a recipe; None for the unchanged model. Raises InputError for what a recipe in vLLM cannot say."""
    if condition.decode is not None:
        raise InputError(
            f"{condition.name!r} decodes by a loop of its own, which vLLM does not run; use --backend hooks"
        )
    exits = [one for one in condition.processors if isinstance(one, ExitControl)]
    steered = parts_of(condition.intervention) if condition.intervention is not None else ()
    edits = [one for one in steered if not isinstance(one, ExitControl)]
    others = [one for one in (*condition.processors, *edits) if not isinstance(one, ExitControl | Steering)]
    if others:
        raise InputError(
            f"{condition.name!r} changes how tokens are chosen or follows the text ({type(others[0]).__name__}), which vLLM does not do by "
            "HTTP; use --backend hooks"
        )
    uses = [
        VectorUse(vector=one.vector, scope=one.scope, operator=one.operator, strength=one.multiplier)
        for one in edits
        if isinstance(one, Steering)
    ]
    if not (uses or exits or condition.prefill):
        return None
    known: dict[str, Any] = {"controls": tuple(map(_exit_part, exits)), "prefill": condition.prefill}
    return replace(Recipe.of(uses, name=condition.name), **known) if uses else Recipe(name=condition.name, **known)


def _exit_part(control: ExitControl) -> ControlPart:
    places = control.places
    return exit_part(control.rule.name, control.threshold, probe=control.probe, kind=places.kind, every=places.every)


def _written(
    model: Model, asked: Sequence[tuple[Problem, int, list[int]]], sampling: Sampling, writer: VllmWriter, watch: Watch
) -> list[Trace]:
    """The traces of one condition, in the order in which they are asked for."""
    seeds = [trace_seed(sampling.seed, f"{problem.id}/{sample}") for problem, sample, _ in asked]
    found: dict[int, Trace] = {}
    for group in verified(writer, watch, [prompt for *_, prompt in asked], sampling, seeds, ()):
        for i, done, _ in group:
            problem, sample, _ = asked[i]
            found[i] = as_trace(model, problem, sample, done, replace(sampling, seed=seeds[i]))
    return [found[i] for i in range(len(asked))]


def _asking(
    model: Model, problems: Sequence[Problem], samples: int, prefill: str
) -> list[tuple[Problem, int, list[int]]]:
    asked = [(problem, sample) for problem in problems for sample in range(samples)]
    prompts = asked_of(model, asked, prefill=prefill)
    return [(*one, prompt) for one, prompt in zip(asked, prompts, strict=True)]


def _side_by_side(arm: Callable[[int], list[Trace]], n: int, at_once: int) -> list[list[Trace]]:
    """All arms, some at a time; after an error none is begun any more."""
    threads = ThreadPoolExecutor(at_once)
    try:
        return list(threads.map(arm, range(n)))
    finally:
        threads.shutdown(cancel_futures=True)
