"""RICE (arXiv 2505.14681): find the experts that are chosen on a model's thinking markers, and turn their weights up."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from reasonscope.data.errors import ArchitectureError, InputError
from reasonscope.data.random_sets import Pool, distinct_sets
from reasonscope.probes.architecture.layout import chosen_experts
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model

WEIGHTS = {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}  # of the paper


@dataclass(frozen=True, order=True)
class Expert:
    """One expert of a mixture-of-experts block."""

    layer: int
    index: int


def npmi(on_markers: ArrayLike, in_total: ArrayLike, markers: int, tokens: int) -> NDArray[np.float64]:
    """[log2(k/M) + log2(T/K)] / log2(T/k) for experts chosen k times on M markers and K times on T tokens: from −1 to 1, any shape.

    It is −1, its limit, for k = 0. Raises InputError unless k ≤ K ≤ T, k ≤ M, and 0 < M < T.
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
            "counts of a part cannot exceed those of the whole, and there must be a marker and other tokens"
        )
    seen = np.maximum(k, 1)
    value = (np.log2(seen / markers) + np.log2(tokens / np.maximum(total, 1))) / np.log2(tokens / seen)
    return np.where(k > 0, value, -1.0)


@dataclass(frozen=True, kw_only=True)
class ExpertCounts:
    """How often each expert was chosen.

    Attributes:
        on_markers: By marker, the counts (layer, expert) on its tokens.
        in_total: The counts (layer, expert) on all tokens.
        markers: How often each marker occurs.
        tokens: How many tokens there are.
    """

    on_markers: Mapping[str, NDArray[np.int64]]
    in_total: NDArray[np.int64]
    markers: Mapping[str, int]
    tokens: int


def cognitive_experts(counts: ExpertCounts, *, weights: Mapping[str, float] = WEIGHTS, top: int = 2) -> list[Expert]:
    """The `top` experts by Σ weight·nPMI over the markers, best first. The paper takes 2.

    Departure: an expert that was never chosen on a marker (and so every row of a dense block) is not a candidate. Otherwise its nPMI of −1
    with each marker would win as soon as the negative weights outweigh the positive ones, as the paper's do. Raises InputError for fewer
    candidates than `top`.
    """
    met = np.any([counts.on_markers[name] > 0 for name in weights], axis=0)
    if met.sum() < top:
        raise InputError(
            f"{met.sum()} experts were chosen on a marker, but {top} are wanted: give more text with {', '.join(weights)}"
        )
    score = sum(
        weight * npmi(counts.on_markers[name], counts.in_total, counts.markers[name], counts.tokens)
        for name, weight in weights.items()
    )
    order = np.argsort(-np.ravel(np.where(met, score, -np.inf)), kind="stable")[:top]
    return [Expert(*(int(i) for i in np.unravel_index(at, counts.in_total.shape))) for at in order]


def random_experts(
    experts: Sequence[Expert], in_total: NDArray[np.int64], *, n_controls: int = 20, seed: int = 0
) -> list[tuple[Expert, ...]]:
    """Different sets of as many other experts of the same layers, of those that tokens go to: the control of `reinforced`.

    `in_total` (layer, expert) are the counts of `ExpertCounts`; an expert that is never chosen would be turned up without effect. The
    first sets share no expert with one another. Fewer sets if fewer exist; raises InputError if a layer has too few others.
    """
    chosen = set(experts)
    wanted = Counter(expert.layer for expert in sorted(chosen))
    pools = []
    for layer, n in wanted.items():
        others = [one for i in np.flatnonzero(in_total[layer]) if (one := Expert(layer, int(i))) not in chosen]
        if len(others) < n:
            raise InputError(
                f"block {layer} has {len(others)} other experts that tokens go to, fewer than the {n} that are turned up; turn up fewer"
            )
        pools.append(Pool(members=others, size=n))
    return distinct_sets(pools, n_controls, seed=seed)


def count_experts(
    model: Model, sequences: Sequence[Sequence[int]], markers: Mapping[str, int], *, batch_size: int = 8
) -> ExpertCounts:
    """How often the tokens of `sequences` (ids) go to each expert. `markers` are token ids by name; dense layers count 0.

    Raises ArchitectureError for a dense model.
    """
    layers = [layer for layer in range(model.n_layers) if _router(model, layer) is not None]
    if not layers:
        raise ArchitectureError(f"{model.name} is not a mixture of experts, so it has no experts to choose from")
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
    """Inside the block, the gate weights of `experts` are multiplied by β whenever they are chosen; routing and norm stay as they are.

    Works on the native model. Raises ArchitectureError for a layer without a router, InputError for a β that is not finite.
    """
    if not np.isfinite(beta):
        raise InputError(f"β = {beta}: give a finite number")
    with ExitStack() as stack:
        for layer in {expert.layer for expert in experts}:
            router = _router(model, layer)
            if router is None:
                raise ArchitectureError(f"block {layer} of {model.name} has no router")
            indices = [expert.index for expert in experts if expert.layer == layer]
            stack.callback(router.register_forward_hook(_scaling(indices, beta)).remove)
        yield


def _scaling(indices: Sequence[int], beta: float) -> Any:
    def hook(router: nn.Module, _: tuple[Any, ...], output: Any) -> tuple[Tensor, ...]:
        if not (isinstance(output, tuple) and len(output) == 3):
            raise ArchitectureError(
                f"{type(router).__name__} gives only logits, so the weights of its experts cannot be scaled; use another family"
            )
        logits, scores, experts = output
        chosen = torch.isin(experts, torch.tensor(indices, device=experts.device))
        return logits, torch.where(chosen, scores * beta, scores), experts

    return hook


def _router(model: Model, layer: int) -> nn.Module | None:
    path = model.layout.of_block[layer].router
    return None if path is None else model.layout.block(model.hf, layer).get_submodule(path)


def _chosen(model: Model, site: Site, logits: Tensor) -> Tensor:
    """Which experts each token goes to, (batch, token, expert) of 0 and 1."""
    router = _router(model, site.layer)
    assert router is not None
    picked = chosen_experts(router, logits.flatten(0, 1))
    table = torch.zeros(picked.shape[0], logits.shape[-1], dtype=torch.long, device=picked.device)
    return table.scatter(1, picked, 1).reshape(logits.shape).long()
