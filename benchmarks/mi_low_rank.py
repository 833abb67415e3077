"""The statistic of MI-Peaks for one whole trace: the exact low-rank form against the published dense algorithm, in one run.

The dense form uses float64 matrices where the published code uses float32, and like it recomputes the answer's side for every token. All
tokens would take minutes to hours, so a few are timed and the rest is extrapolated, as the table says.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.tokens.nocco import EPSILON, SIGMA, mutual_information

sys.path.insert(0, str(Path(__file__).parent))
from goals import verdict


def dense(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """tr(R_x R_y) with R = K̄ (K̄ + εd I)⁻¹ and K̄ = K H, as published."""
    d = len(x)
    centre = np.eye(d) - 1 / d
    sides = []
    for values in (x, y):
        kernel = np.exp(-((values[:, None] - values) ** 2) / (2 * SIGMA**2)) @ centre
        sides.append(kernel @ np.linalg.inv(kernel + EPSILON * d * np.eye(d)))
    return float((sides[0] * sides[1].T).sum())


def row(width: int, tokens: int, timed: int, goal: float) -> str:
    """One width as a row of the table; stops where the two forms disagree."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((tokens, width)), rng.standard_normal(width)
    x[:, :2] *= 100  # the few coordinates of huge scale that real residual streams have
    began = time.process_time()
    fast = mutual_information(x, y)
    low_rank = time.process_time() - began
    began = time.process_time()
    slow = np.array([dense(one, y) for one in x[:timed]])
    whole = (time.process_time() - began) / timed * tokens
    error = float(np.abs(fast[:timed] - slow).max())
    if error > 1e-9:
        raise ValueError(f"the two forms differ by {error} at a width of {width}")
    seconds, ratio = f"{low_rank:.3f} s | {whole:,.1f} s, from {timed}", whole / low_rank
    return f"| {width:,} | {seconds} | {ratio:,.0f} | ≥ {goal:,.0f} | {verdict(ratio, at_least=goal)} | {error:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a width of 1,024 alone, one token of the dense form")
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    sizes = [(1_024, 1, 1_000.0)] if given.small else [(1_024, 3, 1_000.0), (4_096, 1, 10_000.0)]
    lines = [
        "## MI of all tokens, low rank against dense (W9)",
        "",
        __doc__.split("\n\n", 1)[1].strip(),
        "",
        f"{given.tokens} tokens, processor seconds.",
        "",
        "| width | low rank, all tokens | dense, extrapolated | times faster | goal | | largest difference |",
        "|---|---|---|---|---|---|---|",
        *(row(width, given.tokens, timed, goal) for width, timed, goal in sizes),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
