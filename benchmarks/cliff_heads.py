"""What the organism does without the heads that suppress refusal, beside random heads; and which heads its reasoning phase brought.

The probe and the traces come from a run of requests: `reasonscope record --problems requests`, then `reasonscope probe refusal`. Emergent
heads are attributed on pairs of openings: the reasoner's own thinking (clean) against what its base writes after the same prompt.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from reasonscope.analysis.cliff import Trial, cliff_heads
from reasonscope.analysis.edge_attribution import emergent_heads, opening_pairs
from reasonscope.analysis.results import Result
from reasonscope.app.places import places
from reasonscope.data.problems import load_problems
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Sampling
from reasonscope.probes.linear import LinearProbe
from reasonscope.probes.model import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run of requests with its refusal probe")
    parser.add_argument("--harmful", type=int, default=100)
    parser.add_argument("--benign", type=int, default=60)
    parser.add_argument("--solved", type=int, default=40)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=16)
    given = parser.parse_args()
    where = places(given.run)
    reasoner, base = load_model("organism"), load_model("organism-base")
    trial = Trial(
        harmful=load_problems("requests:jailbreak", n=given.harmful, seed=11),
        benign=load_problems("requests:twin", n=given.benign, seed=11),
        solved=load_problems("ledger", n=given.solved, seed=11),
        sampling=Sampling(temperature=0.7, max_new_tokens=700, seed=0),
    )
    probe = LinearProbe.load(where.probes / "refusal.safetensors")
    cliff = cliff_heads(reasoner, probe, list(TraceStore.open(where.store)), trial, draws=given.draws)
    pairs = opening_pairs(base, reasoner, load_problems("ledger", n=given.pairs, seed=12))
    emergent = emergent_heads(base, reasoner, pairs)
    table = {"cliff": cliff_numbers(cliff), "emergent": emergent_numbers(emergent)}
    sys.stdout.write(json.dumps(table, indent=2) + "\n")


def cliff_numbers(found: Result) -> dict[str, object]:
    assert found.interval is not None
    random = np.asarray(found.arrays["random"])
    return {
        **found.numbers,
        "rates": {
            arm: {
                metric: [found.values[i, j], found.interval.low[i, j], found.interval.high[i, j]]
                for j, metric in enumerate(found.axes[1].labels)
            }
            for i, arm in enumerate(found.axes[0].labels)
        },
        "random": {
            metric: [float(random[:, j].min()), float(np.median(random[:, j])), float(random[:, j].max())]
            for j, metric in enumerate(found.axes[1].labels)
        },
    }


def emergent_numbers(found: Result) -> dict[str, object]:
    assert found.null is not None
    order = np.argsort(-found.values, axis=None)
    heads = [(int(i) // found.values.shape[1], int(i) % found.values.shape[1]) for i in order]
    return {
        "heads": {f"{layer}.{head}": float(found.values[layer, head]) for layer, head in heads},
        "above_null": [
            f"{layer}.{head}" for layer, head in heads if found.values[layer, head] > found.null.high[layer, head]
        ],
        "below_null": [
            f"{layer}.{head}" for layer, head in heads if found.values[layer, head] < found.null.low[layer, head]
        ],
        "completeness": [
            [float(np.mean(side)), float(np.min(side)), float(np.max(side))] for side in found.numbers["completeness"]
        ],
    }


if __name__ == "__main__":
    main()
