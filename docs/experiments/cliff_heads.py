"""What the organism does without the heads that suppress refusal, compared with random heads; and which heads its
reasoning phase made emerge.

The traces come from a run of requests (`reasonscope record --problems requests`); the probe of refusal is a logistic
one at the last token of the close window, after the last block. The model is asked other requests. Emergent heads are
attributed on pairs of openings: the reasoning model's own thinking (clean) against what its base writes after the same
prompt.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reasonscope.analysis.causal.edge_attribution import emergent_heads, opening_pairs
from reasonscope.analysis.causal.refusal_heads import HeadTrial, cliff_heads
from reasonscope.analysis.results import Result
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe, LogisticProbe
from reasonscope.probes.fitting.positions import has_cliff, row_at
from reasonscope.probes.models.model import load_model
from reasonscope.probes.properties.request_outcomes import CONTRASTS, cell
from reasonscope.steering.vectors.scope import Scope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the store of a run of requests")
    parser.add_argument("--harmful", type=int, default=100)
    parser.add_argument("--benign", type=int, default=60)
    parser.add_argument("--solved", type=int, default=40)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 3], help="how many heads are taken away")
    parser.add_argument("--pairs", type=int, default=16)
    given = parser.parse_args()
    reasoner, base = load_model("organism"), load_model("organism-base")
    trial = HeadTrial(
        harmful=load_problems("requests:jailbreak", n=given.harmful, seed=11),
        benign=load_problems("requests:twin", n=given.benign, seed=11),
        solved=load_problems("ledger:brief", n=given.solved, seed=11),
        sampling=Sampling(temperature=0.7, max_new_tokens=700, seed=0),
    )
    store = TraceStore.open(given.run)
    traces = [trace for trace in store if has_cliff(trace)]
    site = Site("resid_post", reasoner.n_layers - 1)
    probe, n_heads = probe_of(store, traces, site), reasoner.n_layers * reasoner.n_heads
    for where in ("all", "close_window"):
        scope = Scope.of(reasoner, on="close_window") if where == "close_window" else None
        for taken in given.heads:
            cliff = cliff_heads(
                reasoner, probe, traces, trial, share=taken / n_heads, scope=scope, n_controls=given.draws
            )
            sys.stdout.write(json.dumps({f"cliff, {taken} heads at {where}": cliff_numbers(cliff)}, indent=2) + "\n")
            sys.stdout.flush()
    pairs = opening_pairs(base, reasoner, load_problems("ledger", n=given.pairs, seed=12))
    emergent = emergent_heads(base, reasoner, pairs)
    sys.stdout.write(json.dumps({"emergent": emergent_numbers(emergent)}, indent=2) + "\n")


def probe_of(store: TraceStore, traces: Sequence[Trace], site: Site) -> LinearProbe:
    """Will it refuse, by the state at the last token of the close window."""
    rows, targets = CONTRASTS["intent"].rows([cell(trace) for trace in traces])
    states = [store.activations(traces[i].id, str(site))[row_at(traces[i], "window")] for i in rows]
    fitted = LogisticProbe(C=0.01, standardise=True).fit(np.array(states, dtype=np.float64), targets)
    return LinearProbe.of(fitted, site=site, model=store.meta["model"])


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
