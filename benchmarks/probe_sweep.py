"""The batched sweep of probes against the same sweep by scikit-learn: seconds, their ratio, and whether both choose the same.

Both sides get the same rows, folds and penalties and choose the penalty of every layer and position by its held-out loss. scikit-learn
runs `GridSearchCV` of `Ridge` and of `LogisticRegression` with `n_jobs=-1`, each at its default tolerance; the batched solvers stop at 1e-9
in the logits. Its workers are started before the clock. `RidgeCV` without `cv` leaves out single rows, which is another choice.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold
from torch import Tensor
from torch.nn.functional import softplus

from reasonscope.probes.fitting import cholesky as symmetric
from reasonscope.probes.fitting import solvers
from reasonscope.probes.fitting.solvers import LinearPath, logistic_path, ridge_path

sys.path.insert(0, str(Path(__file__).parent))
from goals import verdict

ROWS, WIDTH, LAYERS, POSITIONS, FOLDS = 1_000, 1_536, 28, 4, 5
PENALTIES = tuple(float(penalty) for penalty in np.logspace(-4, 4, 9))
Selected = NDArray[np.intp]  # (position,) index of the penalty


@dataclass(frozen=True, kw_only=True)
class Method:
    """One kind of probe on both sides; `loss` of targets (row,) and scores (…, row)."""

    name: str
    batched: Callable[..., LinearPath]
    loss: Callable[[Tensor, Tensor], Tensor]
    grid: Callable[[], GridSearchCV]


def search(estimator: BaseEstimator, name: str, values: list[float], scoring: str) -> GridSearchCV:
    return GridSearchCV(
        estimator, {name: values}, cv=KFold(FOLDS), scoring=scoring, refit=False, n_jobs=-1, error_score="raise"
    )


METHODS = (
    Method(
        name="ridge",
        batched=ridge_path,
        loss=lambda targets, scores: (targets - scores).square(),
        grid=lambda: search(Ridge(), "alpha", list(PENALTIES), "neg_mean_squared_error"),
    ),
    Method(
        name="logistic",
        batched=logistic_path,
        loss=lambda targets, scores: softplus(scores) - targets * scores,
        grid=lambda: search(
            LogisticRegression(max_iter=100_000), "C", [1 / penalty for penalty in PENALTIES], "neg_log_loss"
        ),
    ),
)


def layer_of_activations(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Features (position, row, d_model), and a quantity (row,) of which they tell a part.

    The standard deviation of the k-th principal direction falls as 1 / k, as residual streams are: few directions hold most of it.
    """
    spectrum = 20 / np.arange(1, WIDTH + 1)
    hidden = rng.standard_normal((POSITIONS, ROWS, WIDTH))
    mixing = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    quantity = hidden[0, :, 3] + hidden[0, :, 40] + rng.standard_normal(ROWS)
    hidden[1:, :, 3] = hidden[0, :, 3]  # every position knows a part
    return ((hidden * spectrum) @ mixing).astype(np.float32), quantity


def batched(method: Method, features: NDArray[np.float32], targets: NDArray[np.float64], device: str) -> Selected:
    """The penalty of least held-out loss at every position, from one call for all positions, folds and penalties."""
    y, states = torch.from_numpy(targets).to(device), torch.from_numpy(features).to(device)
    held_out = torch.zeros(FOLDS, ROWS, dtype=torch.bool, device=device)
    for fold, (_, test) in enumerate(KFold(FOLDS).split(targets)):
        held_out[fold, test] = True
    path = method.batched(states, y, PENALTIES, (~held_out).expand(len(states), -1, -1))
    losses = torch.zeros(len(states), len(PENALTIES), dtype=torch.float64, device=device)
    for fold, test in enumerate(held_out):
        scores = path.coef[:, fold] @ states[:, test].to(torch.float64).mT + path.intercept[:, fold, :, None]
        losses += method.loss(y[test], scores).mean(-1)
    return losses.argmin(-1).cpu().numpy()


def by_scikit_learn(method: Method, features: NDArray[np.float32], targets: NDArray[np.float64]) -> Selected:
    """Likewise, one search for each position; float64 as in the batched solvers."""
    searches = [method.grid().fit(states.astype(np.float64), targets) for states in features]
    return np.array([search.best_index_ for search in searches])


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of both sides over the cells (layer × position) that were run, and the cells with the same penalty on both sides; `shares`
    of the batched side's processor seconds by operation."""

    method: str
    batched: float
    scikit_learn: float
    alike: int
    cells: int
    shares: str

    def row(self, scale: float) -> str:
        ratio = self.scikit_learn / self.batched
        seconds = f"{self.batched * scale:,.1f} s | {self.scikit_learn * scale:,.1f} s"
        return (
            f"| W11 {self.method} | {seconds} | {ratio:.2f} | ≥ 10 | {verdict(ratio, at_least=10)} "
            f"| {self.alike} of {self.cells} |"
        )

    def reason(self) -> str:
        ours, theirs = (
            1_000 * seconds / (self.cells * FOLDS * len(PENALTIES)) for seconds in (self.batched, self.scikit_learn)
        )
        return f"| {self.method} | {ours:.2f} ms | {theirs:.1f} ms | {self.shares} |"


