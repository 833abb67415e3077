"""Rollouts that sequential stopping saves at equal precision: drawn from the accuracies that were published with real traces.

Every sentence of every trace gets rollouts that are right as often as its published accuracy says (100 rollouts each of
DeepSeek-R1-Distill-Qwen-14B). "Equal" is the same number for every sentence of a trace: the smallest at which the interval of the
least certain one is as narrow as asked. Coverage is how often the interval at the end holds the accuracy that was drawn from.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.data.exchange.importers import import_thought_anchors
from reasonscope.data.intervals import wilson_half_width, wilson_interval

WIDTHS = (0.05, 0.075, 0.096, 0.125, 0.15, 0.2)


def adaptive(accuracy: float, plan: Allotment, rng: np.random.Generator) -> tuple[int, int]:
    """Right ones, and all that the plan asks for."""
    hits = n = 0
    while more := plan.wanted(hits, n):
        hits, n = hits + int(rng.binomial(more, accuracy)), n + more
    return hits, n


def equal(accuracies: NDArray[np.float64], half_width: float) -> int:
    """The same number for all of them that is enough for the one nearest to a half."""
    worst = float(accuracies[np.argmin(np.abs(accuracies - 0.5))])
    return next(n for n in range(1, 10_000) if wilson_half_width(worst * n, n) <= half_width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", type=Path, required=True, help="a folder of published Thought Anchors traces")
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    traces = [
        np.array(
            [chunk["accuracy"] for chunk in trace.meta["chunks"] if isinstance(chunk.get("accuracy"), int | float)]
        )
        for trace in import_thought_anchors(given.published)
    ]
    rng = np.random.default_rng(0)
    n = sum(map(len, traces))
    sys.stdout.write(f"{len(traces)} traces, {n} sentences, {given.repeats} repeats\n\n")
    sys.stdout.write(
        "| half width | equal, a sentence | adaptive, a sentence | ratio | coverage of 95 % |\n|---|---|---|---|---|\n"
    )
    for width in WIDTHS:
        plan = Allotment(least=10, most=10_000, step=10, half_width=width)
        alike = sum(equal(accuracies, width) * len(accuracies) for accuracies in traces)
        spent, inside = 0, []
        for accuracy in np.tile(np.concatenate(traces), given.repeats):
            hits, used = adaptive(float(accuracy), plan, rng)
            spent += used
            low, high = wilson_interval(hits, used)
            inside.append(low <= accuracy <= high)
        mean = spent / given.repeats / n
        sys.stdout.write(
            f"| ± {width} | {alike / n:.0f} | {mean:.0f} | {mean * n / alike:.2f} | {np.mean(inside):.3f} |\n"
        )


if __name__ == "__main__":
    main()
