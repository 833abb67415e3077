"""Edge attribution with integrated gradients: how much of a change in the logits each edge between heads and MLPs
carries.

Thinking Sparks (arXiv 2509.25758) calls a head emergent if it is in the circuit of the post-trained model and not in
that of its base. The score of an edge u → v is ⟨z_u − z'_u, mean over k of ∂L/∂(input of v) at z' + (k/m)(z − z')⟩, z
clean and z' corrupted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from reasonscope.analysis.results import Axis, Result
from reasonscope.analysis.statistics import null_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.layout import Layout
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions, gradients
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import Model

_STEPS = 8
_TINY = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class _EdgeScores:
    """Scores of the edges from each of `sources` to each of `targets`: `scores` (source, target), summed over tokens.

    `sources` are `embedding`, `head l.h` and `mlp l`; `targets` are `attention l`, `mlp l` and `logits`. `loss` is the
    divergence between clean and corrupted logits; `completeness` is the share of it that the edges of the embedding
    carry, 1 with enough steps.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    scores: Values
    loss: float
    completeness: float

    def head_importance(self, n_layers: int, n_heads: int) -> Values:
        """Σ |score| of the edges that leave each head, summing to 1 over heads: (layer, head)."""
        found = np.zeros((n_layers, n_heads))
        for name, row in zip(self.sources, self.scores, strict=True):
            if name.startswith("head "):
                layer, index = map(int, name.removeprefix("head ").split("."))
                found[layer, index] = np.abs(row).sum()
        return np.asarray(found / max(found.sum(), np.finfo(float).tiny))


def _edge_scores(model: Model, clean: Sequence[int], corrupted: Sequence[int], *, steps: int = _STEPS) -> _EdgeScores:
    """EAP-IG for one pair of sequences of the same length; L is the KL from the clean to the current distribution at
    the last token.

    Integrates along the embeddings, at the midpoints of `steps` intervals. Departures: midpoints instead of the right
    ends of the paper's sum (the error falls with the square of the steps); queries, keys and values of a block are one
    target; if attention and MLP read the same input (GPT-NeoX), both are counted at the attention. Raises InputError
    for different lengths, and for a pair with equal logits.
    """
    if len(clean) != len(corrupted) or len(clean) < 1:
        raise InputError(f"{len(clean)} clean and {len(corrupted)} corrupted tokens; cut both to the same length")
    parts = _Parts(model)
    kept, dropped = parts.at(clean), parts.at(corrupted)
    target = kept.logits.log_softmax(-1)
    loss = kl_divergence(target, dropped.logits.log_softmax(-1))
    if float(loss) <= 0:
        raise InputError(
            "clean and corrupted logits are the same, so no edge carries a difference; choose another pair"
        )
    start = Site("resid_pre", 0)
    change = kept.states[start] - dropped.states[start]
    sums: list[Tensor] = []
    for step in tracked(range(steps), "integrating", "steps"):
        point = dropped.states[start] + (step + 0.5) / steps * change
        found = parts.branch_gradients(point, clean, target)
        sums = [
            total + own / steps
            for total, own in zip(sums or [torch.zeros_like(one) for one in found], found, strict=True)
        ]
    writes = parts.differences(kept, dropped)
    scores = np.zeros((len(writes), len(sums)))
    for row, (name, write) in enumerate(writes.items()):
        for column in range(_first_reader(name), len(sums)):
            scores[row, column] = float((write * sums[column]).sum())
    layers = range(model.n_layers)
    return _EdgeScores(
        sources=tuple(writes),
        targets=(*(f"{kind} {layer}" for layer in layers for kind in ("attention", "mlp")), "logits"),
        scores=scores,
        loss=float(loss),
        completeness=float(scores[0].sum()) / -float(loss),  # L is 0 at the clean end
    )


