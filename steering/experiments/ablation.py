"""Ablation experiments: what goes missing when heads, MLPs, layers, tokens or attention edges are taken away, beside random others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, Resamples, permutation_p
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.attention_knockout import Edges, reading_without
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.experiment import Arm, SteeringExperiment
from reasonscope.steering.experiments.side_effects import LogitsFunction, divergences, logits_function
from reasonscope.steering.vectors.intervention import MaskedEdit
from reasonscope.steering.vectors.scope import Scope

How = Literal["zero", "mean", "resample"]
# What is written at each site: all of it, or the heads with these numbers.
Parts: TypeAlias = Mapping[Site, tuple[int, ...] | None]
# States of other tokens at each site (row, …), to take means of or draw from.
ReferenceStates: TypeAlias = Mapping[Site, Tensor]

_BANK_TRACES = 16


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is taken away: exactly one of `heads` (layer, head), `mlps`, `layers`, `tokens` or `edges`.

    | target | written | in its place |
    |---|---|---|
    | `heads` | `z.L`, before the output projection, nothing renormalised | of the same head |
    | `mlps` | `mlp_out.L`, behind a post-norm where there is one | of the same MLP |
    | `layers` | `attn_out.L` and `mlp_out.L`: zeroed, the block passes its input on | of the same block |
    | `tokens` | `resid_pre.0` on the tokens of that scope: the word goes, its place stays | of any token |
    | `edges` | the attention mask, before the softmax; `how` is not used | nothing |

    `how`: zero, the mean over reference traces, or a state drawn from them for each token. `scope`: the tokens at which it is done.
    """

    name: str
    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    tokens: Scope | None = None
    edges: Edges | None = None
    how: How = "zero"
    scope: Scope = field(default_factory=Scope)

    def __post_init__(self) -> None:
        given = [kind for kind in ("heads", "mlps", "layers", "tokens", "edges") if getattr(self, kind)]
        if len(given) != 1:
            raise InputError(
                f"ablation {self.name!r} names {given or 'nothing'}; give one of heads, mlps, layers, tokens, edges"
            )
        if self.how not in ("zero", "mean", "resample"):
            raise InputError(f"ablation {self.name!r}: how={self.how!r}; there are zero, mean and resample")

    @property
    def parts(self) -> Parts:
        """The sites that are written."""
        if self.tokens is not None:
            return {Site("resid_pre", 0): None}
        by_layer: dict[int, list[int]] = {}
        for layer, head in self.heads:
            by_layer.setdefault(layer, []).append(head)
        return {
            **{Site("z", layer): tuple(sorted(set(heads))) for layer, heads in by_layer.items()},
            **{Site("mlp_out", layer): None for layer in (*self.mlps, *self.layers)},
            **{Site("attn_out", layer): None for layer in self.layers},
        }


class AblationIntervention(MaskedEdit):
    """The intervention of an ablation of heads, MLPs, layers or tokens. `bank` is needed where `how` is not zero.

    Raises SiteError for a layer, and InputError for a head, that the model does not have.
    """

    def __init__(self, model: Model, ablation: Ablation, bank: ReferenceStates | None = None, *, seed: int = 0) -> None:
        super().__init__(ablation.tokens or ablation.scope)
        self._how, self._bank, self._parts = ablation.how, bank or {}, ablation.parts
        self._rng = torch.Generator().manual_seed(seed)
        for site, heads in self._parts.items():
            model.layout.module(model.hf, site)
            if foreign := [head for head in heads or () if not 0 <= head < model.n_heads]:
                raise InputError(
                    f"head {foreign[0]} at {site}: the model has {model.n_heads} heads, 0 to {model.n_heads - 1}"
                )
            if self._how != "zero" and site not in self._bank:
                raise InputError(
                    f"{self._how} ablation at {site} needs states of other tokens; give bank=reference_states(…)"
                )

    @property
    def edits(self) -> Mapping[Site, Edit]:
        return {site: self._edit(site, heads) for site, heads in self._parts.items()}

    def _edit(self, site: Site, heads: tuple[int, ...] | None) -> Edit:
        def edit(activation: Tensor, where: Positions) -> Tensor:
            return self.change(activation, where, replaced)

        def replaced(rows: Tensor) -> Tensor:
            value = self._value(site, rows)
            if heads is None:
                return value
            kept = rows.clone()
            kept[:, list(heads)] = value[:, list(heads)]
            return kept

        return edit

    def _value(self, site: Site, rows: Tensor) -> Tensor:
        """What stands in place of `rows` (row, …)."""
        if self._how == "zero":
            return torch.zeros_like(rows)
        bank = self._bank[site].to(rows)
        if self._how == "mean":
            return bank.mean(dim=0).expand_as(rows)
        return bank[torch.randint(len(bank), (len(rows),), generator=self._rng).to(rows.device)]


@dataclass(frozen=True, kw_only=True)
class RegenerationEffect:
    """What the ablated model writes: `arm`; `random` arms of as many other heads, MLPs or layers; `excess` of the one over their mean.

    Of tokens there are no random arms (`random` is empty): which others to take is drawn over finished text.
    """

    arm: Arm
    random: tuple[Arm, ...]
    excess: Mapping[str, Estimate]


