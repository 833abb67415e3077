"""What chance gives: permutation p-values, null bands, corrections for many tests, and agreement with known
dependencies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control, rankdata, t

from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, drawn_groups, permutation_p, resample_groups, tails
from reasonscope.data.progress import tracked
from reasonscope.data.ranks import auroc


def serial_correlation(one: Values, other: Values) -> tuple[float, float]:
    """Rank correlation of two lines (place,) beyond their common trend, with its two-sided p-value.

    Neighbouring sentences are alike, and many signals rise or fall along a trace, so shuffling places would call two
    independent lines correlated a third of the time. The linear trend is removed from both ranks, and the p-value is
    Student's for the number of independent places that the autocorrelations leave: 1/n' = 1/n + 2/n Σ (1 − k/n) r_k
    s_k, lags up to n/4 (Pyper and Peterman, Can. J. Fish. Aquat. Sci. 55, 1998). NaN if a line is constant beyond its
    trend, or if fewer than 5 places are left.
    """
    n = len(one)
    left = [_detrended(rankdata(line)) for line in (one, other)]
    lengths = [float(np.sqrt(line @ line)) for line in left]
    if n < 5 or min(lengths) < 1e-9:
        return float("nan"), float("nan")
    first, second = (line / length for line, length in zip(left, lengths, strict=True))
    rho = float(np.clip(first @ second, -1, 1))
    shared = sum(n / (n - k) * (first[:-k] @ first[k:]) * (second[:-k] @ second[k:]) for k in range(1, n // 4 + 1))
    independent = n / (1 + 2 * shared) if shared > 0 else n  # never more than n, which would be too bold
    freedom = max(independent - 3, 0.5)
    with np.errstate(divide="ignore"):
        return rho, float(2 * t.sf(abs(rho) * np.sqrt(freedom / (1 - rho**2)), freedom))


def _detrended(line: Values) -> Values:
    """The residuals of (place,) from its mean and linear trend."""
    place = np.arange(len(line)) - (len(line) - 1) / 2
    centred = line - line.mean()
    return np.asarray(centred - place * (place @ centred) / (place @ place))


def chance_above(n: int) -> float:
    """How often a value that is as good as chance lies above `null_band` of `n` draws: exactly r / (n + 1), for any
    distribution.

    r = ⌊.025 (n + 1)⌋ of the highest draws are left out, and the edge is at most the highest: 1/21 for 20 draws, .025
    for 199.
    """
    return _left_out(n) / (n + 1) if n else float("nan")


def null_band(null: ArrayLike, what: str, *, shape: tuple[int, ...] | None = None) -> Band:
    """The range of the draws of a null, `null` (draw, …), value by value; `what` was drawn, in words. NaN is not a draw.

    The ends are order statistics, so chance lies above the band with probability `chance_above(n)`, and below with the same. (The
    .975 quantile of 20 draws looks like 2.5 %, but chance exceeds it in 6.4 %.)
    """
    drawn = np.sort(np.asarray(null, dtype=np.float64), axis=0)  # NaN comes last
    n = np.isfinite(drawn).sum(axis=0)
    r = np.maximum(1, np.floor(0.025 * (n + 1))).astype(np.intp)
    low, high = (
        np.where(n > 0, np.take_along_axis(drawn, np.maximum(at, 0)[None], axis=0)[0], np.nan) for at in (r - 1, n - r)
    )
    most = int(np.max(n, initial=0))
    return Band.of(low, high, low.shape if shape is None else shape, f"{what}, {most} draws; {_leaves(most)}")


def _leaves(n: int) -> str:
    return f"chance lies above in {chance_above(n):.1%}, below in as many" if n else "no draw"


def _left_out(n: int) -> int:
    return max(1, int(0.025 * (n + 1)))


def holm(p: ArrayLike) -> Values:
    """p-values that bound the chance of ANY false finding among them (Holm 1979); NaN (not tested) stays NaN."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.isfinite(values)
    order = np.argsort(values[tested], kind="stable")
    ascending = values[tested][order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(ascending), 1.0)
    adjusted[tested] = corrected
    return adjusted


