"""What an ablation removes: heads, MLPs, layers, neurons, experts, directions, latents of a dictionary, tokens, or attention edges."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.steering.ablation.dictionaries import Latents
from reasonscope.steering.ablation.directions import Directions
from reasonscope.steering.ablation.knockout import Edges
from reasonscope.steering.methods.expert_routing import Expert
from reasonscope.steering.recipes.description import describe_scope
from reasonscope.steering.vectors.scope import Scope

How = Literal["zero", "mean", "resample"]
KINDS = ("heads", "mlps", "layers", "neurons", "experts", "directions", "latents", "tokens", "edges")
# What is overwritten at each site: all of it, or the heads, neurons or experts with these indices.
Parts: TypeAlias = Mapping[Site, tuple[int, ...] | None]


@dataclass(frozen=True, kw_only=True, order=True)
class Neuron:
    """A neuron of a dense MLP: number `index` of what the last projection of block `layer` takes."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What to remove: exactly one of the targets below.

    | target | what is overwritten | what replaces it |
    |---|---|---|
    | `heads` | `z.L`, before the output projection; nothing is renormalised | states of the same head |
    | `mlps` | `mlp_out.L`, after the post-norm if there is one | states of the same MLP |
    | `layers` | `attn_out.L` and `mlp_out.L`; zeroed, the block passes its input on | states of the same block |
    | `neurons` | `mlp_post.L`, before the last projection of the MLP | states of the same neuron |
    | `experts` | `router.L`: the expert is never chosen, and the next one takes its place | nothing; `how` is zero |
    | `directions` | the part of the state along them, at their sites | the same part of states of the same site |
    | `latents` | what these latents of a dictionary write at its site; its error stays | the same latents in states of the same site |
    | `tokens` | `resid_pre.0` on the tokens of that scope: the word goes, its position stays | states of any token |
    | `edges` | the attention mask, before the softmax; `how` and `strength` have no effect | nothing |

    Attributes:
        name: What tables call it.
        heads: Attention heads.
        mlps: Layers whose MLP is removed.
        layers: Layers removed as a whole.
        neurons: Neurons of dense MLPs.
        experts: Experts of mixtures of experts.
        directions: Directions of the residual stream.
        latents: Latents of a dictionary.
        tokens: The tokens to remove.
        edges: The attention edges to cut.
        how: `zero`, `mean` (over reference traces) or `resample` (for each token a state drawn from these).
        strength: How far each state is moved: 1 is the whole way, 0.5 half of it.
        scope: The tokens at which everything but tokens and edges is removed; all by default.

    Raises:
        InputError: If not exactly one target is given, `how` is unknown, or the target does not take this `how` or `strength`.

    Example:
        thinking = Scope.thinking(model)
        ablation = Ablation(name="two heads", heads=(Head.parse("2.1"), Head.parse("3.0")), how="mean", scope=thinking)
        effect = ablation_effect(model, traces, ablation)
    """

    name: str
    heads: tuple[Head, ...] = ()
    mlps: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    neurons: tuple[Neuron, ...] = ()
    experts: tuple[Expert, ...] = ()
    directions: Directions | None = None
    latents: Latents | None = None
    tokens: Scope | None = None
    edges: Edges | None = None
    how: How = "zero"
    strength: float = 1.0
    scope: Scope = field(default_factory=Scope)

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise InputError(
                f"ablation {self.name!r} names {' and '.join(given) or 'nothing'}; give one of {', '.join(KINDS)}"
            )
        if self.how not in ("zero", "mean", "resample"):
            raise InputError(f"ablation {self.name!r}: how={self.how!r}; choose zero, mean or resample")
        if not (np.isfinite(self.strength) and self.strength > 0):
            raise InputError(f"ablation {self.name!r}: a strength of {self.strength}; give a number above 0")
        if self.kind == "experts" and (self.how != "zero" or self.strength != 1):
            raise InputError(
                f"ablation {self.name!r}: an expert is chosen or not, so it takes how: zero and strength: 1 only"
            )
        if self.kind == "edges" and self.strength != 1:
            raise InputError(f"ablation {self.name!r}: an edge is cut or not; leave the strength out")

    @property
    def kind(self) -> str:
        """Which of the targets is given."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def moves_states(self) -> bool:
        """Whether it moves hidden states, so that a control can move them as far."""
        return self.kind not in ("experts", "tokens", "edges")

    @property
    def parts(self) -> Parts:
        """What is overwritten, by site; all of it for directions and latents."""
        match self.kind:
            case "tokens":
                return {Site("resid_pre", 0): None}
            case "heads":
                return _by_layer("z", self.heads)
            case "neurons":
                return _by_layer("mlp_post", self.neurons)
            case "experts":
                return _by_layer("router", self.experts)
            case "directions":
                assert self.directions is not None
                return dict.fromkeys(self.directions.basis)
            case "latents":
                assert self.latents is not None
                return {self.latents.site: None}
            case "edges":
                return {}
        return {
            **{Site("mlp_out", layer): None for layer in (*self.mlps, *self.layers)},
            **{Site("attn_out", layer): None for layer in self.layers},
        }

    @property
    def members(self) -> tuple[Any, ...]:
        """The heads, layers, neurons, experts or latents that are removed; empty for directions, tokens and edges."""
        if self.latents is not None:
            return self.latents.chosen
        return (*self.heads, *self.mlps, *self.layers, *self.neurons, *self.experts)

    def describe(self) -> dict[str, Any]:
        """Everything that changes what it does, as JSON; neither its name nor the ids of a model's tags."""
        target = getattr(self, self.kind)
        return {
            self.kind: target.describe() if hasattr(target, "describe") else _described(target),
            "how": self.how,
            "strength": self.strength,
            "scope": _described(self.scope),
        }


def _by_layer(point: Point, units: tuple[Head, ...] | tuple[Neuron, ...] | tuple[Expert, ...]) -> Parts:
    """The indices of the units of each layer, each once."""
    found: dict[int, set[int]] = {}
    for unit in units:
        found.setdefault(unit.layer, set()).add(unit.index)
    return {Site(point, layer): tuple(sorted(indices)) for layer, indices in found.items()}


def _described(target: object) -> Any:
    """Scopes by their fields, and units as text."""
    if isinstance(target, Edges):
        ends = {"readers": _described(target.readers), "read": _described(target.read)}
        return {**ends, "layers": None if target.layers is None else list(target.layers)}
    if isinstance(target, Scope):
        more = {"random": target.describe_draw()} if hasattr(target, "describe_draw") else {}
        return {**describe_scope(target), **more}
    assert isinstance(target, tuple)
    return [f"{unit.layer}.{unit.index}" if isinstance(unit, Expert) else str(unit) for unit in target]
