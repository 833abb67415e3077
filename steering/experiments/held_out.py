"""Extract from one part of a run and judge on the other; and the numbers of sweeps and ablations as JSON."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model, load_model
from reasonscope.steering.experiments.ablation import AblationEffect, RegenerationEffect
from reasonscope.steering.experiments.decoding_responses import DECODING_METHODS, DecodingResponse, decoding_response
from reasonscope.steering.experiments.dose_responses import DoseResponse, dose_response
from reasonscope.steering.experiments.experiment import Arm, SteeringExperiment
from reasonscope.steering.methods.registry import METHODS, ExtractionData, method
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A steering or decoding method, and the strengths or values to run it at; None for its own."""

    name: str
    values: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> "Asked":
        """Read `seal` or `seal:0.5,1`. Raises InputError for an unknown name or invalid numbers."""
        name, colon, numbers = text.partition(":")
        if name not in METHODS and name not in DECODING_METHODS:
            raise InputError(
                f"no steering method is called {name!r}; steering methods: {', '.join(METHODS)}; "
                f"decoding methods: {', '.join(DECODING_METHODS)}"
            )
        return cls(name=name, values=tuple(numbers_from(numbers)) if colon else None)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Ids of the traces to extract from, and the problems to judge on; no group of problems is on both sides."""

    ids: tuple[str, ...]
    held_out: tuple[Problem, ...]


def split_run(store: TraceStore, *, share: float, n: int | None, seed: int) -> Split:
    """Hold out a `share` of the problem groups of a run, and of these at most `n` problems. Raises InputError for too few groups."""
    problems: dict[str, list[Problem]] = {}
    for trace in store:
        problems.setdefault(trace.problem.group, []).append(trace.problem)
    groups = sorted(problems)
    random.Random(seed).shuffle(groups)
    held = groups[: round(share * len(groups))]
    if len(held) < 2 or len(held) == len(groups):
        raise InputError(
            f"{len(groups)} groups of problems, {len(held)} of them held out; at least 2 are needed to judge on, and some to extract from"
        )
    unique = {problem.id: problem for group in held for problem in problems[group]}
    ids = tuple(trace.id for trace in store if trace.problem.group not in set(held))
    return Split(ids=ids, held_out=tuple(unique.values())[:n])


def model_of_run(store: TraceStore, model: str | None, **how: Any) -> Model:
    """The model that wrote the run, or `model`; `how` goes to `load_model`. Raises InputError if the run does not name its model."""
    name = model or store.meta.get("model", {}).get("name")
    if not name:
        raise InputError(f"{store.path} does not say which model wrote it; give --model")
    return load_model(name, **how)


def sampling_of_run(store: TraceStore, seed: int) -> Sampling:
    """The sampling of the run, with another seed."""
    known = store.meta.get("sampling", {})
    return Sampling(**{**known, "seed": seed})


def source_of_run(
    model: Model,
    store: TraceStore,
    split: Split,
    *,
    sites: Sequence[Site] | None = None,
    verdict: str | None = None,
    fast: str | None = None,
) -> ExtractionData:
    """What a method may learn from: one side of the split."""
    return ExtractionData(model=model, store=store, ids=split.ids, sites=sites, verdict=verdict, fast=fast)


def respond(
    experiment: SteeringExperiment,
    source: ExtractionData,
    asked: Asked,
    *,
    strengths: Sequence[float] | None,
    n_controls: int,
    covariance: bool,
) -> DoseResponse | DecodingResponse:
    """Run a steering method, with vectors from one side of the split, on the other; or a decoding method.

    `strengths` replace a method's own if `asked` has none. With `covariance`, random vectors have the covariance of the states that the
    extraction could read: the thinking of its traces.
    """
    if asked.name in DECODING_METHODS:
        return decoding_response(experiment, source, asked.name, asked.values, n_controls=n_controls)
    chosen = method(asked.name)
    parts = chosen.parts(source)
    sites = [site for part in parts for site in part.vector.directions]
    states = {at: thinking_states(source.store, source.ids, at) for at in sites} if covariance else None
    return dose_response(
        experiment,
        parts,
        asked.values or strengths or chosen.strengths,
        name=asked.name,
        n_controls=n_controls,
        states=states,
    )


def thinking_states(store: TraceStore, ids: Sequence[str], site: Site) -> NDArray[np.float32]:
    """The stored states at `site` of every thinking token of these traces (row, d_model); the last token of a trace has none."""
    rows = [
        np.asarray(store.activations(id, str(site))[store.trace(id).tokens.thinking.slice], dtype=np.float32)
        for id in ids
    ]
    return np.concatenate(rows)


def vector_numbers(vector: SteeringVector) -> dict[str, Any]:
    """What a vector says about itself."""
    about = {key: value for key, value in vector.provenance.items() if key not in ("model", "groups")}
    return {
        "method": vector.method,
        "sign": vector.sign,
        "norms": {str(site): norm for site, norm in vector.norms.items()},
        "n_problems": len(vector.provenance.get("groups", ())),
        **about,
    }


def ablation_numbers(found: AblationEffect) -> dict[str, Any]:
    """The effect with its interval, the random controls, and the side effects."""
    low, high = np.quantile(found.null, [0.025, 0.975])
    return {
        "effect_nats_per_answer_token": _estimate_numbers(found.effect),
        "controls": {
            "what": found.control,
            "n": len(found.null),
            "mean": float(np.mean(found.null)),
            "ci": [float(low), float(high)],
        },
        "p_value": found.p_value,
        "smallest_p": found.smallest_p,
        "side_effects": _estimates(found.side_effects),
        "touched": found.n_edited,
        "how": found.ablation.how,
    }


def regeneration_numbers(found: RegenerationEffect) -> dict[str, Any]:
    """What the ablated model wrote, and what the random controls wrote."""
    return {
        **arm_numbers(found.arm),
        "random": [arm_numbers(arm) for arm in found.random],
        "excess_over_random": _estimates(found.excess),
    }


def arm_numbers(arm: Arm) -> dict[str, Any]:
    """An arm with its measures and their differences from the unsteered run."""
    return {
        "name": arm.name,
        "multiplier": arm.multiplier,
        "n_problems": arm.n_problems,
        "touched": arm.n_edited,
        "change": _estimate_numbers(arm.change),
        "measures": _estimates(arm.measures),
        "differences": _estimates(arm.differences),
    }


def response_numbers(response: DoseResponse | DecodingResponse) -> dict[str, Any]:
    """Every arm with its measures, and for each strength the excess over the random vectors."""
    if isinstance(response, DecodingResponse):
        return {
            "unit": response.unit,
            "n_problems": response.base.n_problems,
            "base": arm_numbers(response.base),
            "arms": [arm_numbers(arm) for arm in response.arms],
            "random": [arm_numbers(arm) for arm in response.nulls],
        }
    return {
        "sites": [str(site) for site in response.sites],
        "held_out": response.held_out,
        "n_problems": response.base.n_problems,
        "base": arm_numbers(response.base),
        "doses": [
            {
                "strength": dose.strength,
                "steered": arm_numbers(dose.steered),
                "reversed": arm_numbers(dose.reversed),
                "random": [arm_numbers(arm) for arm in dose.random],
                "excess_over_random": _estimates(dose.excess),
                "beyond_random": dose.beyond_random,
            }
            for dose in response.doses
        ],
    }


def _estimate_numbers(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci": list(estimate.interval)}


def _estimates(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: _estimate_numbers(estimate) for name, estimate in estimates.items()}


def numbers_from(text: str) -> Sequence[float]:
    """Read `-1,0.5,2`. Raises InputError for anything else."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"strengths {text!r}: write numbers separated by commas, such as 0.5,1,2") from error
