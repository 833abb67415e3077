"""Activation-steered compression (ASC, arXiv 2507.04742): from verbose to concise answers, as strongly as a bound on the KL allows."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.untrusted import json_lines
from reasonscope.data.text.steps_and_sentences import steps
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Positions, gradients
from reasonscope.probes.backends.hooks import eager_attention
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.determinism import at_least_float32
from reasonscope.probes.models.model import Model
from reasonscope.steering.methods.kl_bounds import KLBound, kl_bound
from reasonscope.steering.vectors.contrast import (
    Read,
    contrast_of_states,
    contrast_vector,
    mean_difference,
    replayed_states,
)
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class CompletionPair:
    """One question answered briefly and at length, as text.

    Attributes:
        question: What was asked, without an instruction.
        concise: The brief completion, with its thinking.
        verbose: The long completion, with its thinking.
        id: The problem; pairs of a held-out problem are not learned from.
        concise_instruction: What followed the question for the brief completion.
        verbose_instruction: What followed it for the long one.
    """

    question: str
    concise: str
    verbose: str
    id: str = ""
    concise_instruction: str = ""
    verbose_instruction: str = ""

    def __post_init__(self) -> None:
        for side in ("question", "concise", "verbose"):
            if not getattr(self, side).strip():
                raise InputError(
                    f"a pair has no {side!r}; give the question and both completions, or leave the pair out"
                )


def load_pairs(path: str | Path) -> list[CompletionPair]:
    """The pairs of a JSONL file: `question`, `concise` and `verbose` in each line, and if known `id` and the two instructions.

    Raises InputError, the line named.
    """
    pairs = []
    for where, row in json_lines(Path(path)):
        try:
            given = {item.name: str(row.get(item.name) or "") for item in fields(CompletionPair)}
            pairs.append(CompletionPair(**given))
        except (ValueError, AttributeError) as error:
            raise InputError(f"{where}: {error}") from error
    if not pairs:
        raise InputError(f"{path} holds no pair; make some: {PAIRS}")
    return pairs


Verbose = Literal["detail", "default"]
# How a user without such a run gets pairs.
PAIRS = "reasonscope steer pairs --model MODEL --problems problems.jsonl --out pairs.jsonl, then --pairs pairs.jsonl"


def mode_pairs(traces: Iterable[Trace], *, verbose: Verbose = "detail") -> list[tuple[Trace, Trace]]:
    """(brief, verbose) traces by problem: the verbose side was asked for detail or, with `default`, for nothing in particular.

    Traces in other modes are left out. Raises InputError if a problem has only one side, or if no problem has both.
    """
    sides: dict[str, dict[str, Trace]] = {}
    for trace in traces:
        if (mode := trace.problem.meta.get("mode")) in ("brief", verbose):
            sides.setdefault(f"{trace.problem.group}/{trace.sample}", {})[mode] = trace
    if verbose == "default":  # most problems are asked in this mode only
        sides = {name: side for name, side in sides.items() if "brief" in side}
    if missing := [name for name, side in sides.items() if len(side) < 2]:
        there = next(iter(sides[missing[0]]))
        raise InputError(
            f"{missing[0]} was answered in mode {there!r} only; record it in the modes brief and {verbose}"
        )
    if not sides:
        raise InputError(
            f"no problem of the run was asked both briefly and at length (mode brief and {verbose} in its meta); make pairs: {PAIRS}"
        )
    return [(side["brief"], side[verbose]) for side in sides.values()]


def extract_asc(
    store: TraceStore,
    sites: Sequence[Site],
    *,
    read: Read = "end",
    verbose: Verbose = "detail",
    ids: Iterable[str] | None = None,
) -> SteeringVector:
    """v = (1/N) Σᵢ [h(concise)ᵢ − h(verbose)ᵢ] from a run whose problems were asked in mode brief and in mode `verbose`.

    By default it is read at the last token that was fed, as in the paper; adding it shortens. Departures: the prompts of the two modes
    differ in their last words; the paper puts the same question before both completions (as `extract_asc_from_pairs` does).
    """
    pairs = mode_pairs((store.trace(id) for id in (store.ids if ids is None else ids)), verbose=verbose)
    if read == "separators":
        pairs = [pair for pair in pairs if all(steps(trace) for trace in pair)]
    return contrast_vector(store, pairs, sites, read=read, method="asc", provenance={"source": f"brief, {verbose}"})


def extract_asc_of_traces(
    model: Model, pairs: Sequence[tuple[Trace, Trace]], sites: Sequence[Site], *, read: Read
) -> SteeringVector:
    """The same from (concise, verbose) traces that no run holds; the model reads them again.

    Raises InputError if none can be read at `read`.
    """
    if read == "separators" and not (pairs := [pair for pair in pairs if all(steps(trace) for trace in pair)]):
        raise InputError(
            "in no pair do both sides have a blank line in their thinking, so no step starts there; make longer pairs"
        )
    states = replayed_states(model, pairs, sites, read)
    about = {"source": "pairs", "read": read, "model": dict(model.fingerprint)}
    return contrast_of_states(states, method="asc", provenance=about)


def extract_asc_from_pairs(
    model: Model, pairs: Sequence[CompletionPair], sites: Sequence[Site], *, batch_size: int = 8
) -> SteeringVector:
    """The vector as published: each completion follows the plain question, without a template, and is read at its last token.

    Added, it shortens (the released script subtracts short − long). Departures: it is added at the site that was read (the released code
    adds one block later), and the verbose side holds its question once (there twice). Raises InputError without a pair.
    """
    if not pairs:
        raise InputError("no pairs given; give at least one with a concise and a verbose side")
    texts = [pair.question + side for pair in pairs for side in (pair.concise, pair.verbose)]
    sequences = [model.encode_text(text) for text in texts]
    states: dict[Site, list[NDArray[np.float32]]] = {site: [] for site in sites}
    for start in range(0, len(sequences), batch_size):
        ids, mask = left_padded(sequences[start : start + batch_size], model.device)
        seen = model.backend.forward(ids, mask=mask, read=tuple(sites), last_logits_only=True).activations
        for site in sites:
            states[site] += list(seen[site][:, -1].float().cpu().numpy())
    directions = {
        site: mean_difference(np.array(of[0::2]), np.array(of[1::2])).astype(np.float32) for site, of in states.items()
    }
    provenance = {"source": "pairs", "pairs": len(pairs), "model": dict(model.fingerprint)}
    return SteeringVector(directions=directions, method="asc", provenance=provenance)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How strongly a KL bound allows a vector to steer, and what that does to held-out states.

    Attributes:
        bound: The bound, for the direction at length 1.
        multiplier: γ* as a multiplier of the vector itself: `Steering(vector, multiplier, …)`.
        measured: KL(unsteered ‖ steered by γ*) of each held-out state (state,), in nats.
        random: The same for a random direction of the same length.
    """

    bound: KLBound
    multiplier: float
    measured: NDArray[np.float64]
    random: NDArray[np.float64]

    @property
    def within(self) -> float:
        """The share of the held-out states whose KL is at most ε."""
        return float((self.measured <= self.bound.epsilon).mean())


