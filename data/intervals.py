"""Intervals over whole problems (by formula for means and shares, by resampling for anything else), and permutation
p-values."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import bdtrc
from scipy.stats import beta, norm, t

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import counted, working

Alternative = Literal["greater", "less", "two-sided"]
_Z = 1.959964  # 95 %
_ROUNDING = 1e-24  # a smaller variance is rounding


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.

    Example:
        report = rs.probes.length(store)
        report.comparison.difference.interval  # (low, high)
        report.comparison.difference.to_dict()
    """

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        """The two ends of the interval."""
        return self.low, self.high

    def to_dict(self) -> dict[str, float]:
        """`{"value": …, "low": …, "high": …}`, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def mean_estimate(values: ArrayLike, *, groups: ArrayLike | None = None, shares: bool = True) -> Estimate:
    """The mean of `values` (row,) with its 95 % interval over rows, or over whole `groups` of rows.

    The values choose the interval, unless `shares` is False, which treats nothing as a proportion:

    - In general, Student's t with its skewness removed by a cubic map (Hall, J. R. Stat. Soc. B 54, 1992). For lengths, bootstrap
      percentiles and plain t cover the mean of ten .90 of the time, not .95.
    - For values in 0 to 1, Jeffreys' interval with the number of tries that their spread implies (Korn and Graubard, Survey
      Methodology 24, 1998).
    - For rows that are 0 or 1, each its own group, the mid-P interval (Berry and Armitage, The Statistician 44, 1995).

    Raises InputError for fewer than two groups, or values that are not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    mean, left = _left(rows, groups)
    if not shares or rows.min() < 0 or rows.max() > 1:
        low, high = _mean_ends(mean, left)
    elif len(left) == len(rows) and _judged(rows):
        hits, n = int(rows.sum()), len(rows)
        low, high = _least_share(hits, n), 1 - _least_share(n - hits, n)
    else:
        low, high = _share_ends(mean, left, len(rows) if _judged(rows) else 0)
    return Estimate(value=mean, low=low, high=high)


def difference_estimate(
    ours: ArrayLike, theirs: ArrayLike, *, verdicts: bool, groups: ArrayLike | None = None
) -> Estimate:
    """The mean of `ours` − `theirs` (row,), paired, with its 95 % interval over rows, or over whole groups of rows.

    For `verdicts` (0 or 1, or means of such) the interval is that of Agresti and Min (Stat. Med. 24, 2005), which adds half a pair for
    each of the four outcomes, so that a few pairs that agree do not prove that all do; groups count as many pairs as their spread
    implies. Otherwise it is that of `mean_estimate`. Raises InputError for fewer than two groups, or values that are not finite.
    """
    change = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    mean, left = _left(change, groups)
    if not verdicts:
        low, high = _mean_ends(mean, left)
        return Estimate(value=mean, low=low, high=high)
    n, square, error = len(left), float((change**2).mean()), float(left.var(ddof=1)) / len(left)
    pairs = float(n)
    if n < len(change) and error > _ROUNDING:
        pairs = min((square - mean**2) / error, len(change)) * _few(n)
    middle = pairs * mean / (pairs + 2)
    half = _Z * float(np.sqrt((pairs * square + 1) / (pairs + 2) - middle**2) / np.sqrt(pairs + 2))
    return Estimate(value=mean, low=max(-1.0, middle - half), high=min(1.0, middle + half))


