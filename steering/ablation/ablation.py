"""Ablation experiments: what is lost when heads, MLPs, layers, tokens or attention edges are removed, beside random others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, Resamples, permutation_p
from reasonscope.data.random_sets import Pool, distinct_sets, n_disjoint, smallest_p
from reasonscope.data.summary import Summary
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.heads import Head, all_heads, of_same_layers, random_heads
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.knockout import Edges, reading_without
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.experiment import Arm, SteeringExperiment, estimates_to_dict
from reasonscope.steering.experiments.side_effects import LogitsFunction, divergences, logits_function
from reasonscope.steering.experiments.summaries import ablation_summary
from reasonscope.steering.vectors.intervention import MaskedEdit
from reasonscope.steering.vectors.scope import Scope

How = Literal["zero", "mean", "resample"]
# What is overwritten at each site: all of it, or the heads with these indices.
Parts: TypeAlias = Mapping[Site, tuple[int, ...] | None]
# States of other tokens at each site (row, …), to average or to draw from.
ReferenceStates: TypeAlias = Mapping[Site, Tensor]

_BANK_TRACES = 16
_MOST_TRIES = 50  # draws of random tokens per control; beyond that no new ones are to be expected


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What to remove: exactly one of `heads`, `mlps`, `layers`, `tokens` or `edges`.

    | target | what is overwritten | what replaces it |
    |---|---|---|
    | `heads` | `z.L`, before the output projection; nothing is renormalised | states of the same head |
    | `mlps` | `mlp_out.L`, after the post-norm if there is one | states of the same MLP |
    | `layers` | `attn_out.L` and `mlp_out.L`; zeroed, the block passes its input on | states of the same block |
    | `tokens` | `resid_pre.0` on the tokens of that scope: the word goes, its position stays | states of any token |
    | `edges` | the attention mask, before the softmax; `how` has no effect | nothing |

    Attributes:
        name: What tables call it.
        heads: Attention heads.
        mlps: Layers whose MLP is removed.
        layers: Layers removed as a whole.
        tokens: The tokens to remove.
        edges: The attention edges to cut.
        how: `zero`, `mean` (over reference traces) or `resample` (for each token a state drawn from these).
        scope: The tokens at which heads, MLPs or layers are removed; all by default.

    Raises:
        InputError: If not exactly one target is given, or `how` is unknown.

    Example:
        thinking = Scope.thinking(model)
        ablation = Ablation(name="two heads", heads=(Head.parse("2.1"), Head.parse("3.0")), how="mean", scope=thinking)
        effect = ablation_effect(model, traces, ablation)
    """

    name: str
    heads: tuple[Head, ...] = ()
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
                f"ablation {self.name!r} names {' and '.join(given) or 'nothing'}; give one of heads, mlps, layers, tokens, edges"
            )
        if self.how not in ("zero", "mean", "resample"):
            raise InputError(f"ablation {self.name!r}: how={self.how!r}; choose zero, mean or resample")

    @property
    def parts(self) -> Parts:
        """What is overwritten, by site."""
        if self.tokens is not None:
            return {Site("resid_pre", 0): None}
        by_layer: dict[int, list[int]] = {}
        for head in self.heads:
            by_layer.setdefault(head.layer, []).append(head.index)
        return {
            **{Site("z", layer): tuple(sorted(set(heads))) for layer, heads in by_layer.items()},
            **{Site("mlp_out", layer): None for layer in (*self.mlps, *self.layers)},
            **{Site("attn_out", layer): None for layer in self.layers},
        }


