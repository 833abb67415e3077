"""Are the p-values of the probes uniform on pure noise, whatever number of layers they choose from?

    python tests/selftest/null_of_probes.py [--runs 500] [--cases refusal-8 length-28 …] [--out FILE] [--table]

Each run draws 40 problems with fresh labels and fresh states of width 8, and calls the probe's public function with 199 shuffles, 20
resamples and few folds (3 for lengths; 2 for labels, whose fits take three times as long). For `remaining` and for a label at every third
token, traces differ in length by up to forty times and have one state throughout. Prints a row per case, a probe and a number of
layers: how often p ≤ .05, and how far the p-values are from a uniform distribution (Kolmogorov and Smirnov). `--out` keeps every p-value,
so that an interrupted measurement continues where it stopped; with `--table` it only prints the rows of what was kept.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from noise_runs import NoiseRun, noise_run, requests_run, uneven_run
from scipy.stats import kstest

from reasonscope import probes
from reasonscope.probes.properties.request_outcomes import CONTRASTS

_SMALL = {"n_permutations": 199, "n_resamples": 20}
REFUSAL_ALONE = {"refusal": CONTRASTS["refusal"]}


def length_p(run: NoiseRun, seed: int) -> float:
    return probes.length(run, run.traces, folds=3, seed=seed, **_SMALL).comparison.shuffled.p_value


def refusal_p(run: NoiseRun, seed: int) -> float:
    found = probes.refusal(run, run.traces, contrasts=REFUSAL_ALONE, n_controls=2, folds=2, seed=seed, **_SMALL)
    return found.comparison.shuffled.p_value


def correctness_p(run: NoiseRun, seed: int) -> float:
    return probes.correctness(run, run.traces, folds=2, seed=seed, **_SMALL).comparison.shuffled.p_value


def remaining_p(run: NoiseRun, seed: int) -> float:
    found = probes.remaining(run, run.traces, folds=3, seed=seed, **_SMALL)
    return found.comparison.shuffled.p_value


def label_p(run: NoiseRun, seed: int) -> float:
    classes = np.random.default_rng(seed).permutation(np.arange(len(run)) % 2)
    labels = dict(zip(run.ids, map(str, classes), strict=True))
    found = probes.fit(run, labels, run.traces, position="every:3", folds=2, seed=seed, **_SMALL)
    return found.comparison.shuffled.p_value


PROBES: dict[str, tuple[Callable[[np.random.Generator, int], NoiseRun], Callable[[NoiseRun, int], float]]] = {
    "length": (noise_run, length_p),
    "refusal": (requests_run, refusal_p),
    "correctness": (noise_run, correctness_p),
    "remaining": (uneven_run, remaining_p),
    "label": (uneven_run, label_p),
}

CASES = [f"{probe}-{n_layers}" for probe in PROBES for n_layers in (1, 8, 28)]
_TITLES = "| probe | layers | runs | p ≤ .05 | median p | distance | its p-value |\n|---|---|---|---|---|---|---|"


def p_of_noise(probe: str, n_layers: int, index: int) -> float:
    """The p-value of the run number `index`; the same number gives the same run on any machine."""
    rng = np.random.default_rng([index, n_layers, list(PROBES).index(probe)])
    draw, measured = PROBES[probe]
    return measured(draw(rng, n_layers), int(rng.integers(2**31)))


def row(case: str, found: list[float]) -> str:
    """A line of the table: the share of p ≤ .05 with three standard errors, and the test against a uniform distribution."""
    (probe, n_layers), p = case.split("-"), np.array(found)
    error, test = 3 * sqrt(0.05 * 0.95 / len(p)), kstest(p, "uniform")
    return (
        f"| `{probe}` | {n_layers} | {len(p)} | {np.mean(p <= 0.05):.3f} (.05 ± {error:.3f}) | {np.median(p):.2f} | "
        f"{test.statistic:.3f} | {test.pvalue:.2f} |"
    )


def measure(case: str, runs: int, kept: dict[str, list[float]], out: Path | None) -> None:
    """Add p-values to those `kept` of a case until there are `runs`, and write all down every ten runs."""
    (probe, n_layers), found = case.split("-"), kept.setdefault(case, [])
    while len(found) < runs:
        found.append(p_of_noise(probe, int(n_layers), len(found)))
        if out and (len(found) % 10 == 0 or len(found) == runs):
            out.write_text(json.dumps(kept))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="PROBE-LAYERS")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, list[float]] = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    for case in () if given.table else given.cases:
        began = time.process_time()
        measure(case, given.runs, kept, given.out)
        sys.stderr.write(
            f"{row(case, kept[case][: given.runs])} {time.process_time() - began:.0f} s of processor time\n"
        )
    rows = [row(case, kept[case][: given.runs]) for case in given.cases if kept.get(case)]
    sys.stdout.write("\n".join([_TITLES, *rows]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
