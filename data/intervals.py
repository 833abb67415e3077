"""Intervals over whole problems, of means and shares by formula and of anything else by resamples; and how often chance does as well."""

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

Alternative = Literal["greater", "less", "two-sided"]
_Z = 1.959964  # 95 %
_ROUNDING = 1e-24  # a variance that is none


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with the `low` and `high` end of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    def to_dict(self) -> dict[str, float]:
        """`{"value": …, "low": …, "high": …}`, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def mean_estimate(values: ArrayLike, *, groups: ArrayLike | None = None, shares: bool = True) -> Estimate:
    """The mean of `values` (row,) with its 95 % interval over rows, or over whole groups of them.

    Rows of one group count as one: by the group's part in what is left of them when the mean is taken away. The interval is Student's t
    with its skewness removed by a cubic map (Hall, On the removal of skewness by transformation, J. R. Stat. Soc. B 54, 1992): of lengths
    and other skewed values the percentiles of a bootstrap, and t alone, hold the mean of ten .90 of the time instead of .95. Where all
    values lie in 0 to 1 (shares, accuracies) it is Jeffreys' interval of as many tries as their spread is worth, for so few units
    (Korn and Graubard, Survey Methodology 24, 1998), and where each row is a 0 or 1 by itself the mid-P one (Berry and Armitage, The
    Statistician 44, 1995): it stays in 0 to 1, and is not a point where all of them are right. `shares=False`: what lies there is none.

    Raises InputError for fewer than two groups, or values that are no numbers.
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
    """The mean of `ours` − `theirs` (row,), paired, with its 95 % interval over rows, or over whole groups of them.

    Of `verdicts` (0 or 1, or a mean of them) it is that of Agresti and Min (Simple improved confidence intervals for comparing matched
    proportions, Stat. Med. 24, 2005): two more pairs, of which each of the four outcomes is half a one, so that a few pairs that agree are
    no proof that all do. Of groups of rows, two beside as many pairs as the groups' spread is worth. Of anything else it is
    `mean_estimate`'s, by formula, of the differences. Raises InputError as that does.
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
    """95 % interval of a share less one of other tries: Agresti and Caffo's (Am. Stat. 54, 2000), a hit and a miss more in each."""
    first, second = (hits + 1) / (n + 2), (other_hits + 1) / (other_n + 2)
    half = _Z * float(np.sqrt(first * (1 - first) / (n + 2) + second * (1 - second) / (other_n + 2)))
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def wilson_interval(hits: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: honest where all or none of a few are hits (J. Am. Stat. Assoc. 22, 1927)."""
    middle, half = (hits / n + _Z**2 / (2 * n)) / (1 + _Z**2 / n), wilson_half_width(hits, n)
    return middle - half if hits else 0.0, middle + half if hits != n else 1.0  # exactly, which rounding would miss


def wilson_half_width(hits: float, n: float) -> float:
    """Half the width of `wilson_interval`."""
    share = hits / n
    return float(_Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n))


def _left(rows: Values, groups: ArrayLike | None) -> tuple[float, Values]:
    """The mean, and what is left of each group when it is taken away, in units of the mean."""
    n, labels = _numbered(np.arange(len(rows)) if groups is None else groups)
    if not np.isfinite(rows).all():
        raise InputError("a mean of values that are no numbers; leave them out")
    mean = float(rows.mean())
    return mean, np.bincount(labels, weights=rows - mean) * n / len(rows)


def _numbered(groups: ArrayLike) -> tuple[int, Rows]:
    """How many groups there are, and the number of each row's. Raises InputError for one alone."""
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise InputError("all rows are of one group, which has no interval; record more problems")
    return len(names), group_of


def _judged(rows: Values) -> bool:
    return bool(np.isin(rows, (0.0, 1.0)).all())


def _mean_ends(mean: float, left: Values) -> tuple[float, float]:
    """Of a mean from what is left of each unit when it is taken away."""
    n, spread = len(left), float(left.std())
    if spread == 0:
        return mean, mean
    quantile, error = float(t.ppf(0.975, n - 1)), float(left.std(ddof=1)) / np.sqrt(n)
    skew = float((left**3).mean() / spread**3) / np.sqrt(n)

    def unskewed(value: float) -> float:  # the inverse of T + γT²/3 + γ²T³/27 + γ/6
        return value if abs(skew) < 1e-6 else float(3 / skew * (np.cbrt(1 + skew * (value - skew / 6)) - 1))

    return mean - error * unskewed(quantile), mean - error * unskewed(-quantile)


def _share_ends(mean: float, left: Values, verdicts: int) -> tuple[float, float]:
    """The same of a mean that lies in 0 to 1; `verdicts` is how many rows there are where each is a 0 or 1, else 0."""
    n, variance = len(left), float(left.var(ddof=1)) / len(left)
    if variance <= _ROUNDING and not verdicts and 0 < mean < 1:
        return mean, mean
    tries = (mean * (1 - mean) / variance if variance > _ROUNDING else float(max(n, verdicts))) * _few(n)
    ends = beta.ppf([0.025, 0.975], mean * tries + 0.5, (1 - mean) * tries + 0.5)
    return 0.0 if mean == 0 else float(ends[0]), 1.0 if mean == 1 else float(ends[1])


def _few(n: int) -> float:
    """What a try counts where the spread is known from `n` units alone."""
    return float((_Z / t.ppf(0.975, n - 1)) ** 2)


def _least_share(hits: int, n: int) -> float:
    """The share of which so many hits or more have probability .025, what was seen counting half."""
    return float(brentq(lambda p: (bdtrc(hits - 1, n, p) + bdtrc(hits, n, p)) / 2 - 0.025, 0, 1)) if hits else 0.0


def tails(n: int, level: float = 0.95) -> tuple[float, float]:
    """The quantiles of a bootstrap distribution over `n` units between which an interval of `level` lies.

    The plain percentiles (.025 and .975) are those of a normal distribution whose spread is known; from few units it is estimated, and
    by the resamples too small by √((n − 1)/n), so that a mean of 10 is covered .90 instead of .95 of the time. Widened to Student's t:
    Φ(−t √(n/(n − 1))), t with n − 1 degrees of freedom (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 4.4).
    """
    low = float(norm.cdf(-t.ppf((1 + level) / 2, n - 1) * np.sqrt(n / (n - 1))))
    return low, 1 - low


def resample_groups(
    statistic: Callable[[Rows], float], groups: Sequence[str], *, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of rows (given as indices) with its percentile interval over resamples of whole groups, widened for few (`tails`).

    Resamples on which it is NaN (one class drawn) are left out. Raises InputError for one group only, or where the statistic is NaN
    on all rows or on more than half of the resamples.
    """
    n, _ = _numbered(groups)
    value = statistic(np.arange(len(groups)))
    if np.isnan(value):
        raise InputError("the metric is not defined on these rows: they hold one class, or one target, only")
    values = np.array([statistic(rows) for rows in drawn_groups(groups, n_resamples=n_resamples, seed=seed)])
    if np.isnan(values).mean() > 0.5:
        raise InputError("most resamples hold one class only; record more problems of the rarer class")
    low, high = np.nanquantile(values, tails(n))
    return Estimate(value=value, low=float(low), high=float(high))


def drawn_groups(groups: ArrayLike, *, n_resamples: int, seed: int) -> Iterator[Rows]:
    """The rows of each resample: as many groups as there are, drawn with replacement, and all rows of each."""
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(labels == group) for group in range(labels.max() + 1)]
    rng = np.random.default_rng(seed)
    for _ in range(n_resamples):
        yield np.concatenate([members[group] for group in rng.integers(len(members), size=len(members))])


class Resamples:
    """The resamples of whole groups that `resample_groups` draws, drawn once for many means: much faster, the same numbers.

    `means` and what is computed from them are (1 + draw,): first of all rows as they are, then of each resample. Raises InputError for
    one group only.
    """

    def __init__(self, groups: Sequence[str], *, n_resamples: int = 1000, seed: int = 0) -> None:
        n, self._group_of = _numbered(groups)
        rng = np.random.default_rng(seed)
        drawn = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_resamples)]
        self._counts = np.stack([np.ones(n, dtype=np.int64), *drawn])

    def means(self, values: Values, weights: Values | None = None) -> Values:
        """The weighted mean of `values` (row,) that are not NaN; NaN where a resample holds none."""
        given = np.isfinite(values)
        share = np.where(given, np.ones(len(values)) if weights is None else weights, 0.0)
        sums = np.bincount(self._group_of, weights=share * np.where(given, values, 0.0))
        totals = np.bincount(self._group_of, weights=share)
        with np.errstate(invalid="ignore"):
            return np.asarray(self._counts @ sums / (self._counts @ totals))

    def estimate(self, statistics: Values) -> Estimate | None:
        """The first of `statistics` (1 + draw,) with the 95 % interval of the others; None where most of them are NaN."""
        if np.isnan(statistics[0]) or np.isnan(statistics[1:]).mean() > 0.5:
            return None
        low, high = np.nanquantile(statistics[1:], tails(self._counts.shape[1]))
        return Estimate(value=float(statistics[0]), low=float(low), high=float(high))


def permutation_p(observed: ArrayLike, null: ArrayLike, alternative: Alternative = "greater") -> Values:
    """How often chance does as well: (1 + draws at least as extreme) / (1 + draws), never 0.

    `null` (draw, …) are draws of the statistic `observed` (…). NaN where the observed value is NaN or no draw is a number.
    """
    drawn, seen = np.asarray(null, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    n = np.isfinite(drawn).sum(axis=0)
    above, below = (drawn >= seen).sum(axis=0), (drawn <= seen).sum(axis=0)
    hits = {"greater": above, "less": below, "two-sided": np.minimum(2 * np.minimum(above, below), n)}[alternative]
    return np.asarray(np.where(np.isfinite(seen) & (n > 0), (1 + hits) / (1 + n), np.nan), dtype=np.float64)