def calibrate(
    model: Model,
    vector: SteeringVector,
    contexts: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    epsilon: float = 1e-3,
    slope_quantile: float = 0.5,
    curvature_quantile: float = 0.95,
    seed: int = 0,
) -> Calibration:
    """The strength that the KL bound allows, from `contexts` (token ids; each ends in the state that is steered), and its true KL.

    a = median of ‖∂z/∂γ‖ and L = 95th percentile of ‖∂²z/∂γ²‖ over the contexts (50 in the paper), for the logits z(h + γ·v/‖v‖) at γ = 0.
    With a median, the bound need not hold for every state, so the real KL is measured on `held_out`; a larger `slope_quantile` makes it
    stricter. Raises InputError for a vector with more than one site, a zero vector, or without contexts.
    """
    if len(vector.directions) != 1 or not contexts or not held_out:
        raise InputError(
            f"a vector at {len(vector.directions)} sites, {len(contexts)} contexts, {len(held_out)} held-out ones; "
            "a strength is calibrated for one site, with at least one context of each kind"
        )
    ((site, norm),) = vector.norms.items()
    if not norm:
        raise InputError("the vector is 0, so no strength does anything; extract it again")
    direction = torch.from_numpy(vector.directions[site] / np.float32(norm))
    slopes, curvatures = _logit_derivatives(model, site, direction, contexts)
    bound = kl_bound(
        float(np.quantile(slopes, slope_quantile)), float(np.quantile(curvatures, curvature_quantile)), epsilon
    )
    other = torch.from_numpy(vector.random_like(seed).directions[site] / np.float32(norm))
    return Calibration(
        bound=bound,
        multiplier=bound.gamma_star / norm,
        measured=last_token_kl(model, site, direction * bound.gamma_star, held_out),
        random=last_token_kl(model, site, other * bound.gamma_star, held_out),
    )


