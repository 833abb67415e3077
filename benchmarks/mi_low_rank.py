"""The statistic of MI-Peaks for one whole trace: the exact low-rank form against the published dense algorithm, in one run.

The dense form takes the same float64 matrices as the published code takes float32 ones, and like it computes the answer's side anew for
every token. All tokens of it would take minutes to hours, so that a few are timed and the rest is extrapolated, which the table says.
"""

import argparse
import sys
import time

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.information import EPSILON, SIGMA, mutual_information


def dense(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """tr(R_x R_y) with R = K̄ (K̄ + εd I)⁻¹ and K̄ = K H, as published."""
    d = len(x)
    centre = np.eye(d) - 1 / d
    sides = []
    for values in (x, y):
        kernel = np.exp(-((values[:, None] - values) ** 2) / (2 * SIGMA**2)) @ centre
        sides.append(kernel @ np.linalg.inv(kernel + EPSILON * d * np.eye(d)))
    return float((sides[0] * sides[1].T).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1_024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--timed", type=int, default=3, help="tokens that the dense algorithm is timed on")
    parser.add_argument("--at-least", type=float, default=1_000.0)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((given.tokens, given.width)), rng.standard_normal(given.width)
    x[:, :2] *= 100  # the few coordinates of huge scale that real residual streams have
    began = time.process_time()
    fast = mutual_information(x, y)
    low_rank = time.process_time() - began
    began = time.process_time()
    slow = np.array([dense(row, y) for row in x[: given.timed]])
    whole = (time.process_time() - began) / given.timed * given.tokens
    error = float(np.abs(fast[: given.timed] - slow).max())
    ratio = whole / low_rank
    sys.stdout.write(
        f"d = {given.width}, {given.tokens} tokens: low rank {low_rank:.3f} CPU s (all tokens), dense {whole:.1f} s (extrapolated "
        f"from {given.timed} tokens), {ratio:.0f} times faster; largest difference {error:.1e}\n"
    )
    sys.exit(0 if ratio >= given.at_least and error < 1e-9 else 1)


if __name__ == "__main__":
    main()