def regenerate_ablated(
    model: Model,
    ablation: Ablation,
    traces: Sequence[Trace],
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    n_controls: int = 5,
    seed: int = 0,
) -> RegenerationEffect:
    """What the ablated model writes when it answers `problems` anew, beside the unchanged one and `n_controls` random ablations of the same
    kind, all in one batch; means and draws come from `traces`.

    Raises InputError for edges, which are cut in finished text alone, and where nothing was touched.
    """
    if ablation.edges is not None:
        raise InputError(
            f"ablation {ablation.name!r}: attention edges are cut in passes over finished text, not while the model writes; "
            "read its effect on the given answers"
        )
    rng = np.random.default_rng(seed)
    drawn = [] if ablation.tokens else [_control(model, ablation, rng, i) for i in range(n_controls)]
    wanted = [ablation, *drawn]
    sites = list({site: None for one in wanted for site in one.parts})
    bank = reference_states(model, traces, sites) if ablation.how != "zero" else {}
    conditions = [
        Condition(
            name=f"{one.name}, random {i}" if i else one.name,
            multiplier=1.0,
            intervention=AblationIntervention(model, one, bank, seed=seed + i),
        )
        for i, one in enumerate(wanted)
    ]
    experiment = SteeringExperiment(model, problems, sampling)
    runs = experiment.run_all(conditions)
    arm, *random = (experiment.arm(one.name, 1.0, run) for one, run in zip(conditions, runs, strict=True))
    excess = experiment.differences(runs[0], runs[1:]) if random else {}
    return RegenerationEffect(arm=arm, random=tuple(random), excess=excess)