def opening_pairs(
    base: Model, reasoner: Model, problems: Sequence[Problem], *, tokens: int = 16
) -> list[tuple[list[int], list[int]]]:
    """Clean and corrupted sequences for `emergent_heads`: each prompt with the opening of the reasoner, and with that of its base.

    Both write greedily after the reasoner's prompt and are cut to the shorter one. Departure: the paper exchanges the roles for the base.
    """
    prompts = [reasoner.encode_prompt(problem) for problem in problems]
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    sides = [
        [done.token_ids.tolist() for done in generate(model, prompts, sampling, seeds=[0] * len(prompts))]
        for model in (reasoner, base)
    ]
    cut = [(clean[: len(corrupted)], corrupted[: len(clean)]) for clean, corrupted in zip(*sides, strict=True)]
    pairs = [(clean, corrupted) for clean, corrupted in cut if clean != corrupted]
    if not pairs:
        raise InputError(
            f"{base.name} and {reasoner.name} open all {len(problems)} problems with the same tokens; give other problems"
        )
    return pairs


def emergent_heads(
    base: Model,
    reasoner: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    steps: int = _STEPS,
    seed: int = 0,
) -> Result:
    """How much more each head carries in a reasoning model than in its base (Thinking Sparks, arXiv 2509.25758).

    The importance I of a head is the share of absolute edge scores that leave it (EAP-IG), averaged over the pairs.

    Args:
        base: The base model.
        reasoner: The model trained from it.
        pairs: Clean and corrupted token ids of equal length (see `opening_pairs`); the same pairs go through both
            models.
        steps: Steps of the integration.
        seed: Random seed.

    Returns:
        Axes (layer, head): (I_post − I_pre) / (I_post + I_pre + 1e-6). The null exchanges base and reasoner pair by
        pair at random, 95 % of 200 draws. `numbers` has the completeness of every attribution; if it is far from 1,
        take more steps.

    Raises:
        InputError: For models of different shapes.

    Departures: those of `_edge_scores` (midpoints, one target per block) and `opening_pairs` (the same pairs for both
    models).

    Example:
        results = rs.analyse("emergent_heads", "runs/mine", base="Qwen/Qwen3-1.7B-Base")
        results[0].values  # (layer, head), 1 if only the reasoner uses it
        results[0].numbers["completeness"]
    """
    if (base.n_layers, base.n_heads) != (reasoner.n_layers, reasoner.n_heads):
        raise InputError(
            f"{base.name} has {base.n_layers} × {base.n_heads} heads and {reasoner.name} {reasoner.n_layers} × {reasoner.n_heads}; "
            "give a base and its own descendant"
        )
    shape = reasoner.n_layers, reasoner.n_heads
    todo = [(model, pair) for model in (base, reasoner) for pair in pairs]
    scored = [_edge_scores(model, *pair, steps=steps) for model, pair in tracked(todo, "attributing edges", "pairs")]
    found = [scored[: len(pairs)], scored[len(pairs) :]]
    before, after = (np.stack([one.head_importance(*shape) for one in side]) for side in found)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(200):
        flip = rng.random(len(pairs))[:, None, None] < 0.5
        drawn.append(_effect(np.where(flip, after, before).mean(axis=0), np.where(flip, before, after).mean(axis=0)))
    return Result(
        method="emergent_heads",
        quantity="relative change of a head's importance, base to reasoner",
        unit="1",
        axes=(Axis.of("layer", shape[0]), Axis.of("head", shape[1])),
        values=_effect(before.mean(axis=0), after.mean(axis=0)),
        null=null_band(drawn, "base and reasoner exchanged at random, pair by pair"),
        arrays={"base": before.mean(axis=0), "reasoner": after.mean(axis=0)},
        numbers={"completeness": [[one.completeness for one in side] for side in found], "n_pairs": len(pairs)},
        provenance={"base": base.name, "reasoner": reasoner.name, "steps": steps, "seed": seed},
    )


def _effect(before: Values, after: Values) -> Values:
    return np.asarray((after - before) / (after + before + _TINY))