class AblationIntervention(MaskedEdit):
    """Removes heads, MLPs, layers or tokens while the model runs; `bank` (see `reference_states`) is needed unless `how` is zero.

    Raises SiteError for a layer that the model does not have, InputError for a head that it does not have or a missing bank.
    """

    def __init__(self, model: Model, ablation: Ablation, bank: ReferenceStates | None = None, *, seed: int = 0) -> None:
        super().__init__(ablation.tokens or ablation.scope)
        self._how, self._bank, self._parts = ablation.how, bank or {}, ablation.parts
        self._rng = torch.Generator().manual_seed(seed)
        for site, heads in self._parts.items():
            model.layout.module(model.hf, site)
            n_heads = model.layout.of_block[site.layer].n_heads
            if foreign := [head for head in heads or () if not 0 <= head < n_heads]:
                raise InputError(f"head {foreign[0]} at {site}: this block has heads 0 to {n_heads - 1}")
            if self._how != "zero" and site not in self._bank:
                raise InputError(
                    f"{self._how} ablation at {site} needs states of other tokens; pass bank=reference_states(…)"
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
        """What replaces `rows` (row, …)."""
        if self._how == "zero":
            return torch.zeros_like(rows)
        bank = self._bank[site].to(rows)
        if self._how == "mean":
            return bank.mean(dim=0).expand_as(rows)
        return bank[torch.randint(len(bank), (len(rows),), generator=self._rng).to(rows.device)]


@dataclass(frozen=True, kw_only=True)
class RegenerationEffect:
    """What the ablated model writes when it answers problems again.

    Attributes:
        arm: The ablated model, compared with the unchanged one.
        random: Models without as many random other heads, MLPs or layers. Empty for tokens: which others to remove can only be
            drawn in finished text.
        excess: Each measure of `arm` minus its mean over `random`.
    """

    arm: Arm
    random: tuple[Arm, ...]
    excess: Mapping[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """What the ablated model wrote, and what the random controls wrote, for JSON."""
        return {
            **self.arm.to_dict(),
            "random": [arm.to_dict() for arm in self.random],
            "excess_over_random": estimates_to_dict(self.excess),
        }


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
    """Let the ablated model answer `problems` again, beside the unchanged model and random ablations of the same kind.

    Args:
        model: The model.
        ablation: What to remove; not edges, which are cut in finished text only.
        traces: Where means and drawn states come from.
        problems: What is answered.
        sampling: Decoding settings; every arm gets the same draws.
        n_controls: How many random ablations to run; fewer, if fewer different ones exist.
        seed: Seed of the random ablations.

    Raises:
        InputError: If edges are given, nothing was edited, or nothing else is left to compare with.
    """
    if ablation.edges is not None:
        raise InputError(
            f"ablation {ablation.name!r}: attention edges are cut in passes over finished text, not while the model writes; "
            "measure them with ablation_effect"
        )
    drawn = [] if ablation.tokens else _random_ablations(model, ablation, n_controls=n_controls, seed=seed)
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
    """The states at `sites` at every token of the first 16 of `traces`: (row, …) by site."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for trace in traces[:_BANK_TRACES]:
        for site, rows in replay(model, [trace.token_ids.tolist()], sites)[0].items():
            parts[site].append(rows)
    return {site: torch.cat(rows) for site, rows in parts.items()}


@dataclass(frozen=True, kw_only=True)
class AblationEffect:
    """How much less likely an ablation makes the answers that the model gave, beside different random ablations.

    Attributes:
        ablation: What was removed.
        effect: Loss of log-likelihood, in nats per answer token.
        null: The effect of each control (control,), all controls different.
        n_disjoint: How many of the controls, the first ones, share no head, MLP or layer with one another.
        p_value: Share of these with at least this effect, the ablation itself counted among them. It is exact, which it would not
            be over controls that overlap.
        side_effects: `kl_thinking` and `kl_answer`, in nats per token, and `nll_thinking`, the loss on the thinking itself.
        n_edited: Tokens (or edges) removed from all traces together.
        control: In words, what the controls are.
    """

    ablation: Ablation
    effect: Estimate
    null: tuple[float, ...]
    n_disjoint: int
    p_value: float
    side_effects: Mapping[str, Estimate]
    n_edited: int
    control: str

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that so few disjoint controls can give; above .05 if there are fewer than 19."""
        return smallest_p(self.n_disjoint)

    def to_dict(self) -> dict[str, Any]:
        """The effect with its interval, the range of the random controls, and the side effects, for JSON."""
        return {
            "effect_nats_per_answer_token": self.effect.to_dict(),
            "controls": {
                "what": self.control,
                "n": len(self.null),
                "n_disjoint": self.n_disjoint,
                "mean": float(np.mean(self.null)),
                "low": min(self.null),
                "high": max(self.null),
            },
            "p_value": self.p_value,
            "smallest_p": self.smallest_p,
            "side_effects": estimates_to_dict(self.side_effects),
            "n_edited": self.n_edited,
            "how": self.ablation.how,
        }

    def summary(self) -> Summary:
        """By how much the ablation makes the given answers less likely, beside random ablations of the same size."""
        return ablation_summary({self.ablation.name: self})


def ablation_effect(
    model: Model, traces: Sequence[Trace], ablation: Ablation, *, n_controls: int = 20, seed: int = 0
) -> AblationEffect:
    """Read finished traces with the ablation and without: how likely are the given answers, and how much does the thinking change?

    Controls are different random sets of the same size: of heads of the same layers, of other MLPs or layers, of tokens of the same
    region of each trace. The ablation itself is never drawn. A small model has few such sets, and then all of them are used: a block
    of four heads has three others, so the p-value of one head is at least 1/4 (`smallest_p`). If several heads, MLPs or layers are removed
    together, the p-value counts only controls that share none of them: a block of 16 heads leaves three such sets of four.

    Args:
        model: The model.
        traces: Finished traces; those without thinking or answer are left out. Means and drawn states come from them too.
        ablation: What to remove.
        n_controls: How many random ablations to compare with, at least 20.
        seed: Seed of the controls and of drawn states.

    Returns:
        The effect on the given answers and on the thinking, with the random ablations and a p-value.

    Raises:
        InputError: For fewer than 20 controls, traces without an answer, an ablation that edits nothing, or one that leaves nothing
            to compare with.

    Example:
        effect = ablation_effect(model, traces, Ablation(name="head", heads=(Head(layer=2, index=1),)))
        print(effect.effect.value, effect.p_value, effect.smallest_p)
    """
    if n_controls < 20:
        raise InputError(f"n_controls={n_controls}; at least 20 random ablations are needed")
    read = [trace for trace in traces if len(trace.tokens.answer) and trace.n_thinking_tokens]
    if not read:
        raise InputError(f"none of {len(traces)} traces has both thinking and an answer; record with more tokens")
    drawn = _random_ablations(model, ablation, read, n_controls=n_controls, seed=seed)
    sites = {site: None for one in (ablation, *drawn) for site in ([] if one.edges else one.parts)}
    bank = reference_states(model, read, list(sites)) if ablation.how != "zero" and sites else {}
    seeds = [seed, *(seed + i for i in range(len(drawn)))]
    measured, *chance = _measure(model, read, [ablation, *drawn], bank, seeds)
    if not measured.n_edited:
        raise InputError(f"ablation {ablation.name!r} edited nothing: no token of the traces lies in its scope")
    if not chance or any(not one.n_edited for one in chance):
        raise InputError(f"ablation {ablation.name!r} leaves no other token to compare with; name fewer tokens")
    null = tuple(one.effect.value for one in chance)
    counted = n_disjoint([_removed(one) for one in drawn])
    return AblationEffect(
        ablation=ablation,
        effect=measured.effect,
        null=null,
        n_disjoint=counted,
        p_value=float(permutation_p(measured.effect.value, null[:counted])),
        side_effects=measured.side_effects,
        n_edited=measured.n_edited,
        control=_control(ablation, drawn),
    )


def _removed(ablation: Ablation) -> tuple[object, ...]:
    """The heads, MLPs or layers that an ablation removes; itself if these are tokens or edges, which are drawn in each trace."""
    return (*ablation.heads, *ablation.mlps, *ablation.layers) or (id(ablation),)


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


def _control(ablation: Ablation, drawn: Sequence[Ablation]) -> str:
    """What the controls are, in words."""
    if ablation.heads and not all(of_same_layers(ablation.heads, one.heads) for one in drawn):
        return "as many random heads, of other layers too"
    return _CONTROL[next(kind for kind in _CONTROL if getattr(ablation, kind))]


def _measure(
    model: Model, traces: Sequence[Trace], ablations: Sequence[Ablation], bank: ReferenceStates, seeds: Sequence[int]
) -> list[_Measured]:
    readers = [_reader(model, one, bank, seed) for one, seed in zip(ablations, seeds, strict=True)]
    spans = {"answer": lambda trace: trace.tokens.answer, "thinking": lambda trace: trace.thinking_positions}
    resamples = Resamples([trace.problem.group for trace in traces])

    def per_token(sums: Values, n_tokens: Values) -> Estimate:
        found = resamples.estimate(resamples.means(sums / n_tokens, n_tokens))
        assert found is not None  # because every trace has tokens in both spans
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
    """A forward pass of the ablated model, and a count of what it has edited so far."""
    if ablation.edges is not None:
        counts: list[int] = []
        return reading_without(model, ablation.edges, counts.append), lambda: sum(counts)
    replacing = AblationIntervention(model, ablation, bank, seed=seed)
    return logits_function(model, replacing), lambda: replacing.n_edited


def _random_ablations(
    model: Model, ablation: Ablation, traces: Sequence[Trace] = (), *, n_controls: int = 20, seed: int = 0
) -> list[Ablation]:
    """At most `n_controls` different random ablations of the same kind and size, none of them the ablation itself.

    Random tokens differ if they do so in any of `traces`. Raises InputError if too few other heads, MLPs or layers are left.
    """
    if ablation.heads:
        sets = random_heads(ablation.heads, all_heads(model.layout), n_controls=n_controls, seed=seed)
        return [replace(ablation, heads=tuple(sorted(one))) for one in sets]
    for kind in ("mlps", "layers"):
        if own := set(getattr(ablation, kind)):
            others = Pool(members=sorted(set(range(model.n_layers)) - own), size=len(own))
            if len(others.members) < len(own):
                raise InputError(
                    f"{len(own)} of {model.n_layers} {kind} leave too few others to compare with; ablate fewer"
                )
            drawn = distinct_sets([others], n_controls, seed=seed)
            return [replace(ablation, **{kind: tuple(sorted(one))}) for one in drawn]  # type: ignore[arg-type]
    if ablation.tokens is not None:
        return [replace(ablation, tokens=one) for one in _random_scopes(ablation.tokens, traces, n_controls, seed)]
    edges = ablation.edges
    assert edges is not None
    return [
        replace(ablation, edges=replace(edges, read=one))
        for one in _random_scopes(edges.read, traces, n_controls, seed)
    ]


def _random_scopes(scope: Scope, traces: Sequence[Trace], n: int, seed: int) -> list["RandomScope"]:
    """At most `n` scopes of random tokens in place of those of `scope`, which differ in some trace; fewer if no more are found."""
    texts = [(torch.from_numpy(trace.token_ids[None]), torch.tensor([trace.n_prompt_tokens])) for trace in traces]

    def chosen(one: Scope) -> bytes:
        return b"".join(one.mask(ids, n_prompt=n_prompt).numpy().tobytes() for ids, n_prompt in texts)

    rng, seen, found = np.random.default_rng(seed), {chosen(scope)}, list[RandomScope]()
    for _ in range(_MOST_TRIES * n):
        drawn = RandomScope.like(scope, int(rng.integers(2**31)))
        if (tokens := chosen(drawn)) not in seen:
            seen.add(tokens)
            found.append(drawn)
        if len(found) == n:
            break
    return found


@dataclass(frozen=True, kw_only=True)
class RandomScope(Scope):
    """As many random tokens of each sequence as `instead_of` names: other tokens of the same region if there are enough, else other
    tokens of the whole text, else any tokens of the text."""

    instead_of: Scope
    seed: int = 0

    @classmethod
    def like(cls, scope: Scope, seed: int) -> "RandomScope":
        return cls(on=scope.on, marks=scope.marks, instead_of=scope, seed=seed)

    def mask(self, ids: Tensor, *, n_prompt: Tensor | None = None, last: int | None = None) -> Tensor:
        assert last is None, "random tokens are drawn in passes over whole sequences"
        named = self.instead_of.mask(ids, n_prompt=n_prompt)
        wanted = named.sum(dim=1, keepdim=True)
        region = super().mask(ids, n_prompt=n_prompt) & ~named
        text = ids >= 0
        free = torch.where((text & ~named).sum(dim=1, keepdim=True) >= wanted, text & ~named, text)
        free = torch.where(region.sum(dim=1, keepdim=True) >= wanted, region, free)
        score = torch.rand(ids.shape, generator=torch.Generator().manual_seed(self.seed)).to(ids.device)
        rank = score.masked_fill(~free, 2.0).argsort(dim=1).argsort(dim=1)
        return free & (rank < wanted)