def reference_states(model: Model, traces: Sequence[Trace], sites: Sequence[Site]) -> ReferenceStates:
    """What stood at `sites` at every token of `traces` (the first 16): (row, …) by site."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for trace in traces[:_BANK_TRACES]:
        for site, rows in replay(model, [trace.token_ids.tolist()], sites)[0].items():
            parts[site].append(rows)
    return {site: torch.cat(rows) for site, rows in parts.items()}


@dataclass(frozen=True, kw_only=True)
class AblationEffect:
    """`effect`: by how many nats a token the ablation makes the given answer less likely. `null` (draw,): the same of random controls,
    `n_distinct` of them different ones. `p_value`: the share of controls, the ablation itself counted in, with as great an effect.

    `side_effects`: KL on the thinking in nats a token, and the growth of the thinking's own negative log-likelihood. `n_edited`: tokens (or
    edges) that were taken away from all traces together.
    """

    ablation: Ablation
    effect: Estimate
    null: tuple[float, ...]
    n_distinct: int
    p_value: float
    side_effects: Mapping[str, Estimate]
    n_edited: int
    control: str


def ablation_effect(
    model: Model, traces: Sequence[Trace], ablation: Ablation, *, n_controls: int = 20, seed: int = 0
) -> AblationEffect:
    """Read finished `traces` with the ablation and without: the answers that the model gave, and its thinking.

    Controls of heads are as many random heads of the same layers, of MLPs and layers as many other ones, of tokens and edges as many
    random tokens of the same region. Means and drawn states come from the same traces. Raises InputError for fewer than 20 controls,
    for traces without an answer, for an ablation that touches nothing, and where no control exists.
    """
    if n_controls < 20:
        raise InputError(f"{n_controls} controls; at least 20 random ones are needed")
    read = [trace for trace in traces if len(trace.tokens.answer) and len(trace.tokens.thinking)]
    if not read:
        raise InputError(f"none of {len(traces)} traces has thinking and an answer; record with more tokens")
    rng = np.random.default_rng(seed)
    drawn = [_control(model, ablation, rng, i) for i in range(n_controls)]
    sites = {site: None for one in (ablation, *drawn) for site in ([] if one.edges else one.parts)}
    bank = reference_states(model, read, list(sites)) if ablation.how != "zero" and sites else {}
    seeds = [seed, *(seed + i for i in range(n_controls))]
    measured, *chance = _measure(model, read, [ablation, *drawn], bank, seeds)
    if not measured.n_edited:
        raise InputError(f"ablation {ablation.name!r} touched nothing: no token of the traces lies in its scope")
    if any(not one.n_edited for one in chance):
        raise InputError(f"ablation {ablation.name!r} leaves no other token to compare with; name fewer")
    null = tuple(one.effect.value for one in chance)
    return AblationEffect(
        ablation=ablation,
        effect=measured.effect,
        null=null,
        n_distinct=len(set(null)),
        p_value=float(permutation_p(measured.effect.value, null)),
        side_effects=measured.side_effects,
        n_edited=measured.n_edited,
        control=_CONTROL[next(kind for kind in _CONTROL if getattr(ablation, kind))],
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    effect: Estimate
    side_effects: Mapping[str, Estimate]
    n_edited: int


_CONTROL = {
    "heads": "as many random heads of the same layers",
    "mlps": "as many random other MLPs",
    "layers": "as many random other layers",
    "tokens": "as many random tokens of the same traces",
    "edges": "edges to as many random tokens",
}


def _measure(
    model: Model, traces: Sequence[Trace], ablations: Sequence[Ablation], bank: ReferenceStates, seeds: Sequence[int]
) -> list[_Measured]:
    readers = [_reader(model, one, bank, seed) for one, seed in zip(ablations, seeds, strict=True)]
    spans = {"answer": lambda trace: trace.tokens.answer, "thinking": lambda trace: trace.tokens.thinking}
    resamples = Resamples([trace.problem.group for trace in traces])

    def per_token(sums: Values, n_tokens: Values) -> Estimate:
        found = resamples.estimate(resamples.means(sums / n_tokens, n_tokens))
        assert found is not None  # every trace has tokens in both spans
        return found

    measured = []
    moved = divergences(model, traces, [read for read, _ in readers], spans)
    for of_spans, (_, n_edited) in zip(moved, readers, strict=True):
        answer, thinking = of_spans["answer"], of_spans["thinking"]
        measured.append(
            _Measured(
                effect=per_token(answer.nll - answer.nll_unchanged, answer.n_tokens),
                side_effects={
                    "kl_thinking": per_token(thinking.kl, thinking.n_tokens),
                    "nll_thinking": per_token(thinking.nll - thinking.nll_unchanged, thinking.n_tokens),
                    "kl_answer": per_token(answer.kl, answer.n_tokens),
                },
                n_edited=n_edited(),
            )
        )
    return measured


def _reader(
    model: Model, ablation: Ablation, bank: ReferenceStates, seed: int
) -> tuple[LogitsFunction, Callable[[], int]]:
    """How the ablated model reads, and how much was taken away from it so far."""
    if ablation.edges is not None:
        counts: list[int] = []
        return reading_without(model, ablation.edges, counts.append), lambda: sum(counts)
    replacing = AblationIntervention(model, ablation, bank, seed=seed)
    return logits_function(model, replacing), lambda: replacing.n_edited


def _control(model: Model, ablation: Ablation, rng: np.random.Generator, number: int) -> Ablation:
    """A random ablation of the same kind and size."""
    if ablation.heads:
        return replace(ablation, heads=_other_heads(ablation.heads, model.n_heads, rng))
    for kind in ("mlps", "layers"):
        if own := getattr(ablation, kind):
            others = sorted(set(range(model.n_layers)) - set(own))
            if len(others) < len(own):
                raise InputError(
                    f"{len(own)} of {model.n_layers} {kind} leave too few others to compare with; ablate fewer"
                )
            chosen = rng.choice(others, size=len(own), replace=False).tolist()
            return replace(ablation, **{kind: tuple(sorted(chosen))})  # type: ignore[arg-type]
    seed = int(rng.integers(2**31)) + number
    if ablation.tokens is not None:
        return replace(ablation, tokens=RandomScope.like(ablation.tokens, seed))
    assert ablation.edges is not None
    return replace(ablation, edges=replace(ablation.edges, read=RandomScope.like(ablation.edges.read, seed)))


def _other_heads(
    heads: Sequence[tuple[int, int]], n_heads: int, rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
    """As many heads of each layer; not the very same set, and where a layer has enough others none of the same."""
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in heads}):
        own = {head for at, head in heads if at == layer}
        others = sorted(set(range(n_heads)) - own)
        pool = others if len(others) >= len(own) else list(range(n_heads))
        drawn += [(layer, int(head)) for head in rng.choice(pool, size=len(own), replace=False)]
    if set(drawn) == set(heads):
        raise InputError(
            "all heads of these layers are ablated, so there are no others to compare with; ablate fewer, or the layers"
        )
    return tuple(drawn)


@dataclass(frozen=True, kw_only=True)
class RandomScope(Scope):
    """As many tokens of each sequence as `instead_of` names, drawn from those that it does not name: of the same region where that has
    enough others, else of the whole text; where even that has not, from the whole text, those that it names too."""

    instead_of: Scope
    seed: int = 0

    @classmethod
    def like(cls, scope: Scope, seed: int) -> "RandomScope":
        return cls(on=scope.on, marks=scope.marks, instead_of=scope, seed=seed)

    def mask(self, ids: Tensor, *, n_prompt: Tensor | None = None, last: int | None = None) -> Tensor:
        assert last is None, "drawn anew in each pass over whole sequences"
        named = self.instead_of.mask(ids, n_prompt=n_prompt)
        wanted = named.sum(dim=1, keepdim=True)
        region = super().mask(ids, n_prompt=n_prompt) & ~named
        text = ids >= 0
        free = torch.where((text & ~named).sum(dim=1, keepdim=True) >= wanted, text & ~named, text)
        free = torch.where(region.sum(dim=1, keepdim=True) >= wanted, region, free)
        score = torch.rand(ids.shape, generator=torch.Generator().manual_seed(self.seed)).to(ids.device)
        rank = score.masked_fill(~free, 2.0).argsort(dim=1).argsort(dim=1)
        return free & (rank < wanted)