def timed(method: Method, layers: int, positions: int, device: str) -> Timing:
    """Layer by layer, so that only one layer's features are in memory."""
    seconds, alike = [0.0, 0.0], 0
    noise, halves = np.random.default_rng(0).standard_normal((2 * FOLDS, 2)), np.arange(2.0 * FOLDS) % 2
    method.grid().fit(noise, halves)  # starts the workers
    method.batched(
        torch.from_numpy(noise)[None].repeat(2, 1, 1), torch.from_numpy(halves), [1.0]
    )  # loads LAPACK, starts the threads
    for layer in range(layers):
        features, quantity = layer_of_activations(np.random.default_rng(layer))
        features = features[:positions]
        targets = quantity if method.name == "ridge" else (quantity > 0).astype(np.float64)
        starts = [time.perf_counter()]
        ours = batched(method, features, targets, device)
        starts.append(time.perf_counter())
        theirs = by_scikit_learn(method, features, targets)
        starts.append(time.perf_counter())
        seconds = [total + took for total, took in zip(seconds, np.diff(starts), strict=True)]
        alike += int((ours == theirs).sum())
    return Timing(
        method=method.name, batched=seconds[0], scikit_learn=seconds[1], alike=alike, cells=layers * positions,
        shares=routines(lambda: batched(method, features, targets, device)),
    )  # fmt: skip


def routines(run: Callable[[], object]) -> str:
    """Shares of a run's processor time by routine of BLAS and LAPACK, on the CPU: what is left is torch, numpy and Python."""
    spent: dict[str, float] = defaultdict(float)

    def timed_by(name: Callable[..., str], call: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: object) -> object:
            began = time.thread_time()
            found = call(*arguments)
            spent[name(*arguments)] += time.thread_time() - began
            return found

        return timed

    began = time.process_time()
    with (
        patch.object(symmetric, "_call", timed_by(lambda library, name, *_: name, symmetric._call)),
        patch.object(solvers, "gram", timed_by(lambda _: "inner products", solvers.gram)),
    ):
        run()
    whole = time.process_time() - began
    spent["the rest"] = whole - sum(spent.values())
    return ", ".join(
        f"{name} {seconds / whole:.0%}" for name, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
    )


def report(timings: list[Timing], device: str) -> str:
    cells, whole = timings[0].cells, LAYERS * POSITIONS
    size = f"{cells} of {whole} layers × positions were run" + (
        f"; the seconds of the {whole} are EXTRAPOLATED from these" if cells < whole else ""
    )
    return "\n".join(
        [
            "## A sweep of linear probes",
            "",
            f"{LAYERS} layers × {POSITIONS} positions × {FOLDS} folds × {len(PENALTIES)} penalties on {ROWS:,} rows × {WIDTH:,} features, "
            f"float64, {os.cpu_count()} cores; the batched side on {device}. {size}.",
            f"scikit-learn {version('scikit-learn')}, numpy {version('numpy')}, scipy {version('scipy')}, torch {version('torch')}.",
            "",
            "| probe | batched | scikit-learn, all cores | ratio | goal | | same penalty |",
            "|---|---|---|---|---|---|---|",
            *(timing.row(whole / cells) for timing in timings),
            "",
            "One fit (a layer, position, fold and penalty) takes, and the batched side spends on one layer:",
            "",
            "| probe | batched | scikit-learn, all cores | share of the batched side |",
            "|---|---|---|---|",
            *(timing.reason() for timing in timings),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one layer, two positions; seconds are extrapolated")
    parser.add_argument("--layers", type=int, default=7, help=f"of {LAYERS}; seconds are extrapolated")
    parser.add_argument("--device", default="cpu", help="where the batched side computes: cpu or cuda")
    arguments = parser.parse_args()
    layers, positions = (1, 2) if arguments.small else (arguments.layers, POSITIONS)
    timings = [timed(method, layers, positions, arguments.device) for method in METHODS]
    sys.stdout.write(report(timings, arguments.device))


if __name__ == "__main__":
    main()
