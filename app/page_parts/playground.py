"""The playground: one problem answered with and without steering, from the same seed, and where the two diverge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.data.errors import InputError
from reasonscope.data.text.align import token_strings
from reasonscope.data.trace import Message, Problem, Sampling, Trace

if TYPE_CHECKING:
    from reasonscope.probes.generation.decoding import DecodingStep
    from reasonscope.probes.models.model import Model
    from reasonscope.steering.vectors.vector import SteeringVector

SCOPES = {"every token of the thinking": False, "where steps begin": True}


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
        kl: Mean divergence of the steered model from the base over the base's tokens, in nats per token.
        n_edited: How many tokens were edited.
    """

    base: Side
    steered: Side
    parted: int | None
    kl: float
    n_edited: int


def vectors_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@lru_cache(maxsize=1)
def loaded(name: str, run: OpenRun) -> "Model":
    """The model, kept while the app runs; it finds thinking and renders prompts as the run says."""
    from reasonscope.probes.models.model import load_model
    from reasonscope.probes.models.prompting import as_recorded

    return load_model(name, **as_recorded(run.store.meta, {}))


def _mixed(weights: Mapping[Path, float]) -> "SteeringVector":
    """The weighted sum of vectors, by site. Raises InputError if all weights are 0 or the vectors differ in width."""
    from reasonscope.probes.architecture.sites import Site
    from reasonscope.steering.vectors.vector import SteeringVector

    directions: dict[Site, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    for path, weight in weights.items():
        for site, direction in SteeringVector.load(path).directions.items():
            if site in directions and directions[site].shape != direction.shape:
                raise InputError(f"{path.name} differs in width from the other vectors; choose vectors of one model")
            directions[site] = (directions.get(site, 0) + np.float32(weight) * direction).astype(np.float32)
    if not directions or not any(weights.values()):
        raise InputError("every vector has strength 0; move a slider to steer")
    return SteeringVector(directions=directions, method="mix", provenance={p.stem: w for p, w in weights.items()})


def duel(
    model: "Model",
    question: str,
    weights: Mapping[Path, float],
    *,
    at_separators: bool,
    sampling: Sampling,
    tell: Callable[[str, int], None],
) -> Duel:
    """Answer `question` with and without steering.

    `tell` is called with the side and the number of each token; what it raises stops the work.
    """
    from reasonscope.probes.generation.rollout import rollouts
    from reasonscope.steering.experiments.side_effects import divergences, generated, logits_function
    from reasonscope.steering.vectors.intervention import Steering
    from reasonscope.steering.vectors.scope import Scope

    problem = Problem(id="playground", messages=(Message(role="user", content=question),))
    (base,) = rollouts(model, [problem], sampling, on_step=lambda step: tell("base", step.index))
    steering = Steering(_mixed(weights), 1.0, Scope.thinking(model, at_separators=at_separators))

    def follow(step: "DecodingStep") -> None:
        steering.on_step(step)
        tell("steered", step.index)

    (steered,) = rollouts(model, [problem], sampling, write=steering.edits, on_step=follow)
    n_edited = steering.n_edited
    if n_edited == 0:
        raise InputError("the vector edited no token: none of the generated tokens is in its scope")
    again = Steering(_mixed(weights), 1.0, Scope.thinking(model, at_separators=at_separators))
    divergent = divergences(model, [base], [logits_function(model, again)], {"all": generated})[0]["all"]
    return Duel(
        base=_side(base),
        steered=_side(steered),
        parted=_parted(base, steered),
        kl=float(divergent.kl.sum() / divergent.n_tokens.sum()),
        n_edited=n_edited,
    )


def _side(trace: Trace) -> Side:
    pieces = token_strings(trace.text, trace.offsets)[trace.n_prompt_tokens :]
    return Side(
        tokens=tuple(pieces),
        thinking_tokens=trace.n_thinking_tokens,
        answer=trace.answer_text.strip(),
        finish=trace.finish_reason,
    )


def _parted(base: Trace, steered: Trace) -> int | None:
    """The first generated token in which the two differ; the end of one of them counts as a difference."""
    ids = [trace.token_ids[trace.n_prompt_tokens :].tolist() for trace in (base, steered)]
    for i, (a, b) in enumerate(zip(*ids, strict=False)):
        if a != b:
            return i
    return None if len(ids[0]) == len(ids[1]) else min(map(len, ids))
