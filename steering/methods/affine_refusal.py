"""Refusal as an affine edit (arXiv 2411.09003): a state's projection on the direction is moved to that of the other class.

Projecting a direction out (`refusal`) moves both classes to 0, which may lie on either side of the boundary between them. Here harmful
requests are moved to where benign ones are, or the other way round, at the tokens where the direction was read: after the words that
introduce the verdict in the thinking, and after the closing tag. A model that decides in its thinking decides again when the answer begins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.models.model import Model
from reasonscope.steering.methods.refusal import (
    Contexts,
    Scores,
    answer_start,
    contexts,
    end_of_words,
    judged_halves,
    last_states,
    next_logprobs,
    refusal_logodds,
    select_direction,
)
from reasonscope.steering.vectors.application import VectorUse
from reasonscope.steering.vectors.contrast import mean_difference
from reasonscope.steering.vectors.operators import Clamp
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class _Classes:
    """Contexts (token ids that end in the state that is read) after which the model refuses, and after which it complies."""

    harmful: Contexts
    harmless: Contexts

    def __post_init__(self) -> None:
        if not self.harmful or not self.harmless:
            raise InputError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless contexts; both are needed: record more requests"
            )


def extract_affine_refusal(
    model: Model,
    classes: _Classes,
    held_out: _Classes,
    refusal_tokens: Sequence[int],
    *,
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
) -> SteeringVector:
    """mean(harmful) − mean(harmless) at the last token, at resid_pre of the layer where clamping does most; not normalised.

    The layer is chosen by the three scores of Arditi et al. (`select_direction`) on `held_out`, for the edit that will be made: refusal of
    harmful contexts whose last token is clamped to the harmless mean, refusal of harmless ones clamped to the harmful mean (at least
    `induce_threshold`), and KL on harmless ones clamped to their own mean (at most `kl_threshold` nats). `refusal_tokens` are the tokens
    that follow if the model will refuse, and not if it will comply. `provenance` records the mean projections: `towards` of the harmful,
    `away` of the harmless. Departures: the first score minus the second has to be lowest, since one direction serves both ways. Late
    layers are not left out, since nothing is projected out of what the model unembeds. Raises InputError if no layer passes.
    """
    means = {kind: last_states(model, getattr(classes, kind))[:, 0] for kind in ("harmful", "harmless")}
    directions = mean_difference(means["harmful"], means["harmless"])  # layer d_model
    levels = {kind: _projections(states.mean(axis=0), directions) for kind, states in means.items()}
    scores = _scores(model, directions, levels, held_out, refusal_tokens)
    both_ways = replace(scores, bypass=scores.bypass - scores.induce)
    choice = select_direction(both_ways, kl_threshold=kl_threshold, induce_threshold=induce_threshold, prune_share=0.0)
    if choice is None:
        raise InputError(
            f"no layer passes: the lowest KL is {np.nanmin(scores.kl):.3g} (at most {kl_threshold}), the highest induce score "
            f"{np.nanmax(scores.induce):.3g} (at least {induce_threshold}); give more contexts, or other words before the verdict"
        )
    site = Site("resid_pre", choice.layer)
    return SteeringVector(
        directions={site: directions[choice.layer].astype(np.float32)},
        method="refusal",
        sign="towards refusal",
        provenance={
            "towards": {str(site): float(levels["harmful"][choice.layer])},
            "away": {str(site): float(levels["harmless"][choice.layer])},
            "surviving": choice.n_surviving,
            "scores": {name: float(getattr(scores, name)[0, choice.layer]) for name in ("bypass", "induce", "kl")},
            "harmful": len(classes.harmful),
            "harmless": len(classes.harmless),
            "model": dict(model.fingerprint),
        },
    )


def clamped_refusal(
    model: Model, traces: Sequence[Trace], level: Literal["towards", "away"], *, verdict: str | None
) -> tuple[VectorUse, ...]:
    """Clamps to the level of the harmful (`towards`) or the harmless, in the close window and, if `verdict` is given, after these words of
    the thinking. Raises InputError if a class is empty or no layer passes."""
    made, held_out = judged_halves(traces)
    places = [(answer_start, Scope.of(model, on="close_window"))]
    if verdict:
        last = frozenset(model.tokenizer.encode(verdict, add_special_tokens=False)[-1:])
        places.insert(0, (partial(end_of_words, words=verdict), Scope.of(model, on="think", tokens=last)))
    parts: list[VectorUse] = []
    for end, scope in places:
        classes, others = (
            _Classes(harmful=contexts(of.harmful, end), harmless=contexts(of.harmless, end)) for of in (made, held_out)
        )
        # When the answer begins, the thinking has already given the verdict: changing it there alone may not be enough.
        least = -math.inf if parts else 0.0
        vector = extract_affine_refusal(model, classes, others, made.following(end), induce_threshold=least)
        (to,) = vector.provenance[level].values()
        parts.append(VectorUse(vector=vector, scope=scope, operator=Clamp(to=to)))
    return tuple(parts)


def _scores(
    model: Model,
    directions: NDArray[np.float64],
    levels: Mapping[str, NDArray[np.float64]],
    held_out: _Classes,
    refusal_tokens: Sequence[int],
) -> Scores:
    """The scores (1, layer): the last token is the only position."""
    plain = next_logprobs(model, held_out.harmless, {})
    bypass, induce, kl = (np.full((1, len(directions)), np.nan) for _ in range(3))
    for layer, direction in enumerate(directions.astype(np.float32)):
        if not direction.any():  # the embedding of the same token in both classes
            continue
        to_harmless, to_harmful = (
            {Site("resid_pre", layer): _clamped_last(direction, float(levels[kind][layer]))}
            for kind in ("harmless", "harmful")
        )
        bypass[0, layer] = refusal_logodds(next_logprobs(model, held_out.harmful, to_harmless), refusal_tokens)
        induce[0, layer] = refusal_logodds(next_logprobs(model, held_out.harmless, to_harmful), refusal_tokens)
        kl[0, layer] = float(kl_divergence(plain, next_logprobs(model, held_out.harmless, to_harmless)).mean())
    return Scores(bypass=bypass, induce=induce, kl=kl)


def _clamped_last(direction: NDArray[np.float32], level: float) -> Edit:
    clamp = Clamp(to=level)

    def edit(activation: torch.Tensor, _: Positions) -> torch.Tensor:
        last = clamp(activation[:, -1].float(), torch.from_numpy(direction).to(activation.device), 1.0)
        return torch.cat([activation[:, :-1], last[:, None].to(activation.dtype)], dim=1)

    return edit


def _projections(means: NDArray[np.float32], directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """The projection of each layer's mean on its direction (layer,); 0 if the direction is 0."""
    lengths = np.linalg.norm(directions, axis=-1)
    return np.asarray((means * directions).sum(axis=-1) / np.where(lengths > 0, lengths, 1.0))
