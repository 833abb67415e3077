"""The refusal direction (Arditi et al., arXiv 2406.11717): a difference of means, chosen by what it does, then added or ablated."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.contrast import mean_difference
from reasonscope.steering.vectors.operators import project_out
from reasonscope.steering.vectors.vector import SteeringVector

Contexts = Sequence[Sequence[int]]
_EPSILON = 1e-8  # keeps the odds finite, as in the released code


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What each candidate does, (position, layer); the last row is the last token. Refusal is measured in log-odds of `refusal_tokens`.

    Attributes:
        bypass: Refusal of harmful contexts with the direction ablated everywhere.
        induce: Refusal of harmless contexts with the direction added at its own layer.
        kl: KL(unsteered ‖ ablated) of the next token on harmless contexts, in nats.
    """

    bypass: NDArray[np.float64]
    induce: NDArray[np.float64]
    kl: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _DirectionChoice:
    """The chosen candidate: its `position` from the end (−1 is the last token), its `layer`, and how many passed the rule."""

    position: int
    layer: int
    n_surviving: int


def select_direction(
    scores: Scores, *, kl_threshold: float = 0.1, induce_threshold: float = 0.0, prune_share: float = 0.2
) -> _DirectionChoice | None:
    """The candidate with the lowest bypass score among those with KL at most, and induce score at least, its threshold.

    Candidates in the last `prune_share` of the layers, or with a score that is NaN, are left out. Ties go to the first, by position and
    then by layer. None if no candidate survives.
    """
    n_positions, n_layers = scores.bypass.shape
    survives = np.isfinite(scores.bypass) & np.isfinite(scores.induce) & np.isfinite(scores.kl)
    survives &= (scores.kl <= kl_threshold) & (scores.induce >= induce_threshold)
    survives[:, int(n_layers * (1 - prune_share)) :] = False
    if not survives.any():
        return None
    row, layer = np.unravel_index(np.where(survives, scores.bypass, np.inf).argmin(), survives.shape)
    return _DirectionChoice(position=int(row) - n_positions, layer=int(layer), n_surviving=int(survives.sum()))


def _none_passes(scores: Scores, kl_threshold: float, induce_threshold: float, prune_share: float) -> str:
    """How close the candidates came that the rule may choose, and what else may work."""
    n = int(scores.kl.shape[1] * (1 - prune_share))
    lowest, highest = np.nanmin(scores.kl[:, :n], initial=np.inf), np.nanmax(scores.induce[:, :n], initial=-np.inf)
    return (
        f"no direction of the first {n} layers passes the published rule: the lowest KL is {lowest:.3g} (at most {kl_threshold}), the "
        f"highest induce score {highest:.3g} (at least {induce_threshold}), and one direction has to pass both; methods refusal and "
        "refusal-ablate also try the last layers, and the words before the verdict (--verdict)"
    )


def answer_start(trace: Trace) -> int | None:
    """The token at which the answer begins; None if the thinking was not closed."""
    return None if trace.state == "truncated" else trace.tokens.answer.start


def end_of_words(trace: Trace, words: str) -> int | None:
    """The token after the first `words` in the thinking; None without them. Raises InputError if they end inside a token."""
    at = trace.text.find(words, trace.chars.thinking.start, trace.chars.thinking.stop)
    if at < 0:
        return None
    stop = int(np.searchsorted(trace.offsets[:, 1], at + len(words)))
    if trace.offsets[stop, 1] != at + len(words):
        raise InputError(
            f"trace {trace.id!r}: {words!r} ends inside a token; give words that end together with a token"
        )
    return stop + 1


def contexts(traces: Iterable[Trace], end: Callable[[Trace], int | None]) -> list[list[int]]:
    """The tokens of each trace up to `end(trace)`; traces for which it returns None are left out."""
    cuts = ((trace, end(trace)) for trace in traces)
    return [trace.token_ids[:stop].tolist() for trace, stop in cuts if stop is not None]


def answer_contexts(traces: Iterable[Trace]) -> list[list[int]]:
    """The tokens before each answer, of the traces that closed their thinking or never thought."""
    return contexts(traces, answer_start)


