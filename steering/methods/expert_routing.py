"""RICE (arXiv 2505.14681): the experts that go with a model's thinking markers, and their weights turned up."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from reasonscope.data.errors import ArchitectureError, InputError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model

WEIGHTS = {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}  # of the paper


@dataclass(frozen=True, order=True)
class Expert:
    layer: int
    index: int


def npmi(on_markers: ArrayLike, in_total: ArrayLike, markers: int, tokens: int) -> NDArray[np.float64]:
    """[log2(k/M) + log2(T/K)] / log2(T/k) of experts chosen k times on M markers and K times on T tokens: −1 to 1, any shape.

    −1 where k = 0, its limit. Raises InputError unless k ≤ K ≤ T and k ≤ M, with at least one marker that is not all there is.
    """
    k, total = np.asarray(on_markers, dtype=np.float64), np.asarray(in_total, dtype=np.float64)
    if (
        not (0 < markers < tokens)
        or (k < 0).any()
        or (k > total).any()
        or (k > markers).any()
        or (total > tokens).any()
    ):
        raise InputError(
            f"{markers} markers of {tokens} tokens, chosen up to {k.max():g} times on them, {total.max():g} in all: "
            "counts of a part cannot be above those of the whole, and a marker is needed"
        )
    seen = np.maximum(k, 1)
    value = (np.log2(seen / markers) + np.log2(tokens / np.maximum(total, 1))) / np.log2(tokens / seen)
    return np.where(k > 0, value, -1.0)


@dataclass(frozen=True, kw_only=True)
class ExpertCounts:
    """How often each expert was chosen, (layer, expert): on each marker and in all; how often markers and tokens came."""

    on_markers: Mapping[str, NDArray[np.int64]]
    in_total: NDArray[np.int64]
    markers: Mapping[str, int]
    tokens: int


def cognitive_experts(counts: ExpertCounts, *, weights: Mapping[str, float] = WEIGHTS, top: int = 2) -> list[Expert]:
    """The `top` experts by Σ weight·nPMI over the markers, the best first. The paper takes 2.

    Departure: an expert that no marker ever met (and so every row of a dense block) is not a candidate. Its nPMI of −1 with each marker
    would otherwise win as soon as the negative weights outweigh the positive ones, as the paper's do. Raises InputError for fewer
    candidates than `top`.
    """
    met = np.any([counts.on_markers[name] > 0 for name in weights], axis=0)
    if met.sum() < top:
        raise InputError(
            f"{met.sum()} experts were chosen on a marker; {top} are asked for: give more text with {', '.join(weights)}"
        )
    score = sum(
        weight * npmi(counts.on_markers[name], counts.in_total, counts.markers[name], counts.tokens)
        for name, weight in weights.items()
    )
    order = np.argsort(-np.ravel(np.where(met, score, -np.inf)), kind="stable")[:top]
    return [Expert(*(int(i) for i in np.unravel_index(at, counts.in_total.shape))) for at in order]


def count_experts(
    model: Model, sequences: Sequence[Sequence[int]], markers: Mapping[str, int], *, batch_size: int = 8
) -> ExpertCounts:
    """How often `sequences` (token ids) go to each expert; `markers` are token ids by name. Dense layers count 0.

    Raises ArchitectureError for a dense model.
    """
    layers = [layer for layer in range(model.n_layers) if _router(model, layer) is not None]
    if not layers:
        raise ArchitectureError(f"{model.name} is no mixture of experts, so there are no experts to choose")
    sites = [Site("router", layer) for layer in layers]
    chosen: list[Tensor] = []
    flat: list[Tensor] = []
    for start in range(0, len(sequences), batch_size):
        ids, mask = left_padded(sequences[start : start + batch_size], model.device)
        seen = model.backend.forward(ids, mask=mask, read=sites, last_logits_only=True).activations
        real = mask.bool()
        flat.append(ids[real].cpu())
        chosen.append(torch.stack([_chosen(model, site, seen[site])[real] for site in sites], dim=1).cpu())
    tokens, picks = torch.cat(flat), torch.cat(chosen)  # (token), (token, layer, expert)

    def spread(counts: Tensor) -> NDArray[np.int64]:
        table = np.zeros((model.n_layers, counts.shape[1]), dtype=np.int64)
        table[layers] = counts.numpy()
        return table

    return ExpertCounts(
        on_markers={name: spread(picks[tokens == token].sum(0)) for name, token in markers.items()},
        in_total=spread(picks.sum(0)),
        markers={name: int((tokens == token).sum()) for name, token in markers.items()},
        tokens=len(tokens),
    )


@contextmanager
def reinforced(model: Model, experts: Sequence[Expert], beta: float) -> Iterator[None]:
    """Inside, the gate weights of `experts` are multiplied by β wherever they are chosen; nothing is re-routed or normalised anew.

    Works on the native model. Raises ArchitectureError for a layer without a router, InputError for a β that is not finite.
    """
    if not np.isfinite(beta):
        raise InputError(f"β = {beta}; a finite number is needed")
    with ExitStack() as stack:
        for layer in {expert.layer for expert in experts}:
            router = _router(model, layer)
            if router is None:
                raise ArchitectureError(f"block {layer} of {model.name} has no router")
            indices = [expert.index for expert in experts if expert.layer == layer]
            stack.callback(router.register_forward_hook(_scaling(indices, beta)).remove)
        yield


def _scaling(indices: Sequence[int], beta: float) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, scores, experts = output
        chosen = torch.isin(experts, torch.tensor(indices, device=experts.device))
        return logits, torch.where(chosen, scores * beta, scores), experts

    return hook


def _router(model: Model, layer: int) -> nn.Module | None:
    if model.layout.router is None:
        return None
    try:
        return model.layout.block(model.hf, layer).get_submodule(model.layout.router)
    except AttributeError:  # a dense block between
        return None


def _chosen(model: Model, site: Site, logits: Tensor) -> Tensor:
    """Which experts each token goes to: (batch, token, expert) of 0 and 1."""
    router = _router(model, site.layer)
    assert router is not None and model.layout.route is not None
    picked = model.layout.route(router, logits.flatten(0, 1))[2]
    table = torch.zeros(picked.shape[0], logits.shape[-1], dtype=torch.long, device=picked.device)
    return table.scatter(1, picked, 1).reshape(logits.shape).long()
