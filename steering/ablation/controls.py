"""The controls of an ablation: different random sets of other heads, MLPs, layers, neurons, experts, latents, tokens or edges."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.random_sets import Pool, distinct_sets
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.heads import Head, all_heads, random_heads
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.models.determinism import at_least_float32
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.interventions import ReferenceStates, width_of
from reasonscope.steering.ablation.knockout import Edges
from reasonscope.steering.ablation.targets import Ablation, Neuron
from reasonscope.steering.methods.expert_routing import Expert
from reasonscope.steering.recipes.description import describe_scope
from reasonscope.steering.vectors.scope import Scope

_MOST_TRIES = 50  # draws of random tokens per control; beyond that no new ones are to be expected
_CONTROL = {
    "heads": "as many random heads of the same layers",
    "mlps": "as many random other MLPs",
    "layers": "as many random other layers",
    "neurons": "as many random neurons of the same layers",
    "experts": "as many random experts of the same layers",
    "latents": "as many random other latents that are active on the traces",
    "directions": "random directions that move each state as far",
    "tokens": "as many random tokens of the same traces",
    "edges": "edges to as many random tokens",
}


def control_words(ablation: Ablation, drawn: Sequence[Ablation], traces: Sequence[Trace]) -> str:
    """What the controls are, and whether they are weaker than they should be."""
    if ablation.heads and not all(_of_same_layers(ablation.heads, one.heads) for one in drawn):
        return "as many random heads, of other layers too"
    said = _CONTROL[ablation.kind]
    scope, *others = (one.tokens or (one.edges.read if one.edges else None) for one in (ablation, *drawn))
    if scope and any(other and _share_tokens(scope, other, traces) for other in others):
        return f"{said}, removed ones among them if too few others are left"
    return said


def _of_same_layers(heads: Sequence[Head], others: Sequence[Head]) -> bool:
    """Whether two sets have as many heads of each layer."""
    counts = (Counter(head.layer for head in one) for one in (set(heads), set(others)))
    return next(counts) == next(counts)


def _share_tokens(scope: Scope, other: Scope, traces: Sequence[Trace]) -> bool:
    """Whether both name the same token of any trace."""
    for trace in traces:
        ids, n_prompt = torch.from_numpy(trace.token_ids[None]), torch.tensor([trace.n_prompt_tokens])
        if (scope.mask(ids, n_prompt=n_prompt) & other.mask(ids, n_prompt=n_prompt)).any():
            return True
    return False


def random_ablations(
    model: Model,
    ablation: Ablation,
    traces: Sequence[Trace] = (),
    *,
    bank: ReferenceStates | None = None,
    n_controls: int = 20,
    seed: int = 0,
) -> list[Ablation]:
    """At most `n_controls` different random ablations of the same kind and size, none of them the ablation itself.

    Random tokens differ if they do so in any of `traces`; random latents are drawn from those that are active in `bank`. Directions have
    none: their control are other directions (`MatchedMove`). Raises InputError if too few other heads, layers, units or latents are left.
    """
    how = {"n_controls": n_controls, "seed": seed}
    if ablation.heads:
        sets = random_heads(ablation.heads, all_heads(model.layout), n_controls=n_controls, seed=seed)
        return [replace(ablation, heads=tuple(sorted(one))) for one in sets]
    if ablation.mlps or ablation.layers:
        return _other_layers(model, ablation, **how)
    if ablation.neurons:
        found = _other_units(model, "mlp_post", [(one.layer, one.index) for one in ablation.neurons], **how)
        return [replace(ablation, neurons=tuple(Neuron(layer=a, index=b) for a, b in one)) for one in found]
    if ablation.experts:
        found = _other_units(model, "router", [(one.layer, one.index) for one in ablation.experts], **how)
        return [replace(ablation, experts=tuple(Expert(a, b) for a, b in one)) for one in found]
    if ablation.latents is not None:
        return _other_latents(ablation, bank or {}, **how)
    if ablation.tokens is not None:
        return [replace(ablation, tokens=one) for one in _random_scopes(ablation.tokens, traces, n_controls, seed)]
    if ablation.edges is not None:
        return [
            replace(ablation, edges=one)
            for one in _random_edges(ablation.edges, traces, n_controls=n_controls, seed=seed)
        ]
    return []


def _random_edges(edges: Edges, traces: Sequence[Trace], *, n_controls: int, seed: int) -> list[Edges]:
    """Edges from the same readers to as many random tokens, which differ in some trace; without traces they differ in their seed."""
    return [replace(edges, read=one) for one in _random_scopes(edges.read, traces, n_controls, seed)]


def _other_layers(model: Model, ablation: Ablation, *, n_controls: int, seed: int) -> list[Ablation]:
    kind, point = ("mlps", "mlp_out") if ablation.mlps else ("layers", "attn_out")
    own = set(getattr(ablation, kind))
    there = set(range(model.n_layers)) if kind == "layers" else set(model.layout.layers_with(point))  # type: ignore[arg-type]
    others = Pool(members=sorted(there - own), size=len(own))
    if len(others.members) < len(own):
        raise InputError(f"{len(own)} of {model.n_layers} {kind} leave too few others to compare with; ablate fewer")
    drawn = distinct_sets([others], n_controls, seed=seed)
    return [replace(ablation, **{kind: tuple(sorted(one))}) for one in drawn]  # type: ignore[arg-type]


def _other_units(
    model: Model, point: Point, units: Sequence[tuple[int, int]], *, n_controls: int, seed: int
) -> list[tuple[tuple[int, int], ...]]:
    """Sets of as many other (layer, index) of each layer."""
    own = set(units)
    pools = []
    for layer, n in sorted(Counter(layer for layer, _ in own).items()):
        width = width_of(model, Site(point, layer))
        free = [(layer, i) for i in range(width) if (layer, i) not in own]
        if len(free) < n:
            raise InputError(
                f"{n} of {width} at {point}.{layer} leave only {len(free)} others to compare with; ablate fewer"
            )
        pools.append(Pool(members=free, size=n))
    return [tuple(sorted(one)) for one in distinct_sets(pools, n_controls, seed=seed)]


def _other_latents(ablation: Ablation, bank: ReferenceStates, *, n_controls: int, seed: int) -> list[Ablation]:
    """Sets of as many other latents that are active somewhere in `bank`: one that never fires would be a control in name only."""
    latents = ablation.latents
    assert latents is not None
    active = torch.ones(len(latents.dictionary), dtype=torch.bool)
    if latents.site in bank:
        states = at_least_float32(bank[latents.site]).cpu()
        active = torch.stack([(latents.dictionary.latents(part) > 0).any(dim=0) for part in states.split(1024)]).any(
            dim=0
        )
    free = [int(i) for i in active.nonzero()[:, 0] if int(i) not in latents.chosen]
    if len(free) < len(latents.chosen):
        raise InputError(
            f"{len(latents.chosen)} latents leave only {len(free)} others that fire on these traces; ablate fewer, or read more traces"
        )
    drawn = distinct_sets([Pool(members=free, size=len(latents.chosen))], n_controls, seed=seed)
    return [replace(ablation, latents=latents.instead(one)) for one in drawn]


def _random_scopes(scope: Scope, traces: Sequence[Trace], n: int, seed: int) -> list["_RandomScope"]:
    """At most `n` scopes of random tokens in place of those of `scope`, which differ in some trace; fewer if no more are found."""
    rng = np.random.default_rng(seed)
    if not traces:
        return [_RandomScope.like(scope, int(rng.integers(2**31))) for _ in range(n)]
    texts = [(torch.from_numpy(trace.token_ids[None]), torch.tensor([trace.n_prompt_tokens])) for trace in traces]

    def chosen(one: Scope) -> bytes:
        return b"".join(one.mask(ids, n_prompt=n_prompt).numpy().tobytes() for ids, n_prompt in texts)

    seen, found = {chosen(scope)}, list[_RandomScope]()
    for _ in range(_MOST_TRIES * n):
        drawn = _RandomScope.like(scope, int(rng.integers(2**31)))
        if (tokens := chosen(drawn)) not in seen:
            seen.add(tokens)
            found.append(drawn)
        if len(found) == n:
            break
    return found


@dataclass(frozen=True, kw_only=True)
class _RandomScope(Scope):
    """As many random tokens of each sequence as `instead_of` names: other tokens of the same region if there are enough, else other
    tokens of the whole text, else any tokens of the text.

    Each place of a text has a score that depends on the seed alone, and those with the lowest scores are taken, so that the draw is the
    same in any batch and hardly changes while the text grows.
    """

    instead_of: Scope
    seed: int = 0

    @classmethod
    def like(cls, scope: Scope, seed: int) -> "_RandomScope":
        return cls(on=scope.on, marks=scope.marks, instead_of=scope, seed=seed)

    def describe_draw(self) -> dict[str, Any]:
        """What is drawn in place of what, as JSON."""
        return {"seed": self.seed, "instead_of": describe_scope(self.instead_of)}

    def mask(self, ids: Tensor, *, n_prompt: Tensor | None = None, last: int | None = None) -> Tensor:
        named = self.instead_of.mask(ids, n_prompt=n_prompt)
        wanted = named.sum(dim=1, keepdim=True)
        region = super().mask(ids, n_prompt=n_prompt) & ~named
        text = ids >= 0
        free = torch.where((text & ~named).sum(dim=1, keepdim=True) >= wanted, text & ~named, text)
        free = torch.where(region.sum(dim=1, keepdim=True) >= wanted, region, free)
        scores = torch.from_numpy(np.random.default_rng(self.seed).random(ids.shape[1])).to(ids.device)
        score = scores[(text.cumsum(dim=1) - 1).clamp(min=0)]
        rank = score.masked_fill(~free, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
        return (free & (rank < wanted))[:, -(last or ids.shape[1]) :]