def _first_reader(source: str) -> int:
    """The first target (attention 0, mlp 0, attention 1, …) that reads what `source` writes."""
    kind, _, place = source.partition(" ")
    return 0 if kind == "embedding" else 2 * int(place.split(".")[0]) + (1 if kind == "head" else 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pass:
    logits: Tensor
    states: Mapping[Site, Tensor]


def _not_a_sum(layout: Layout) -> str | None:
    """Why the stream of a model is more than what heads and MLPs write; None if it is not."""
    if any(block.has_post_norm for block in layout.of_block):
        return "normalises the output of its heads"
    if layout.scales_stream:
        return "scales its whole stream"
    if not len(layout.layers_with("z")) == len(layout.layers_with("mlp_out")) == len(layout.of_block):
        return "has blocks without heads or without an MLP"
    return "has mixers beside its heads" if layout.layers_with("mixer_out") else None


class _Parts:
    """The parts of a model that write to its stream, and the gradients of those that read it."""

    def __init__(self, model: Model) -> None:
        if reason := _not_a_sum(model.layout):
            raise InputError(
                f"{model.layout.model_type} {reason}, so what it writes is not a sum over heads and MLPs; use another family"
            )
        self._model = model
        layers = range(model.n_layers)
        self._stream = [Site(point, layer) for layer in layers for point in ("resid_pre", "attn_out")]
        self._stream.append(Site("resid_post", model.n_layers - 1))

    def at(self, ids: Sequence[int]) -> _Pass:
        layers = range(self._model.n_layers)
        read = [
            Site("resid_pre", 0),
            *(Site("z", layer) for layer in layers),
            *(Site("mlp_out", layer) for layer in layers),
        ]
        fed = torch.tensor([list(ids)], device=self._model.device)
        out = self._model.backend.forward(fed, mask=torch.ones_like(fed), last_logits_only=True, read=read)
        return _Pass(
            logits=out.logits[0, -1].float(), states={site: state.float() for site, state in out.activations.items()}
        )

    def branch_gradients(self, embedded: Tensor, ids: Sequence[int], target: Tensor) -> list[Tensor]:
        """∂L/∂(input of each attention, each MLP, and of the logits), with `embedded` in place of the embeddings.

        The gradient at a point of the stream goes through everything that reads it from there on (at `attn_out`: after
        the attention), so that of one reader is the difference to the next point.
        """
        fed = torch.tensor([list(ids)], device=self._model.device)

        def put(state: Tensor, where: Positions) -> Tensor:
            return embedded.to(state).detach().requires_grad_()

        write: dict[Site, Edit] = {Site("resid_pre", 0): put}
        with gradients():
            out = self._model.backend.forward(
                fed, mask=torch.ones_like(fed), last_logits_only=True, read=self._stream, write=write
            )
            states = [out.activations[site] for site in self._stream]
            found = torch.autograd.grad(kl_divergence(target, out.logits[0, -1].float().log_softmax(-1)), states)
        stream = [gradient.float() for gradient in found]
        return [*(here - behind for here, behind in pairwise(stream)), stream[-1]]

    def differences(self, clean: _Pass, corrupted: _Pass) -> dict[str, Tensor]:
        """What each part writes in the clean pass minus what it writes in the corrupted one: (1, token, d_model)."""
        start = Site("resid_pre", 0)
        found = {"embedding": clean.states[start] - corrupted.states[start]}
        for layer in range(self._model.n_layers):
            weight, _ = self._model.layout.output_weights(self._model.hf, layer)  # the bias is the same in both
            z = clean.states[Site("z", layer)] - corrupted.states[Site("z", layer)]
            written = torch.einsum("bthd,hdm->hbtm", z, weight.detach().float())
            found |= {f"head {layer}.{index}": head for index, head in enumerate(written)}
            found[f"mlp {layer}"] = clean.states[Site("mlp_out", layer)] - corrupted.states[Site("mlp_out", layer)]
        return found
