"""Representation Recycling: a step about to write a reasoning token runs again on what it computed (MI-Peaks, arXiv
2506.02867)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from reasonscope.analysis.results import Result
from reasonscope.analysis.tokens.arm_results import compare_arms
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.decoding import Completion, room_for, sample
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.experiment import ArmMeasurements, SteeringExperiment


@dataclass(frozen=True, kw_only=True)
class Recycling:
    """Parameters of Representation Recycling.

    Attributes:
        layer: The block whose input at the last position is replaced by its own output in the second run.
        tokens: A step about to write one of these runs again.
        probability: With this probability.
        at_random: If given, this share of ALL steps is recycled instead: the control for the extra computation.
        coins: Another number gives other coin flips for the same draws.
    """

    layer: int
    tokens: tuple[int, ...]
    probability: float = 0.5
    at_random: float | None = None
    coins: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or not 0 <= (self.at_random or 0) <= 1:
            raise InputError(f"probabilities {self.probability} and {self.at_random}; they must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class _Recycled:
    """Completions, and how many steps were run again in each: (prompt,)."""

    completions: list[Completion]
    recycled: tuple[int, ...]


def _recycle(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, how: Recycling, *, seeds: Sequence[int]
) -> _Recycled:
    """Complete prompts with Representation Recycling (section 5 of the paper; its code's RR_model.py).

    Departures: coins come from the sequence's own seed, so that a run can be repeated (the code draws them unseeded,
    from all sequences in turn); the second run REPLACES the keys and values of the first (with recent transformers the
    code appends them, and the position counts twice); layer 0 is possible. Probability 0 gives exactly the output of
    `generate`. Raises InputError for a layer that does not exist, or prompts and seeds that cannot be fed; ContextError
    for a prompt that leaves no room.
    """
    if not 0 <= how.layer < model.n_layers:
        raise InputError(f"layer {how.layer}; {model.name} has {model.n_layers} blocks, from 0")
    limits = torch.tensor(room_for(model, prompts, sampling, seeds), device=model.device)
    if not prompts:
        return _Recycled(completions=[], recycled=())
    longest, device = int(limits.max()), model.device
    feed, mask = left_padded(prompts, device)
    draws = torch.from_numpy(np.stack([np.random.default_rng(seed).random(longest) for seed in seeds])).to(device)
    fallen = [np.random.default_rng([seed, 1 + how.coins]).random(longest) for seed in seeds]
    coins = torch.from_numpy(np.stack(fallen)).to(device)
    wanted, stops = (torch.tensor(sorted(ids), device=device) for ids in (how.tokens, model.stop_ids))
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    stopped = torch.zeros_like(going)
    again = torch.zeros(len(prompts), dtype=torch.long, device=device)
    cache: object = DynamicCache()
    written: list[tuple[Tensor, Tensor, Tensor]] = []
    lengths = limits.clone()
    for index in range(longest):
        out = model.backend.forward(
            feed, mask=mask, cache=cache, use_cache=True, last_logits_only=True, read=[Site("resid_post", how.layer)]
        )
        token, logprob, entropy = sample(out.logits[:, -1], sampling, draws[:, index])
        share = how.probability if how.at_random is None else how.at_random
        chosen = going & (coins[:, index] < share)
        if how.at_random is None:
            chosen &= torch.isin(token, wanted)
        if chosen.any():
            state = out.activations[Site("resid_post", how.layer)][:, -1]
            _forget(out.cache, feed.shape[1])
            out = model.backend.forward(
                feed,
                mask=mask,
                cache=out.cache,
                use_cache=True,
                last_logits_only=True,
                write={Site("resid_pre", how.layer): _replacing(state, chosen)},
            )
            token, logprob, entropy = sample(out.logits[:, -1], sampling, draws[:, index])
            again += chosen
        cache = out.cache
        written.append((token, logprob, entropy))
        now = going & torch.isin(token, stops)
        lengths[now] = index + 1
        stopped |= now
        going &= ~now & (limits > index + 1)
        # Sequences that have ended are still fed, but masked: their positions stay within the context.
        feed, mask = token[:, None], torch.cat([mask, going[:, None].to(mask)], dim=1)
        if not going.any():
            break
    return _Recycled(completions=_completions(prompts, written, lengths, stopped), recycled=tuple(again.tolist()))


def _forget(cache: object, tokens: int) -> None:
    """Remove the last `tokens` columns from a cache, or everything if it has no more."""
    for layer in cache.layers:  # type: ignore[attr-defined]  # now a transformers Cache
        layer.keys, layer.values = layer.keys[:, :, :-tokens], layer.values[:, :, :-tokens]


def _replacing(state: Tensor, rows: Tensor) -> Edit:
    """An edit that puts `state` (batch, d_model) at the last position of the chosen rows."""

    def edit(activation: Tensor, where: Positions) -> Tensor:
        last = torch.where(rows[:, None], state.to(activation), activation[:, -1])
        return torch.cat([activation[:, :-1], last[:, None]], dim=1)

    return edit


def _completions(
    prompts: Sequence[Sequence[int]], written: Sequence[tuple[Tensor, ...]], lengths: Tensor, stopped: Tensor
) -> list[Completion]:
    ids, logprobs, entropies = (torch.stack(parts, dim=1).cpu().numpy() for parts in zip(*written, strict=True))
    return [
        Completion(
            token_ids=np.concatenate([np.asarray(prompt, dtype=np.int64), ids[row, :n]]),
            n_prompt_tokens=len(prompt),
            finish_reason="stop" if stopped[row] else "length",
            logprobs=logprobs[row, :n].astype(np.float32),
            entropies=entropies[row, :n].astype(np.float32),
        )
        for row, (prompt, n) in enumerate(zip(prompts, lengths.tolist(), strict=True))
    ]


def recycling_study(
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    how: Recycling,
    *,
    n_controls: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """Accuracy and length with Representation Recycling, without it, and with as many steps recycled at random (arXiv
    2506.02867).

    Args:
        model: A native model.
        problems: Problems with gold answers.
        sampling: How to sample.
        how: The parameters of recycling.
        n_controls: Random arms, which recycle the share of all steps that the thinking tokens made up, each with its
            own coins.
        batch_size: Prompts per batch.
        seed: Random seed.

    Returns:
        Axes (arm, metric): accuracy and tokens; the null is the range of the random arms.

    Raises:
        InputError: For a layer that does not exist, or problems without gold answers.

    Departures: those of `_recycle`: seeded coins, and keys and values that are replaced, not appended.

    Example:
        from reasonscope.analysis.tokens.recycling import Recycling
        how = Recycling(layer=12, tokens=(14190,))  # " Wait"
        result = rs.analysis.recycling_study(model, problems, rs.Sampling(temperature=0.6), how)
    """
    experiment = SteeringExperiment(model, problems, sampling, batch_size=batch_size, on_given_text=False)
    counts: dict[str, int] = {"base": 0}

    def run(name: str, chosen: Recycling) -> ArmMeasurements:
        def decode(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
            done = _recycle(model, prompts, sampling, chosen, seeds=seeds)
            counts[name] = counts.get(name, 0) + sum(done.recycled)
            return done.completions

        return experiment.run(name, decode=decode)

    arms = {"base": experiment.base, "recycled": run("recycled", how)}
    steps = sum(len(trace.token_ids) - trace.n_prompt_tokens for trace in arms["recycled"].traces)
    share = counts["recycled"] / max(steps, 1)
    for draw in range(n_controls):
        arms[f"random {draw + 1}"] = run(f"random {draw + 1}", replace(how, at_random=share, coins=draw))
    return compare_arms("recycling", arms, experiment, seed=seed, layer=how.layer, recycled=counts, share=share)
