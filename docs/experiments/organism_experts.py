"""RICE (arXiv 2505.14681) on a mixture of experts that thinks: the organism, which is dense, upcycled and trained on for a little.

Each MLP becomes eight copies behind a router that chooses two (sparse upcycling, arXiv 2212.05055); a few steps on the organism's own
documents let them part. The two experts that go with the markers of thinking are turned up, beside random pairs of experts; and
their score is compared with that for other tokens as frequent. Printed are JSON lines; `--out` gets the figure.
docs/methods/decoding.md has the numbers.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from reasonscope.analysis.figures import steering_front, write_figure
from reasonscope.data import Sampling, load_problems
from reasonscope.data.organism.corpus import batches, practice_documents
from reasonscope.data.organism.train import loss_of
from reasonscope.probes import Model, load_model, rollouts
from reasonscope.steering import Arm, DecodingResponse, SteeringExperiment
from reasonscope.steering.methods.expert_routing import (
    WEIGHTS,
    Expert,
    ExpertCounts,
    cognitive_experts,
    count_experts,
    npmi,
    random_experts,
    reinforced,
)
from reasonscope.steering.vectors.thinking import WrittenThinking

EXPERTS, CHOSEN = 8, 2
BETAS = (2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--steps", type=int, default=80, help="of 2,048 tokens, after the upcycling")
    parser.add_argument("--n", type=int, default=40, help="ledgers of 1 to 4 steps, on each side")
    parser.add_argument("--n-controls", type=int, default=5)
    given = parser.parse_args()
    dense = load_model("organism")
    model = load_model(trained(upcycled(dense), dense, given.steps), tokenizer=dense.tokenizer)
    sampling = Sampling(temperature=0.7, max_new_tokens=450, seed=0)
    written = rollouts(model, ledgers("train", given.n), sampling, batch_size=64)
    sequences = [trace.token_ids.tolist() for trace in written]
    thinking = WrittenThinking.of(model)
    markers = {
        "<think>": thinking.opens,
        "</think>": thinking.closes,
        "Alternatively": model.tokenizer.encode("Alternatively")[0],
    }
    counts = count_experts(model, sequences, markers)
    best = cognitive_experts(counts)
    found = {"experts": [f"{e.layer}.{e.index}" for e in best], "score": score(counts)[best[0].layer, best[0].index]}
    found |= {
        "markers": dict(counts.markers),
        "score of other tokens": other_scores(model, sequences, set(markers.values())),
    }
    report({"experts": found, "right": np.mean([bool(trace.correct) for trace in written])})
    # Inside `reinforced` the plain model is turned up as well, so that nothing can be read with and without it.
    experiment = SteeringExperiment(model, ledgers("test", given.n), sampling, on_given_text=False)
    arms = [reinforcing(experiment, "RICE", best, beta) for beta in BETAS]
    draws = random_experts(best, counts.in_total, n_controls=given.n_controls)
    controls = [
        reinforcing(experiment, f"random {i + 1}", draw, beta) for i, draw in enumerate(draws) for beta in BETAS
    ]
    response = DecodingResponse(
        name="RICE",
        unit="β",
        base=experiment.base_arm,
        arms=tuple(arms),
        controls=tuple(controls),
        control_name="random experts",
    )
    for arm in (experiment.base_arm, *arms, *controls):
        estimates = {"tokens": arm.tokens, "change": arm.change, "change of accuracy": arm.differences["accuracy"]}
        report({"arm": arm.name, "β": arm.multiplier, **{k: [e.value, e.low, e.high] for k, e in estimates.items()}})
    (given.out / "figures").mkdir(parents=True, exist_ok=True)
    write_figure(steering_front([response]), given.out / "figures" / "rice.json")


def upcycled(dense: Model) -> Qwen3MoeForCausalLM:
    """The same function: every expert is the MLP, and the weights of those that are chosen sum to 1."""
    kept = {
        key: value for key, value in dense.hf.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    torch.manual_seed(0)
    size = int(kept["intermediate_size"])
    config = Qwen3MoeConfig(
        **kept, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=size, norm_topk_prob=True
    )
    model = Qwen3MoeForCausalLM(config)
    model.load_state_dict(dense.hf.state_dict(), strict=False)
    for old, new in zip(dense.hf.model.layers, model.model.layers, strict=True):
        gate_up = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]).detach()
        new.mlp.experts.gate_up_proj.data = gate_up.repeat(EXPERTS, 1, 1)
        new.mlp.experts.down_proj.data = old.mlp.down_proj.weight.detach().repeat(EXPERTS, 1, 1)
    return model


def trained(model: Qwen3MoeForCausalLM, dense: Model, steps: int) -> Qwen3MoeForCausalLM:
    """Experts and routers alone, on practice documents; the balance of the experts is part of the loss, as usual."""
    parts = [p.requires_grad_("mlp" in name) for name, p in model.named_parameters() if "mlp" in name]
    optimiser = torch.optim.AdamW(parts, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    stream = batches(practice_documents(random.Random("upcycled")), dense.tokenizer_backend, tokens=2048)
    balance = Balance(model)
    for step, batch in zip(range(steps), stream, strict=False):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss = loss_of(model, batch, "cpu")
        (loss + 0.01 * balance.loss()).backward()
        nn.utils.clip_grad_norm_(parts, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step in (0, steps - 1):
            report({"step": step + 1, "loss": loss.item()})
    balance.remove()
    return model.eval()


class Balance:
    """Switch Transformer's loss of balance over all layers: experts · Σ share of tokens · mean probability; 1 if all are equal."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self._logits: list[torch.Tensor] = []
        gates = [layer.mlp.gate for layer in model.model.layers]
        self._hooks = [gate.register_forward_hook(lambda _, __, out: self._logits.append(out[0])) for gate in gates]

    def loss(self) -> torch.Tensor:
        probabilities = torch.cat([one.flatten(0, -2) for one in self._logits]).float().softmax(-1)
        self._logits.clear()
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(CHOSEN, dim=-1).indices, 1.0)
        return EXPERTS * (chosen.mean(0) / CHOSEN * probabilities.mean(0)).sum()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def ledgers(split: str, n: int) -> list:
    return [one for one in load_problems("ledger", split=split, n=2 * n) if (one.difficulty or 0) <= 4][:n]