def contexts_until(traces: Iterable[Trace], words: str) -> list[list[int]]:
    """The tokens up to the end of the first `words` in the thinking, of each trace that has them.

    A reasoning model may decide in its thinking, long before the answer begins; `words` are what comes right before its verdict. Raises
    InputError if no trace has them, or they end inside a token.
    """
    found = contexts(traces, partial(end_of_words, words=words))
    if not found:
        raise InputError(f"no trace has {words!r} in its thinking; give words that come right before the verdict")
    return found


@dataclass(frozen=True, kw_only=True)
class _DirectionScore:
    """Traces of harmful requests that were refused, and of benign ones that were complied with."""

    harmful: tuple[Trace, ...]
    harmless: tuple[Trace, ...]

    def following(self, end: Callable[[Trace], int | None]) -> list[int]:
        """The tokens that follow the contexts of refused requests, and never those of the others."""
        sides = [
            {int(trace.token_ids[stop]) for trace in of if (stop := end(trace)) is not None}
            for of in (self.harmful, self.harmless)
        ]
        return sorted(sides[0] - sides[1])


def judged_halves(traces: Iterable[Trace]) -> tuple[_DirectionScore, _DirectionScore]:
    """Split requests (whose problems say whether they are `harmful`): half of the groups make directions, half choose among them."""
    asked = [trace for trace in traces if isinstance(trace.problem.meta.get("harmful"), bool)]
    groups = sorted({trace.problem.group for trace in asked})
    random.Random(0).shuffle(groups)
    first = set(groups[: len(groups) // 2])

    def half(made: bool) -> _DirectionScore:
        mine = [trace for trace in asked if (trace.problem.group in first) is made]
        return _DirectionScore(
            harmful=tuple(t for t in mine if t.problem.meta["harmful"] and behaviour(t) == "refused"),
            harmless=tuple(t for t in mine if not t.problem.meta["harmful"] and behaviour(t) == "complied"),
        )

    return half(True), half(False)


def refusal_candidates(
    model: Model, harmful: Contexts, harmless: Contexts, *, n_positions: int, batch_size: int = 16
) -> NDArray[np.float64]:
    """mean(harmful) − mean(harmless) at resid_pre of every block, at the last `n_positions` tokens: (position, layer, d_model).

    Raises InputError for an empty class, or a context with fewer tokens than positions.
    """
    shortest = min((len(context) for context in [*harmful, *harmless]), default=0)
    if not 1 <= n_positions <= shortest:
        raise InputError(
            f"{n_positions} positions from the end: give 1 to {shortest}, the length of the shortest context"
        )
    means = [last_states(model, contexts, n=n_positions, batch_size=batch_size) for contexts in (harmful, harmless)]
    return mean_difference(means[0], means[1])


def last_states(model: Model, contexts: Contexts, *, n: int = 1, batch_size: int = 16) -> NDArray[np.float32]:
    """What enters each block at the last `n` tokens of each context: (context, position, layer, d_model)."""
    sites = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    states: list[NDArray[np.float32]] = []
    for start in range(0, len(contexts), batch_size):
        ids, mask = left_padded(contexts[start : start + batch_size], model.device)
        seen = model.backend.forward(ids, mask=mask, read=sites, last_logits_only=True).activations
        states += list(torch.stack([seen[site][:, -n:] for site in sites], 2).float().cpu().numpy())
    return np.array(states)


def refusal_scores(
    model: Model,
    candidates: NDArray[np.floating],
    harmful: Contexts,
    harmless: Contexts,
    refusal_tokens: Sequence[int],
) -> Scores:
    """The three scores of each of `candidates` (position, layer, d_model). Use contexts that no candidate was made from.

    `refusal_tokens` are the tokens that a refusal begins with ("I" for most models). Contexts should end where the answer begins: for a
    reasoning model after the closing tag, since the token after its prompt begins a thought and not an answer.
    """
    if not refusal_tokens or not harmful or not harmless:
        raise InputError(
            f"{len(refusal_tokens)} refusal tokens, {len(harmful)} harmful and {len(harmless)} harmless contexts: give at least one of each"
        )
    plain = next_logprobs(model, harmless, {})
    shape = candidates.shape[:2]
    bypass, induce, kl = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    for at in np.ndindex(*shape):
        direction = candidates[at].astype(np.float32)
        if not np.isfinite(direction).all() or not direction.any():
            continue
        removed = ablated_everywhere(model, direction)
        added = {Site("resid_pre", at[1]): _addition(direction)}
        bypass[at] = refusal_logodds(next_logprobs(model, harmful, removed), refusal_tokens)
        induce[at] = refusal_logodds(next_logprobs(model, harmless, added), refusal_tokens)
        kl[at] = float(kl_divergence(plain, next_logprobs(model, harmless, removed)).mean())
    return Scores(bypass=bypass, induce=induce, kl=kl)


def extract_refusal(
    model: Model,
    harmful: Contexts,
    harmless: Contexts,
    held_out_harmful: Contexts,
    held_out_harmless: Contexts,
    refusal_tokens: Sequence[int],
    *,
    n_positions: int = 1,
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
    prune_share: float = 0.2,
) -> SteeringVector:
    """The chosen direction at resid_pre of its layer, not normalised: adding it makes the model refuse, ablating it makes it comply.

    Raises InputError if no candidate passes the rule; the message says how close they came, and what else may work.
    """
    candidates = refusal_candidates(model, harmful, harmless, n_positions=n_positions)
    scores = refusal_scores(model, candidates, held_out_harmful, held_out_harmless, refusal_tokens)
    choice = select_direction(
        scores, kl_threshold=kl_threshold, induce_threshold=induce_threshold, prune_share=prune_share
    )
    if choice is None:
        raise InputError(_none_passes(scores, kl_threshold, induce_threshold, prune_share))
    provenance = {
        "position": choice.position,
        "surviving": choice.n_surviving,
        "scores": {
            name: float(getattr(scores, name)[choice.position, choice.layer]) for name in ("bypass", "induce", "kl")
        },
        "harmful": len(harmful),
        "harmless": len(harmless),
        "model": dict(model.fingerprint),
    }
    direction = candidates[choice.position, choice.layer].astype(np.float32)
    return SteeringVector(
        directions={Site("resid_pre", choice.layer): direction}, method="refusal", provenance=provenance
    )


def ablated_everywhere(model: Model, direction: NDArray[np.floating]) -> Mapping[Site, Edit]:
    """x ← x − r̂ r̂ᵀx at every position of everything that makes up the residual stream: the input of the first block, and what each
    attention and MLP adds. The released code also edits the stream before each block, which is then clean already, up to rounding."""
    if not np.isfinite(direction).all() or not (norm := float(np.linalg.norm(direction))):
        raise InputError("the direction is 0 or holds NaN; extract it again")
    unit = torch.from_numpy((direction / norm).astype(np.float32))

    def remove(activation: Tensor, _: Positions) -> Tensor:
        return project_out(activation, unit.to(activation))

    written = [Site(point, layer) for layer in range(model.n_layers) for point in ("attn_out", "mlp_out")]
    return dict.fromkeys([Site("resid_pre", 0), *written], remove)


def refusal_logodds(logprobs: Tensor, refusal_tokens: Sequence[int]) -> float:
    """Mean over contexts of log(p + 1e-8) − log(1 − p + 1e-8), p the probability of the `refusal_tokens`, from (context, vocab)."""
    p = logprobs[:, list(refusal_tokens)].exp().sum(dim=-1).clamp(max=1.0)
    return float((torch.log(p + _EPSILON) - torch.log(1 - p + _EPSILON)).mean())


def _addition(direction: NDArray[np.float32]) -> Edit:
    def add(activation: Tensor, _: Positions) -> Tensor:
        return activation + torch.from_numpy(direction).to(activation)

    return add


def next_logprobs(model: Model, contexts: Contexts, edits: Mapping[Site, Edit], batch_size: int = 16) -> Tensor:
    """Log-probabilities of the token after each context: (context, vocab), float64, in nats."""
    parts = []
    for start in range(0, len(contexts), batch_size):
        ids, mask = left_padded(contexts[start : start + batch_size], model.device)
        logits = model.backend.forward(ids, mask=mask, write=edits, last_logits_only=True).logits[:, -1]
        parts.append(logits.double().log_softmax(-1).cpu())
    return torch.cat(parts)