def benjamini_hochberg(p: ArrayLike) -> Values:
    """p-values that bound the SHARE of false findings among those called (Benjamini and Hochberg 1995); NaN stays
    NaN."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.isfinite(values)
    if tested.any():
        adjusted[tested] = false_discovery_control(values[tested], method="bh")
    return adjusted


def _bootstrap(
    statistic: Callable[[Rows], float],
    n: int,
    *,
    groups: Sequence[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic of `n` rows (given as indices) with its 95 % interval; rows of one group are drawn together.

    Raises InputError as `resample_groups` does.
    """
    return resample_groups(statistic, groups or [str(i) for i in range(n)], n_resamples=n_resamples, seed=seed)


def result_of_estimates(
    found: Mapping[str, Mapping[str, Estimate]],
    chance: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    method: str,
    quantity: str,
    null: str,
    unit: str = "1",
) -> Result:
    """Estimates as a result with axes (row, metric); every row of `found` has the same metrics.

    `chance` is the range (low, high) of each by chance, which `null` describes; metrics without one get NaN.
    """
    metrics = next(iter(found.values()))
    ranges = [[chance.get(row, {}).get(metric, (np.nan, np.nan)) for metric in metrics] for row in found]
    ends = np.array([[[one[metric].low, one[metric].high] for metric in metrics] for one in found.values()])
    values = np.array([[one[metric].value for metric in metrics] for one in found.values()])
    low, high = np.moveaxis(np.array(ranges), -1, 0)
    return Result(
        method=method,
        quantity=quantity,
        unit=unit,
        axes=(Axis.of("row", found), Axis.of("metric", metrics)),
        values=values,
        null=Band.of(low, high, values.shape, null),
        interval=Band.of(ends[..., 0], ends[..., 1], values.shape, "95 % over problems"),
    )


