"""A probe that is read on every token while a model writes: its cost, as a ratio to the same generation without it.

The same prompts are written with and without a `ProbeMonitor`, in turns, and the ratio is of two runs of one turn. Both draw the
same tokens, which is checked. "May stop" has a threshold that no score reaches, so that only the cost of watching for it is added.
Seconds are processor seconds.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.decoding import Completion, generate
from reasonscope.probes.models.model import Model, load_model
from reasonscope.steering.decoding.monitor import ProbeMonitor

sys.path.insert(0, str(Path(__file__).parent))
from goals import quartiles, verdict
from rollouts import random_model

GOAL = 1.03


def random_probe(model: Model) -> LinearProbe:
    """A probe in the middle of a model."""
    coef = np.random.default_rng(0).standard_normal(model.d_model) / model.d_model
    site = Site("resid_post", model.n_layers // 2)
    return LinearProbe(coef=coef, intercept=0.0, site=site, task="binary", method="random", model=model.fingerprint)


def written(model: Model, rows: int, tokens: int, monitor: ProbeMonitor | None) -> tuple[float, list[Completion]]:
    """Processor seconds of writing, and what was written."""
    prompts = np.random.default_rng(1).integers(5, 700, size=(rows, 64)).tolist()
    how: dict[str, Any] = {}
    if monitor is not None:
        how = {"write": monitor.edits, "on_step": monitor.on_step, "processors": monitor.processors}
    sampling = Sampling(temperature=0.7, max_new_tokens=tokens)
    started = time.process_time()
    done = generate(model, prompts, sampling, seeds=list(range(rows)), **how)
    return time.process_time() - started, done


def report(name: str, model: Model, rows: int, tokens: int, turns: int) -> None:
    """A row for a monitor that reads, and one for a monitor that may stop."""
    probe = random_probe(model)
    written(model, rows, 8, ProbeMonitor(model, probe))  # warms up
    for kind, above in (("reads", None), ("may stop", 2.0)):
        ratios, extra = [], []
        for turn in range(turns):
            monitors = [None, ProbeMonitor(model, probe, stop_above=above)]
            runs = [written(model, rows, tokens, monitor) for monitor in (monitors if turn % 2 else monitors[::-1])]
            (plain, one), (watched, other) = runs if turn % 2 else runs[::-1]
            same = all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(one, other, strict=True))
            assert same, "a monitor changed what was written"
            ratios.append(watched / plain)
            extra.append((watched - plain) / tokens * 1e6)
        goal = verdict(ratios, at_most=GOAL)
        say(f"| {name}, {rows} rows, {kind} | {quartiles(ratios)} | {np.median(extra):.0f} | ≤ {GOAL} | {goal} |")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="Only try it.")
    parser.add_argument("--turns", type=int, default=9)
    asked = parser.parse_args()
    turns, tokens = (1, 8) if asked.small else (asked.turns, 96)
    torch.set_num_threads(1)
    say(f"## A probe that is read while the model writes\n\n{tokens} tokens, {turns} turns, one thread.\n")
    say("| | ratio to generation without it, median (quartiles) | µs per step | goal | |\n|---|---|---|---|---|")
    models = {"organism": load_model("organism"), "random Qwen3, 12 layers × 768": random_model(12, 768, head_dim=64)}
    for name, model in models.items():
        for rows in (1, 16):
            report(name, model, rows, tokens, turns)


if __name__ == "__main__":
    main()