def shares_difference(hits: float, n: int, other_hits: float, other_n: int) -> tuple[float, float]:
    """95 % interval of the difference of two independent shares: one hit and one miss are added to each (Agresti and
    Caffo, Am. Stat. 54, 2000)."""
    first, second = (hits + 1) / (n + 2), (other_hits + 1) / (other_n + 2)
    half = _Z * float(np.sqrt(first * (1 - first) / (n + 2) + second * (1 - second) / (other_n + 2)))
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def wilson_interval(hits: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which holds its level even if all or none of a few tries are hits (J. Am.
    Stat. Assoc. 22, 1927)."""
    middle, half = (hits / n + _Z**2 / (2 * n)) / (1 + _Z**2 / n), wilson_half_width(hits, n)
    return middle - half if hits else 0.0, middle + half if hits != n else 1.0  # exact ends, which rounding would miss


def wilson_half_width(hits: float, n: float) -> float:
    """Half the width of `wilson_interval`."""
    share = hits / n
    return float(_Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n))


def _left(rows: Values, groups: ArrayLike | None) -> tuple[float, Values]:
    """The mean, and each group's sum of residuals from it, in units of the mean."""
    n, labels = _numbered(np.arange(len(rows)) if groups is None else groups)
    if not np.isfinite(rows).all():
        raise InputError("a mean needs finite values; leave the others out")
    mean = float(rows.mean())
    return mean, np.bincount(labels, weights=rows - mean) * n / len(rows)


def _numbered(groups: ArrayLike) -> tuple[int, Rows]:
    """How many groups there are, and the number of each row's. Raises InputError for a single group."""
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise InputError("all rows belong to one group, which gives no interval; record more problems")
    return len(names), group_of


def _judged(rows: Values) -> bool:
    return bool(np.isin(rows, (0.0, 1.0)).all())


def _mean_ends(mean: float, left: Values) -> tuple[float, float]:
    """The ends of the interval of a mean, from the residuals of each unit."""
    n, spread = len(left), float(left.std())
    if spread == 0:
        return mean, mean
    quantile, error = float(t.ppf(0.975, n - 1)), float(left.std(ddof=1)) / np.sqrt(n)
    skew = float((left**3).mean() / spread**3) / np.sqrt(n)

    def unskewed(value: float) -> float:  # the inverse of T + γT²/3 + γ²T³/27 + γ/6
        return value if abs(skew) < 1e-6 else float(3 / skew * (np.cbrt(1 + skew * (value - skew / 6)) - 1))

    return mean - error * unskewed(quantile), mean - error * unskewed(-quantile)


def _share_ends(mean: float, left: Values, verdicts: int) -> tuple[float, float]:
    """The same for a mean that lies in 0 to 1; `verdicts` is the number of rows if each of them is 0 or 1, else 0."""
    n, variance = len(left), float(left.var(ddof=1)) / len(left)
    if variance <= _ROUNDING and not verdicts and 0 < mean < 1:
        return mean, mean
    tries = (mean * (1 - mean) / variance if variance > _ROUNDING else float(max(n, verdicts))) * _few(n)
    ends = beta.ppf([0.025, 0.975], mean * tries + 0.5, (1 - mean) * tries + 0.5)
    return 0.0 if mean == 0 else float(ends[0]), 1.0 if mean == 1 else float(ends[1])


def _few(n: int) -> float:
    """How much of a try each try counts if the spread is known from `n` units only."""
    return float((_Z / t.ppf(0.975, n - 1)) ** 2)


def _least_share(hits: int, n: int) -> float:
    """The share for which `hits` or more have probability .025, the observed count weighing half (mid-P)."""
    return float(brentq(lambda p: (bdtrc(hits - 1, n, p) + bdtrc(hits, n, p)) / 2 - 0.025, 0, 1)) if hits else 0.0


def tails(n: int, level: float = 0.95) -> tuple[float, float]:
    """The quantiles of a bootstrap distribution over `n` units that bound an interval of `level`.

    The plain percentiles (.025 and .975) are right for a normal distribution with a known spread. From few units the
    spread is estimated, and resamples make it too small by √((n − 1)/n), so that a mean of 10 is covered .90 of the
    time, not .95. They are widened to Student's t: Φ(−t √(n/(n − 1))), t with n − 1 degrees of freedom (Hesterberg,
    What Teachers Should Know About the Bootstrap, 2015, section 4.4).
    """
    low = float(norm.cdf(-t.ppf((1 + level) / 2, n - 1) * np.sqrt(n / (n - 1))))
    return low, 1 - low


def resample_groups(
    statistic: Callable[[Rows], float], groups: Sequence[str], *, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of rows (given as indices) with its percentile interval over resamples of whole groups, widened for
    few (`tails`).

    Resamples on which the statistic is NaN (only one class drawn) are left out. Raises InputError for a single group,
    or if the statistic is NaN on all rows or on more than half of the resamples.
    """
    n, _ = _numbered(groups)
    value = statistic(np.arange(len(groups)))
    with working("resampling", total=n_resamples, unit="draws") as work:
        drawn = counted(drawn_groups(groups, n_resamples=n_resamples, seed=seed), work)
        values = np.array([statistic(rows) for rows in drawn])
    return percentile_estimate(value, values, n)


def percentile_estimate(value: float, resampled: Values, n_groups: int) -> Estimate:
    """A statistic with the percentile interval of its values on resamples (draw,) of `n_groups` groups, widened for few (`tails`).

    Resamples on which it is NaN are left out. Raises InputError for fewer than two groups, or if the value or more than half of the
    resamples are NaN.
    """
    if n_groups < 2:
        raise InputError("all rows are of one group, which has no interval; record more problems")
    if np.isnan(value):
        raise InputError("the metric is undefined on these rows: they hold only one class or one target")
    if np.isnan(resampled).mean() > 0.5:
        raise InputError("most resamples hold only one class; record more problems of the rarer class")
    low, high = np.nanquantile(resampled, tails(n_groups))
    return Estimate(value=value, low=float(low), high=float(high))


def drawn_groups(groups: ArrayLike, *, n_resamples: int, seed: int) -> Iterator[Rows]:
    """The rows of each resample: as many groups as there are, drawn with replacement, with all their rows."""
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(labels == group) for group in range(labels.max() + 1)]
    rng = np.random.default_rng(seed)
    for _ in range(n_resamples):
        yield np.concatenate([members[group] for group in rng.integers(len(members), size=len(members))])


class Resamples:
    """The resamples of whole groups that `resample_groups` draws, drawn once for many means: much faster, with the same
    numbers.

    `means` and everything computed from them are (1 + draw,): first of the rows themselves, then of each resample.
    Raises InputError for a single group.
    """

    def __init__(self, groups: Sequence[str], *, n_resamples: int = 1000, seed: int = 0) -> None:
        n, self._group_of = _numbered(groups)
        rng = np.random.default_rng(seed)
        drawn = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_resamples)]
        self._counts = np.stack([np.ones(n, dtype=np.int64), *drawn])

    def means(self, values: Values, weights: Values | None = None) -> Values:
        """The weighted mean of those of `values` (row,) that are not NaN; NaN for a resample without any."""
        given = np.isfinite(values)
        share = np.where(given, np.ones(len(values)) if weights is None else weights, 0.0)
        sums = np.bincount(self._group_of, weights=share * np.where(given, values, 0.0))
        totals = np.bincount(self._group_of, weights=share)
        with np.errstate(invalid="ignore"):
            return np.asarray(self._counts @ sums / (self._counts @ totals))

    def estimate(self, statistics: Values) -> Estimate | None:
        """The first of `statistics` (1 + draw,) with the 95 % interval of the others; None if most of them are NaN."""
        if np.isnan(statistics[0]) or np.isnan(statistics[1:]).mean() > 0.5:
            return None
        low, high = np.nanquantile(statistics[1:], tails(self._counts.shape[1]))
        return Estimate(value=float(statistics[0]), low=float(low), high=float(high))


def permutation_p(observed: ArrayLike, null: ArrayLike, alternative: Alternative = "greater") -> Values:
    """How often chance does as well: (1 + draws at least as extreme) / (1 + draws), never 0.

    `null` (draw, …) are draws of the statistic `observed` (…). NaN if the observed value is NaN or no draw is a number.
    """
    drawn, seen = np.asarray(null, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    n = np.isfinite(drawn).sum(axis=0)
    above, below = (drawn >= seen).sum(axis=0), (drawn <= seen).sum(axis=0)
    hits = {"greater": above, "less": below, "two-sided": np.minimum(2 * np.minimum(above, below), n)}[alternative]
    return np.asarray(np.where(np.isfinite(seen) & (n > 0), (1 + hits) / (1 + n), np.nan), dtype=np.float64)