def bootstrap_band(
    statistic: Callable[[Rows], Values],
    n: int,
    *,
    groups: ArrayLike | None = None,
    unit: str = "rows",
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Band:
    """The interval of a statistic that gives many values at once: percentiles over resamples of `n` rows, widened for
    few (`tails`).

    Rows of one of `groups` (row,) are drawn together; `unit` names what is drawn. A value that is NaN on more than half
    of the resamples has a NaN interval.
    """
    labels = np.arange(n) if groups is None else np.asarray(groups)
    if (units := len(np.unique(labels))) < 2:
        shape = np.shape(statistic(np.arange(n)))
        return Band.of(np.nan, np.nan, shape, f"no interval: fewer than two {unit}")
    values = np.stack([statistic(rows) for rows in drawn_groups(labels, n_resamples=n_resamples, seed=seed)])
    known = np.isfinite(values).mean(axis=0) >= 0.5
    filled = np.where(known, values, 0.0)  # nanquantile warns of all-NaN columns
    low, high = np.nanquantile(filled, tails(units, level), axis=0)
    what = f"bootstrap over {units} {unit}, {level:.0%} of {n_resamples} draws"
    return Band.of(np.where(known, low, np.nan), np.where(known, high, np.nan), values.shape[1:], what)


def mean_band(
    values: Values, groups: ArrayLike, *, unit: str = "sentences", n_resamples: int = 1000, seed: int = 0
) -> Band:
    """The interval of the mean over the last axis of `values` (…, row), like `bootstrap_band` with `groups` (row,),
    from the groups' sums.

    NaN without rows.
    """
    if not values.shape[-1]:
        return Band.of(np.nan, np.nan, values.shape[:-1], f"no interval: fewer than two {unit}")
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    member = (np.arange(len(names))[:, None] == group_of).astype(np.float64)
    sums, sizes = values @ member.T, member.sum(axis=1)
    mean = lambda at: sums[..., at].sum(axis=-1) / sizes[at].sum()  # noqa: E731 - the statistic to resample
    return bootstrap_band(mean, len(names), unit=unit, n_resamples=n_resamples, seed=seed)


def mean_number(values: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """The mean of `values` (row,) as a result stores it: `value`, and `ci`, the ends of `mean_band`."""
    known = np.asarray(values, dtype=np.float64)
    band = mean_band(known, groups, seed=seed)
    return {"value": float(known.mean()), "ci": [float(band.low), float(band.high)]}


@dataclass(frozen=True, kw_only=True)
class DependencyAgreement:
    """How well scores of (target, source) pairs find the true dependencies.

    Attributes:
        auroc: Probability that a random dependency scores above a random pair without one.
        precision: Share of true dependencies among each target's k best sources, where k is the number that it truly
            has.
        null_auroc: (draw,) the same after each target's scores are shuffled among its earlier sources.
        null_precision: (draw,) likewise.
        p_value: Of the AUROC.
        distance_auroc: AUROC of nearness alone (source i of target j scores −(j − i)), the baseline that a score has to
            beat.
        n_pairs: Number of pairs.
        n_true: Number of true dependencies.
    """

    auroc: float
    precision: float
    null_auroc: Values
    null_precision: Values
    p_value: float
    distance_auroc: float
    n_pairs: int
    n_true: int

    @property
    def above_null(self) -> bool:
        """Whether the AUROC is above the 95 % interval of its null."""
        return bool(self.auroc > np.quantile(self.null_auroc, 0.975))


def dependency_agreement(
    scores: Sequence[Values] | Values,
    depends_on: Sequence[Sequence[Sequence[int]]] | Sequence[Sequence[int]],
    *,
    n_permutations: int = 200,
    seed: int = 0,
) -> DependencyAgreement:
    """Compare score matrices (target, source), one per trace, with the sources that each target truly depends on.

    Pairs with source ≥ target or a score of NaN are left out; every matrix is ranked within its targets first, so that
    traces and targets of different scale count equally. Raises InputError if no pair is a true dependency, or all are.
    """
    matrices = [scores] if isinstance(scores, np.ndarray) else list(scores)
    truths = [depends_on] if isinstance(scores, np.ndarray) else list(depends_on)
    if len(matrices) != len(truths):
        raise InputError(
            f"{len(matrices)} score matrices for the dependencies of {len(truths)} traces; give one per trace"
        )
    rows = [row for matrix, truth in zip(matrices, truths, strict=True) for row in _rows(matrix, truth)]  # type: ignore[arg-type]  # paired above
    true = np.concatenate([row.true for row in rows]) if rows else np.zeros(0, dtype=bool)
    if not 0 < true.sum() < len(true):
        raise InputError(
            f"{int(true.sum())} of {len(true)} pairs are true dependencies; both kinds are needed to tell them apart"
        )
    rng = np.random.default_rng(seed)
    drawn = tracked(range(n_permutations), "shuffling", "draws")
    null = np.array([_judge([row.shuffled(rng) for row in rows]) for _ in drawn])
    measured, precision = _judge(rows)
    near = np.concatenate([-row.distance for row in rows])
    return DependencyAgreement(
        auroc=measured,
        precision=precision,
        null_auroc=null[:, 0],
        null_precision=null[:, 1],
        p_value=float(permutation_p(measured, null[:, 0])),
        distance_auroc=auroc(true, near),
        n_pairs=len(true),
        n_true=int(true.sum()),
    )


def agreement_numbers(found: DependencyAgreement) -> dict[str, Any]:
    """The agreement as plain numbers, its null as an interval."""
    low, high = np.quantile(found.null_auroc, [0.025, 0.975])
    return {
        "auroc": found.auroc,
        "auroc_null": [float(low), float(high)],
        "p_value": found.p_value,
        "precision_at_k": found.precision,
        "precision_at_k_null": float(found.null_precision.mean()),
        "distance_auroc": found.distance_auroc,
        "pairs": found.n_pairs,
        "true": found.n_true,
        "above_null": found.above_null,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    """The pairs of one target: ranks of the scores in (0, 1], truth and distance of each source."""

    ranks: Values
    true: NDArray[np.bool_]
    distance: Values

    def shuffled(self, rng: np.random.Generator) -> "_Row":
        return _Row(ranks=rng.permutation(self.ranks), true=self.true, distance=self.distance)


def _rows(matrix: Values, truth: Sequence[Sequence[int]]) -> list[_Row]:
    found = []
    for target, sources in enumerate(truth):
        earlier = np.flatnonzero(np.isfinite(matrix[target, :target]))
        if len(earlier) > 1:
            ranks = rankdata(matrix[target, earlier]) / len(earlier)
            true = np.isin(earlier, np.asarray(sources, dtype=np.int64))
            found.append(_Row(ranks=ranks, true=true, distance=(target - earlier).astype(np.float64)))
    return found


def _judge(rows: Sequence[_Row]) -> tuple[float, float]:
    """AUROC over all pairs, and the precision of each target's k best, averaged over targets with dependencies."""
    ranks, true = np.concatenate([row.ranks for row in rows]), np.concatenate([row.true for row in rows])
    precisions = [
        row.true[np.argsort(-row.ranks, kind="stable")[: row.true.sum()]].mean() for row in rows if row.true.any()
    ]
    return auroc(true, ranks), float(np.mean(precisions))
