"""What chance gives: permutation p-values, null bands, corrections for many tests, and agreement with known dependencies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, false_discovery_control, norm, rankdata, t

from reasonscope.analysis.results import Axis, Band, Result, Values
from reasonscope.data.errors import InputError
from reasonscope.probes.evaluate import Estimate, Rows, drawn_groups, resample_groups, tails

Alternative = Literal["greater", "less", "two-sided"]


def permutation_p(observed: ArrayLike, null: ArrayLike, alternative: Alternative = "greater") -> Values:
    """How often chance does as well: (1 + draws at least as extreme) / (1 + draws), never 0.

    `null` (draw, …) are draws of the statistic `observed` (…). NaN where the observed value is NaN or no draw is a number.
    """
    drawn, seen = np.asarray(null, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    n = np.isfinite(drawn).sum(axis=0)
    above, below = (drawn >= seen).sum(axis=0), (drawn <= seen).sum(axis=0)
    hits = {"greater": above, "less": below, "two-sided": np.minimum(2 * np.minimum(above, below), n)}[alternative]
    return np.asarray(np.where(np.isfinite(seen) & (n > 0), (1 + hits) / (1 + n), np.nan), dtype=np.float64)


def null_band(null: ArrayLike, what: str, *, level: float = 0.95) -> Band:
    """The middle `level` of the draws (draw, …) of a null, value by value."""
    drawn = np.asarray(null, dtype=np.float64)
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Band.of(low, high, drawn.shape[1:], f"{what}, {level:.0%} of {len(drawn)} draws")


def holm(p: ArrayLike) -> Values:
    """p-values that bound the chance of ANY false finding among them (Holm 1979); NaN was not tested and stays."""
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
    """p-values that bound the SHARE of false findings among those called (Benjamini and Hochberg 1995); NaN stays."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.isfinite(values)
    if tested.any():
        adjusted[tested] = false_discovery_control(values[tested], method="bh")
    return adjusted