def score(counts: ExpertCounts) -> np.ndarray:
    """Σ weight · nPMI (layer, expert)."""
    names = {name: WEIGHTS.get(name, WEIGHTS["<think>"]) for name in counts.on_markers}
    return sum(
        w * npmi(counts.on_markers[n], counts.in_total, counts.markers[n], counts.tokens) for n, w in names.items()
    )


def other_scores(model: Model, sequences: list[list[int]], markers: set[int], draws: int = 20) -> list[float]:
    """The highest score if three random tokens that occur as often as "Alternatively" replace the markers."""
    often = Counter(token for sequence in sequences for token in sequence)
    least = min(often[token] for token in markers)
    free = sorted(token for token, count in often.items() if count >= least and token not in markers)
    rng = np.random.default_rng(0)
    triples = [rng.choice(free, size=3, replace=False) for _ in range(draws)]
    every = count_experts(
        model, sequences, {str(token): int(token) for token in {int(t) for one in triples for t in one}}
    )
    highest = []
    for triple in triples:
        names = dict(zip(WEIGHTS, map(str, triple.tolist()), strict=True))
        drawn = ExpertCounts(
            on_markers={name: every.on_markers[token] for name, token in names.items()},
            in_total=every.in_total,
            markers={name: every.markers[token] for name, token in names.items()},
            tokens=every.tokens,
        )
        highest.append(float(score(drawn).max()))
    return [min(highest), float(np.median(highest)), max(highest)]


def reinforcing(experiment: SteeringExperiment, name: str, experts: Sequence[Expert], beta: float) -> Arm:
    _ = experiment.base  # measured before anything is turned up
    with reinforced(experiment.model, experts, beta):
        run = experiment.run(name)
    return experiment.arm(name, beta, run)


def report(numbers: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(numbers, default=float) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