def _logit_derivatives(
    model: Model, site: Site, direction: Tensor, contexts: Sequence[Sequence[int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """‖∂z/∂γ‖ and ‖∂²z/∂γ²‖ (context,) of the next-token logits at γ = 0, `direction` (d_model,) added to the last token only.

    The first is exact, by forward mode. The second is a difference of first derivatives at ±1 % of the state's norm: forward mode twice is
    off by several percent for models with LayerNorm, since torch's rule treats the inverse deviation as a constant.
    """
    along = torch.ones(1, device=model.device)
    slopes, curvatures = [], []
    with (
        warnings.catch_warnings(),
        eager_attention(model.hf),
        gradients(),
    ):  # fused attention has no forward-mode derivative
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch compiles its own rules with functions that it deprecates
        for context in contexts:
            logits = partial(_logits, model, site, direction, context)
            step = 0.01 * _state_length(model, site, context)
            low, here, high = (jvp(logits, (gamma * along,), (along,))[1].detach() for gamma in (-step, 0.0, step))
            slopes.append(float(here.norm()))
            curvatures.append(float((high - low).norm()) / (2 * step))
    return np.array(slopes), np.array(curvatures)


def last_token_kl(model: Model, site: Site, shift: Tensor, contexts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """KL(unsteered ‖ steered) of the next token in nats (context,), `shift` (d_model,) added to each context's last token."""
    divergences = []
    for context in contexts:
        before, after = (
            _logits(model, site, shift, context, torch.tensor([gamma])).detach().double().log_softmax(-1)
            for gamma in (0.0, 1.0)
        )
        divergences.append(float(kl_divergence(before, after).clamp(min=0)))
    return np.array(divergences)


def _state_length(model: Model, site: Site, context: Sequence[int]) -> float:
    ids, mask = left_padded([context], model.device)
    return float(model.backend.forward(ids, mask=mask, read=[site]).activations[site][0, -1].detach().norm())


def _logits(model: Model, site: Site, direction: Tensor, context: Sequence[int], gamma: Tensor) -> Tensor:
    """Next-token logits (vocab,) after `context`, with γ·`direction` added to its last token; γ is (1,)."""

    def edit(activation: Tensor, _: Positions) -> Tensor:
        last = activation[:, -1:] + gamma.to(activation.device) * direction.to(activation)
        return torch.cat([activation[:, :-1], last.to(activation.dtype)], dim=1)

    ids, mask = left_padded([context], model.device)
    logits: Tensor = model.backend.forward(ids, mask=mask, write={site: edit}, last_logits_only=True).logits[0, -1]
    return at_least_float32(logits)