def bootstrap(
    statistic: Callable[[Rows], float],
    n: int,
    *,
    groups: Sequence[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic of `n` rows (given as indices) with its 95 % interval; rows of one group are drawn together.

    Raises InputError where `resample_groups` does.
    """
    return resample_groups(statistic, groups or [str(i) for i in range(n)], draws=draws, seed=seed)


def mean_estimate(values: ArrayLike, *, groups: Sequence[str] | None = None) -> Estimate:
    """The mean of `values` (row,) with its 95 % interval over rows, or over whole groups of them.

    Rows of one group count as one: by the group's part in what is left of them when the mean is taken away. The interval is Student's t
    with its skewness removed by a cubic map (Hall, On the removal of skewness by transformation, J. R. Stat. Soc. B 54, 1992): of lengths
    and other skewed values the percentiles of a bootstrap, and t alone, hold the mean of ten .90 of the time instead of .95. Where all
    values lie in 0 to 1 (shares, accuracies) it is Jeffreys' interval of as many tries as their spread is worth, for so few units
    (Korn and Graubard, Survey Methodology 24, 1998): it stays in 0 to 1, and is not a point where all of them are right.

    Raises InputError for fewer than two groups, or values that are no numbers.
    """
    rows = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(rows)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n = len(np.unique(labels))
    if n < 2:
        raise InputError("all rows are of one group, which has no interval; record more problems")
    if not np.isfinite(rows).all():
        raise InputError("a mean of values that are no numbers; leave them out")
    mean = float(rows.mean())
    left = np.bincount(labels, weights=rows - mean) * n / len(rows)  # of each group, in units of the mean
    low, high = (_share_ends if rows.min() >= 0 and rows.max() <= 1 else _mean_ends)(mean, left)
    return Estimate(value=mean, low=low, high=high)


def _mean_ends(mean: float, left: Values, level: float = 0.95) -> tuple[float, float]:
    """Of a mean from what is left of each unit when it is taken away."""
    n, spread = len(left), float(left.std())
    if spread == 0:
        return mean, mean
    quantile, error = float(t.ppf((1 + level) / 2, n - 1)), float(left.std(ddof=1)) / np.sqrt(n)
    skew = float((left**3).mean() / spread**3) / np.sqrt(n)

    def unskewed(value: float) -> float:  # the inverse of T + γT²/3 + γ²T³/27 + γ/6
        return value if abs(skew) < 1e-6 else float(3 / skew * (np.cbrt(1 + skew * (value - skew / 6)) - 1))

    return mean - error * unskewed(quantile), mean - error * unskewed(-quantile)


def _share_ends(mean: float, left: Values, level: float = 0.95) -> tuple[float, float]:
    """The same of a mean that lies in 0 to 1."""
    n, variance = len(left), float(left.var()) / len(left)
    if variance == 0 and 0 < mean < 1:
        return mean, mean
    tries = mean * (1 - mean) / variance if variance else float(n)
    tries *= float(norm.ppf((1 + level) / 2) / t.ppf((1 + level) / 2, n - 1)) ** 2
    ends = beta.ppf([(1 - level) / 2, (1 + level) / 2], mean * tries + 0.5, (1 - mean) * tries + 0.5)
    return 0.0 if mean == 0 else float(ends[0]), 1.0 if mean == 1 else float(ends[1])


def result_of_estimates(
    found: Mapping[str, Mapping[str, Estimate]],
    chance: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    method: str,
    quantity: str,
    null: str,
    unit: str = "1",
) -> Result:
    """Numbers that were estimated one by one as a result of axes (row, metric); every row of `found` has the same metrics.

    `chance` is the range (low, high) of each by chance, which `null` describes; what has none has NaN there.
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
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Band:
    """The interval of a statistic that gives many values at once: percentiles over resamples of `n` rows, widened for few (`tails`).

    Rows of one of `groups` (row,) are drawn together; `unit` says what is drawn. A value that is NaN on more than half of the
    resamples has no interval (NaN).
    """
    labels = np.arange(n) if groups is None else np.asarray(groups)
    if (units := len(np.unique(labels))) < 2:
        shape = np.shape(statistic(np.arange(n)))
        return Band.of(np.nan, np.nan, shape, f"no interval: fewer than two {unit}")
    values = np.stack([statistic(rows) for rows in drawn_groups(labels, draws=draws, seed=seed)])
    known = np.isfinite(values).mean(axis=0) >= 0.5
    filled = np.where(known, values, 0.0)  # nanquantile warns of columns without a number
    low, high = np.nanquantile(filled, tails(units, level), axis=0)
    what = f"bootstrap over {units} {unit}, {level:.0%} of {draws} draws"
    return Band.of(np.where(known, low, np.nan), np.where(known, high, np.nan), values.shape[1:], what)


def mean_band(values: Values, groups: ArrayLike, *, unit: str = "sentences", draws: int = 1000, seed: int = 0) -> Band:
    """The interval of the mean over the last axis of `values` (…, row), as `bootstrap_band` with `groups` (row,), from the groups' sums.

    NaN where there is no row.
    """
    if not values.shape[-1]:
        return Band.of(np.nan, np.nan, values.shape[:-1], f"no interval: fewer than two {unit}")
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    member = (np.arange(len(names))[:, None] == group_of).astype(np.float64)
    sums, sizes = values @ member.T, member.sum(axis=1)
    mean = lambda at: sums[..., at].sum(axis=-1) / sizes[at].sum()  # noqa: E731 - the statistic that is resampled
    return bootstrap_band(mean, len(names), unit=unit, draws=draws, seed=seed)


def mean_number(values: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """The mean of `values` (row,) as a result keeps it: `value`, and `ci`, the ends of `mean_band`."""
    known = np.asarray(values, dtype=np.float64)
    band = mean_band(known, groups, seed=seed)
    return {"value": float(known.mean()), "ci": [float(band.low), float(band.high)]}


@dataclass(frozen=True, kw_only=True)
class DependencyAgreement:
    """How well scores of (target, source) pairs find the true dependencies.

    `auroc`: a random dependency scores above a random pair without one. `precision`: the share of true dependencies among each
    target's k best sources, k the number that it truly has. `null_auroc` and `null_precision` (draw,): the same after shuffling
    each target's scores among its earlier sources. `p_value` of the AUROC. `distance_auroc`: by nearness alone (source i of
    target j scores −(j − i)), the baseline that a score of reasoning has to beat.
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
    draws: int = 200,
    seed: int = 0,
) -> DependencyAgreement:
    """Compare score matrices (target, source), one a trace, with the sources that each target truly depends on.

    Pairs with source ≥ target or a score of NaN are left out; every matrix is ranked within its targets first, so that traces and
    targets of different scale count alike. Raises InputError where no pair is true, or all are.
    """
    matrices = [scores] if isinstance(scores, np.ndarray) else list(scores)
    truths = [depends_on] if isinstance(scores, np.ndarray) else list(depends_on)
    if len(matrices) != len(truths):
        raise InputError(
            f"{len(matrices)} score matrices for the dependencies of {len(truths)} traces; give one a trace"
        )
    rows = [row for matrix, truth in zip(matrices, truths, strict=True) for row in _rows(matrix, truth)]  # type: ignore[arg-type]  # as paired above
    true = np.concatenate([row.true for row in rows]) if rows else np.zeros(0, dtype=bool)
    if not 0 < true.sum() < len(true):
        raise InputError(
            f"{int(true.sum())} of {len(true)} pairs are true dependencies; both kinds are needed to tell them apart"
        )
    rng = np.random.default_rng(seed)
    null = np.array([_judge([row.shuffled(rng) for row in rows]) for _ in range(draws)])
    auroc, precision = _judge(rows)
    near = np.concatenate([-row.distance for row in rows])
    return DependencyAgreement(
        auroc=auroc,
        precision=precision,
        null_auroc=null[:, 0],
        null_precision=null[:, 1],
        p_value=float(permutation_p(auroc, null[:, 0])),
        distance_auroc=_auroc(true, near),
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
    """AUROC over all pairs, and the precision of each target's k best, averaged over targets that depend on something."""
    ranks, true = np.concatenate([row.ranks for row in rows]), np.concatenate([row.true for row in rows])
    precisions = [
        row.true[np.argsort(-row.ranks, kind="stable")[: row.true.sum()]].mean() for row in rows if row.true.any()
    ]
    return _auroc(true, ranks), float(np.mean(precisions))


def _auroc(true: NDArray[np.bool_], scores: Values) -> float:
    """Mann and Whitney's form, ties in the middle: scikit-learn's takes longer than the draws of the null themselves."""
    n = int(true.sum())
    return float((rankdata(scores)[true].sum() - n * (n + 1) / 2) / (n * (len(true) - n)))
