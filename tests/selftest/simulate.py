"""Does every interval have its coverage, and is every p-value uniform without an effect? Simulated, with the truth known.

    python tests/selftest/simulate.py [--runs 1000] [--draws 1000] [--out docs/statistics.md] [--only WORDS]

Each row draws new data `runs` times (slow ones fewer times) from a process whose true value is known, and counts: for an interval how
often it holds that value, for a test how often p ≤ .05 without an effect, for a band how much lies outside it. With 1,000 runs a coverage
of .95 is known to ± .014. Every row calls the function that it names; where that is only a part of what a user calls, its name says so.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import asin, pi, sqrt
from pathlib import Path

import numpy as np
import torch
from front_door import (
    length_of_path,
    number_of_information,
    one_of_heads,
    one_of_layers,
    one_of_mlps,
    probe_of_noise,
    random_vector_beyond_random,
    several_heads,
    share_of_information,
    share_of_receivers,
    share_of_shift,
    signals_that_agree,
)
from scipy.special import gammaln
from scipy.stats import chisquare, kstest, norm

from reasonscope.analysis.statistics import (
    _bootstrap,
    benjamini_hochberg,
    bootstrap_band,
    chance_above,
    dependency_agreement,
    holm,
    mean_band,
    serial_correlation,
)
from reasonscope.analysis.tokens.mi import thinking_token_table
from reasonscope.analysis.tokens.misalignment import _ends as _bin_ends
from reasonscope.analysis.tokens.misalignment import _worth
from reasonscope.analysis.traces.reflection import within_question_correlation
from reasonscope.analysis.traces.run_difference import paired_difference
from reasonscope.data.arrays import Values
from reasonscope.data.intervals import (
    Estimate,
    Resamples,
    difference_estimate,
    mean_estimate,
    permutation_p,
    shares_difference,
    wilson_interval,
)
from reasonscope.data.ranks import auroc
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap, difference_to_best
from reasonscope.probes.evaluation.permutation_null import control_task, permutation_null

Draw = Callable[[np.random.Generator, int], Values]
# Of the processes below, by arithmetic or of lines of twenty million.
_STEP = float(np.sqrt(2) * np.exp(gammaln(8.5) - gammaln(8) + 0.08))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """`one(rng, draws)`: an interval on fresh data, whose true value is `truth`."""

    name: str
    where: str
    truth: float
    one: Callable[[np.random.Generator, int], tuple[float, float]]
    allowed: tuple[float, float] = (0.93, 0.97)
    most: int = 10**6


@dataclass(frozen=True, kw_only=True)
class Test:
    """`one(rng)`: a p-value on fresh data without an effect; `discrete` if only few values of p are possible.

    Where these are 1/n, 2/n, …, 1 and should be equally likely, `values` is n. `most` bounds the runs of a slow row.
    """

    name: str
    where: str
    one: Callable[[np.random.Generator], float]
    discrete: bool = False
    values: int = 0
    most: int = 10**6


@dataclass(frozen=True, kw_only=True)
class Rate:
    """`one(rng)`: whether a decision was wrong on fresh data; it may be so at most `limit` of the time."""

    name: str
    where: str
    one: Callable[[np.random.Generator], bool]
    limit: float
    most: int = 10**6


@dataclass(frozen=True, kw_only=True)
class Share:
    """`one(rng)`: the share of a result's places that lie outside its null band, if all is chance, which should be `chance` on average.

    Values that tie with their null lie outside less often; a row of such values, `tied`, may be below.
    """

    name: str
    where: str
    one: Callable[[np.random.Generator], float]
    chance: float
    most: int = 10**6
    tied: bool = False


def _normal(rng: np.random.Generator, n: int) -> Values:
    return rng.normal(size=n)


def _skewed(rng: np.random.Generator, n: int) -> Values:
    return rng.lognormal(sigma=0.6, size=n)  # as lengths of thinking are


def _share(rng: np.random.Generator, n: int) -> Values:
    return (rng.random(n) < 0.7).astype(float)


def _ends(estimate: Estimate | None) -> tuple[float, float]:
    assert estimate is not None
    return estimate.interval


def _mean(draw: Draw, n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    return _ends(mean_estimate(draw(rng, n)))


def _clustered(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    rows, groups = _four_each(rng, n)
    return _ends(mean_estimate(rows, groups=groups))


def _resampled(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    rows, groups = _four_each(rng, n)
    seed = int(rng.integers(2**31))
    return _ends(_bootstrap(lambda at: float(rows[at].mean()), 4 * n, groups=groups, n_resamples=draws, seed=seed))


def _four_each(rng: np.random.Generator, n: int) -> tuple[Values, list[str]]:
    """Four rows a problem, half of the variance between problems."""
    return np.repeat(rng.normal(size=n), 4) + rng.normal(size=4 * n), [str(i // 4) for i in range(4 * n)]


def _ranked(targets: Values, predictions: Values) -> float:
    """Spearman's correlation of values without ties: what `evaluate.spearman` gives, without scipy's overhead."""
    one, other = targets.argsort().argsort(), predictions.argsort().argsort()
    return float(np.corrcoef(one, other)[0, 1])


def _groups(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def _pair(rng: np.random.Generator, n: int, rho: float) -> tuple[Values, Values]:
    x = rng.normal(size=n)
    return x, rho * x + sqrt(1 - rho**2) * rng.normal(size=n)


def _spearman(n: int, rho: float, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    return _ends(
        cluster_bootstrap(_ranked, *_pair(rng, n, rho), _groups(n), n_resamples=draws, seed=int(rng.integers(2**31)))
    )


def _auroc(n: int, shift: float, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    labels = np.arange(n) % 2.0
    scores = rng.normal(size=n) + shift * labels
    return _ends(cluster_bootstrap(auroc, labels, scores, _groups(n), n_resamples=draws, seed=int(rng.integers(2**31))))


def _difference(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """A probe and one baseline that see the target through noise of the same size."""
    target = rng.normal(size=n)
    probe, baseline = target + rng.normal(size=n), target + rng.normal(size=n)
    return _ends(
        difference_to_best(
            _ranked, target, probe, {"text": baseline}, _groups(n), n_resamples=draws, seed=int(rng.integers(2**31))
        )
    )


def _selectivity(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    found = control_task(
        _ranked, rng.normal(size=n), lambda _: rng.normal(size=n), _groups(n), _groups(n), n_resamples=draws,
        seed=int(rng.integers(2**31)),
    )  # fmt: skip
    return found.selectivity.interval


def _change(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """The relative change of a steered arm, paired by problem: 20 % shorter in truth."""
    base = 100 * _skewed(rng, n)
    steered = 0.8 * base * rng.lognormal(mean=-0.02, sigma=0.2, size=n)
    resamples = Resamples(_groups(n), n_resamples=draws, seed=int(rng.integers(2**31)))
    return _ends(resamples.estimate(resamples.means(steered) / resamples.means(base) - 1))


def _paired(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """Two runs whose difference changes from problem to problem."""
    change, groups = _four_each(rng, n)
    return paired_difference(change, np.zeros(4 * n), groups, n_resamples=draws, seed=int(rng.integers(2**31))).interval


def _excess(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """A steered arm less five random ones of the same effect."""
    problem = rng.normal(size=n)
    resamples = Resamples(_groups(n), n_resamples=draws, seed=int(rng.integers(2**31)))
    arms = [resamples.means(problem + rng.normal(size=n)) for _ in range(6)]
    return _ends(resamples.estimate(arms[0] - np.mean(arms[1:], axis=0)))


def _band(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    values = _normal(rng, n)
    band = bootstrap_band(
        lambda rows: np.array([values[rows].mean()]), n, n_resamples=draws, seed=int(rng.integers(2**31))
    )
    return float(band.low[0]), float(band.high[0])


def _by_sentence(n: int, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """Tokens of `n` sentences of unequal length; those of a sentence are alike."""
    sentence = np.repeat(np.arange(n), rng.integers(5, 25, size=n))
    values = 0.7 * rng.normal(size=n)[sentence] + rng.normal(size=len(sentence))
    band = mean_band(values, sentence, n_resamples=draws, seed=int(rng.integers(2**31)))
    return float(band.low), float(band.high)


def _wilson(n: int, p: float, rng: np.random.Generator, _: int) -> tuple[float, float]:
    return wilson_interval(int(rng.binomial(n, p)), n)


def _any_share(
    one: Callable[[int, int], tuple[float, float]], n: int, rng: np.random.Generator, _: int
) -> tuple[float, float]:
    """Of hits and tries, less the true share, which is another in each run."""
    p = rng.uniform(0.02, 0.98)
    low, high = one(int(rng.binomial(n, p)), n)
    return low - p, high - p


def _mean_of_verdicts(hits: int, n: int) -> tuple[float, float]:
    return mean_estimate(np.arange(n) < hits).interval


def _verdicts(n: int, worse: float, better: float, rng: np.random.Generator, _: int) -> tuple[float, float]:
    """Two arms that judge `n` problems alike but for some."""
    change = rng.choice([1.0, -1.0, 0.0], size=n, p=[better, worse, 1 - better - worse])
    theirs = np.where(change == 0, rng.random(n) < 0.5, change < 0).astype(float)
    return difference_estimate(theirs + change, theirs, verdicts=True).interval


def _verdicts_of_problems(sizes: Sequence[int], better: float, rng: np.random.Generator, _: int) -> tuple[float, float]:
    """Two arms that judge several samples of each problem, some problems easier for either."""
    problem = np.repeat(np.arange(len(sizes)), sizes)
    theirs, ours = (rng.random(len(problem)) < p[problem] for p in _two_rates(len(sizes), better, rng))
    return difference_estimate(ours, theirs, verdicts=True, groups=problem).interval


def _two_rates(n: int, better: float, rng: np.random.Generator) -> tuple[Values, Values]:
    """The accuracies of `n` problems in two arms, on average .5 and `better` more."""
    hard = rng.uniform(-0.2, 0.2, size=n)
    return 0.5 + hard + rng.uniform(-0.15, 0.15, size=n), 0.5 + better + hard + rng.uniform(-0.15, 0.15, size=n)


def _two_shares(n: int, one: float, other: float, rng: np.random.Generator, _: int) -> tuple[float, float]:
    return shares_difference(int(rng.binomial(n, one)), n, int(rng.binomial(n, other)), n)


def _misaligned(n: int, rng: np.random.Generator, _: int) -> tuple[float, float]:
    """A tenth of a thinking whose tokens are wrong more often in some of its `n` sentences than in others."""
    sentence = np.repeat(np.arange(n), rng.integers(5, 15, size=n))
    wrong = (rng.random(len(sentence)) < rng.beta(6, 14, size=n)[sentence]).astype(float)
    low, high = _bin_ends(np.array_split(wrong, 10), _worth(wrong, sentence))
    return float(low[3]), float(high[3])


def _between(rng: np.random.Generator) -> float:
    """Four rows a problem with one target: labels of whole problems are exchanged."""
    groups = [str(i // 4) for i in range(80)]
    target, feature = np.repeat(rng.normal(size=20), 4), np.repeat(rng.normal(size=20), 4) + rng.normal(size=80)
    judge = lambda values: float(np.corrcoef(values, feature)[0, 1])  # noqa: E731
    return permutation_null(
        judge, target, groups, within=False, n_permutations=99, seed=int(rng.integers(2**31))
    ).p_value


def _within(rng: np.random.Generator) -> float:
    """A difference between problems is in both, none within."""
    groups = [str(i // 4) for i in range(80)]
    problem = np.repeat(rng.normal(size=20), 4)
    target, feature = problem + rng.normal(size=80), problem + rng.normal(size=80)
    judge = lambda values: float(np.corrcoef(values, feature)[0, 1])  # noqa: E731
    return permutation_null(
        judge, target, groups, within=True, n_permutations=99, seed=int(rng.integers(2**31))
    ).p_value


def _two_sided(rng: np.random.Generator) -> float:
    return float(permutation_p(rng.normal(), rng.normal(size=199), "two-sided"))


def _like_its_neighbours(share: float, rng: np.random.Generator) -> float:
    """Two lines of 30 sentences that know nothing of each other; `share` of each place is its neighbour's."""
    lines = rng.normal(size=(2, 30))
    for i in range(1, 30):
        lines[:, i] = share * lines[:, i - 1] + sqrt(1 - share**2) * lines[:, i]
    return serial_correlation(*lines)[1]


def _trending(rng: np.random.Generator) -> float:
    """The same of two lines that rise or fall along the thinking."""
    return serial_correlation(*(rng.normal(size=(2, 30)) + rng.normal(size=(2, 1)) * np.linspace(-2, 2, 30)))[1]


def _dependencies(rng: np.random.Generator) -> float:
    """Two traces of 15 sentences; the scores know nothing of the dependencies."""
    truth = [[sorted(set(rng.integers(0, t, size=min(t, 2)).tolist())) for t in range(15)] for _ in range(2)]
    scores = [rng.normal(size=(15, 15)) for _ in range(2)]
    return dependency_agreement(scores, truth, n_permutations=99, seed=int(rng.integers(2**31))).p_value


def _reflection(rng: np.random.Generator) -> float:
    problems = [str(i // 5) for i in range(60)]
    hard = np.repeat(rng.normal(size=12), 5)
    x, y = hard + rng.normal(size=60), hard + rng.normal(size=60)
    return within_question_correlation(
        x.tolist(), y.tolist(), problems, n_resamples=199, seed=int(rng.integers(2**31))
    ).p_value


def _words(rng: np.random.Generator) -> float:
    """Peaks at random places: the p-value of one common word."""
    lines = [["so" if at % 3 == 0 else "the" for at in range(60)] for _ in range(10)]
    peaks = [np.isin(np.arange(60), rng.choice(60, size=8, replace=False)) for _ in lines]
    rows = thinking_token_table(lines, peaks, n_permutations=199, seed=int(rng.integers(2**31)))
    return next(row.p_value for row in rows if row.word == "so")


def _any_of_many(rng: np.random.Generator) -> bool:
    return bool((holm(rng.random(20)) <= 0.05).any())


def _false_discoveries(rng: np.random.Generator) -> bool:
    """With nothing to be found the share of false discoveries is 1 where there is any, and 0 where there is none."""
    return bool((benjamini_hochberg(rng.random(20)) <= 0.05).any())


def _significant(one: Callable[[np.random.Generator], float], rng: np.random.Generator) -> bool:
    return one(rng) <= 0.05


def _intervals() -> list[Interval]:
    rows = []
    for name, draw, truth in (
        ("normal", _normal, 0.0),
        ("skewed", _skewed, float(np.exp(0.18))),
        ("share .7", _share, 0.7),
    ):
        for n in (10, 20, 40, 100):
            rows.append(
                Interval(
                    name=f"mean of {n}, {name}",
                    where="data.intervals.mean_estimate",
                    truth=truth,
                    one=partial(_mean, draw, n),
                )
            )
    rows += [
        Interval(name=f"mean over {n} problems of 4 rows", where=where, truth=0.0, one=partial(one, n))
        for where, one in (
            ("data.intervals.mean_estimate", _clustered),
            ("data.intervals.resample_groups", _resampled),
        )
        for n in (20, 40)
    ]
    for rho in (0.0, 0.6):
        truth = 6 / pi * asin(rho / 2)
        rows += [
            Interval(
                name=f"Spearman {truth:.2f}, {n} problems",
                where="probes.evaluation.grouped_folds.cluster_bootstrap",
                truth=truth,
                one=partial(_spearman, n, rho),
            )
            for n in (30, 100)
        ]
    for shift in (0.0, 1.0):
        truth = float(norm.cdf(shift / sqrt(2)))
        rows += [
            Interval(
                name=f"AUROC {truth:.2f}, {n} problems",
                where="probes.evaluation.grouped_folds.cluster_bootstrap",
                truth=truth,
                one=partial(_auroc, n, shift),
            )
            for n in (30, 100)
        ]
    rows += [
        Interval(
            name="probe less an equal baseline, 60 problems",
            where="probes.evaluation.grouped_folds.difference_to_best",
            truth=0.0,
            one=partial(_difference, 60),
        ),
        Interval(
            name="selectivity of nothing, 60 problems",
            where="probes.evaluation.permutation_null.control_task",
            truth=0.0,
            one=partial(_selectivity, 60),
        ),
        Interval(
            name="change of thinking tokens, 32 problems",
            where="data.intervals.Resamples",
            truth=-0.2,
            one=partial(_change, 32),
        ),
        Interval(
            name="excess over random vectors, 32 problems",
            where="data.intervals.Resamples",
            truth=0.0,
            one=partial(_excess, 32),
        ),
        Interval(
            name="difference of two runs, 20 problems",
            where="analysis.traces.run_difference.paired_difference",
            truth=0.0,
            one=partial(_paired, 20),
        ),
        Interval(name="band of 20", where="analysis.statistics.bootstrap_band", truth=0.0, one=partial(_band, 20)),
        Interval(name="band of 40", where="analysis.statistics.bootstrap_band", truth=0.0, one=partial(_band, 40)),
        Interval(
            name="tokens of 14 sentences",
            where="analysis.statistics.mean_band",
            truth=0.0,
            one=partial(_by_sentence, 14),
        ),
        Interval(
            name="share .8 of 20 rollouts",
            where="data.intervals.wilson_interval",
            truth=0.8,
            one=partial(_wilson, 20, 0.8),
        ),
        Interval(
            name="share .5 of 100 rollouts",
            where="data.intervals.wilson_interval",
            truth=0.5,
            one=partial(_wilson, 100, 0.5),
        ),
        *(
            Interval(
                name=f"any share of {n} {what}",
                where=f"data.intervals.{of.__name__}",
                truth=0.0,
                one=partial(_any_share, one, n),
            )
            for n, what, of, one in (
                (8, "samples", wilson_interval, wilson_interval),
                (20, "rollouts", wilson_interval, wilson_interval),
                (10, "problems", mean_estimate, _mean_of_verdicts),
                (24, "problems", mean_estimate, _mean_of_verdicts),
                (40, "problems", mean_estimate, _mean_of_verdicts),
            )
        ),
        *(
            Interval(
                name=f"accuracy of two arms, {n} problems, {worse:.0%} lost and {better:.0%} won",
                where="data.intervals.difference_estimate",
                truth=better - worse,
                one=partial(_verdicts, n, worse, better),
            )
            for n, worse, better in ((24, 0.2, 0.2), (24, 0.1, 0.3), (40, 0.05, 0.15))
        ),
        *(
            Interval(
                name=f"accuracy of two arms, {what}",
                where="data.intervals.difference_estimate",
                truth=0.1,
                one=partial(_verdicts_of_problems, sizes, 0.1),
            )
            for what, sizes in (
                ("20 problems of 8 samples", (8,) * 20),
                ("40 problems of 4 samples", (4,) * 40),
                ("20 problems of 1 to 8 samples", tuple(i % 8 + 1 for i in range(20))),
            )
        ),
        *(
            Interval(
                name=f"difference of shares {one:.1f} and {other:.1f}, {n} rollouts each",
                where="data.intervals.shares_difference",
                truth=one - other,
                one=partial(_two_shares, n, one, other),
            )
            for n, one, other in ((20, 0.8, 0.6), (20, 0.5, 0.5), (100, 0.9, 0.8))
        ),
        Interval(
            name="cumulative change of about 10 steps",
            where="analysis.trajectory_of_trace",
            truth=_STEP,
            one=length_of_path,
        ),
        Interval(
            name="misaligned tokens, a tenth of 20 sentences (their interval alone)",
            where="analysis.misalignment_of_trace",
            truth=0.3,
            one=partial(_misaligned, 20),
        ),
        *(
            Interval(
                name=f"{name.replace('_', ' ')} of mutual information, 30 sentences",
                where="analysis.mi_of_trace",
                truth=0.0,
                one=partial(number_of_information, name),
                most=300,
            )
            for name in ("mean", "median", "share_peaks", "share_above_null")
        ),
    ]
    return rows


TESTS = (
    *(
        Test(name=name, where="analysis.statistics.serial_correlation", one=one)
        for name, one in (
            ("two signals of a trace", partial(_like_its_neighbours, 0.0)),
            ("two signals, neighbours half alike", partial(_like_its_neighbours, 0.5)),
            ("two signals, neighbours much alike", partial(_like_its_neighbours, 0.8)),
            ("two signals with trends", _trending),
        )
    ),
    Test(
        name="labels exchanged between problems",
        where="probes.evaluation.permutation_null.permutation_null",
        one=_between,
    ),
    Test(
        name="labels exchanged within problems",
        where="probes.evaluation.permutation_null.permutation_null",
        one=_within,
    ),
    Test(name="two-sided, 199 draws", where="data.intervals.permutation_p", one=_two_sided),
    *(
        Test(
            name=f"one of {n} heads of a block is ablated",
            where="steering.ablation_effect",
            one=partial(one_of_heads, n),
            values=min(n, 21),
        )
        for n in (4, 8, 16, 28)
    ),
    *(
        Test(
            name=f"{n} of {heads} heads of a block are ablated",
            where="steering.ablation_effect",
            one=partial(several_heads, heads, n),
            values=heads // n,
        )
        for heads, n in ((16, 2), (16, 4), (28, 4))
    ),
    Test(name="one of 8 MLPs is ablated", where="steering.ablation_effect", one=one_of_mlps, values=8),
    Test(name="one of 8 layers is ablated", where="steering.ablation_effect", one=one_of_layers, values=8),
    *(
        Test(
            name=f"a probe of noise at {n} layers",
            where=f"probes.{probe}",
            one=partial(probe_of_noise, probe, n),
            most=100,
        )
        for probe in ("length", "refusal", "correctness")
        for n in (1, 8)
    ),
    Test(name="dependencies, scores shuffled", where="analysis.statistics.dependency_agreement", one=_dependencies),
    Test(
        name="reflection within problems",
        where="analysis.traces.reflection.within_question_correlation",
        one=_reflection,
    ),
    Test(name="a word at random peaks", where="analysis.tokens.mi.thinking_token_table", one=_words, discrete=True),
)
RATES = (
    Rate(name="any of 20 tests, Holm", where="analysis.statistics.holm", one=_any_of_many, limit=0.05),
    Rate(name="false discoveries among 20, Benjamini and Hochberg", where="analysis.statistics.benjamini_hochberg", one=_false_discoveries, limit=0.05),
    Rate(name="a random vector called beyond random, 12 problems", where="steering.dose_response", one=random_vector_beyond_random, limit=0.05, most=500),
    Rate(name="any of 3 pairs of unrelated signals called alike", where="analysis.signal_agreement", one=signals_that_agree, limit=0.05, most=500),
)  # fmt: skip
SHARES = (
    Share(name="tokens above the answers of 39 other problems", where="analysis.mi_of_trace", one=share_of_information, chance=chance_above(39)),
    Share(name="sentences that one head attends to more than 20 others do (ranks, which tie)", where="analysis.receiver_scores", one=share_of_receivers, chance=chance_above(20), tied=True),
    Share(name="tokens that a vector changes unlike 20 others do", where="analysis.steering_shift", one=share_of_shift, chance=2 * chance_above(20)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; `met` is whether it is within its bounds."""

    kind: str
    name: str
    where: str
    runs: int
    value: float
    bounds: str
    met: bool


def coverage(row: Interval, runs: int, draws: int, seed: int) -> Row:
    runs = min(runs, row.most)
    rng = np.random.default_rng([seed, runs])
    held = [low <= row.truth <= high for low, high in (row.one(rng, draws) for _ in range(runs))]
    value, (low, high) = float(np.mean(held)), row.allowed
    error = 3 * sqrt(0.95 * 0.05 / runs) if runs < 1000 else 0.0  # a small version has to allow for its own noise
    return Row(
        kind="interval", name=row.name, where=row.where, runs=runs, value=value, bounds=f"{low:.2f} to {high:.2f}",
        met=low - error <= value <= high + error,
    )  # fmt: skip


def uniformity(row: Test, runs: int, seed: int) -> Row:
    """How often p ≤ .05; a test of few values may be below, never above. The p-values that can be many are compared with a uniform."""
    runs = min(runs, row.most)
    rng = np.random.default_rng([seed, runs])
    found = np.array([row.one(rng) for _ in range(runs)])
    least, most, uniform = _even(found, row.values) if row.values else _spread(found, discrete=row.discrete)
    value, error = float(np.mean(found <= 0.05)), 3 * sqrt(max(most * (1 - most), 1 / runs**2) / runs)
    few = f"{most:.3f}, {row.values} values alike" if row.values else "at most .05" if row.discrete else ".05"
    return Row(
        kind="test", name=row.name, where=row.where, runs=runs, value=value, bounds=few,
        met=uniform and least - error <= value <= most + error,
    )  # fmt: skip


def _even(found: Values, values: int) -> tuple[float, float, bool]:
    """What share p ≤ .05 has to have if 1/n, 2/n, … are equally likely, twice, and whether they seem to be (chi-square)."""
    counts = np.bincount(np.rint(found * values).astype(int) - 1, minlength=values)
    share = int(0.05 * values) / values
    return share, share, bool(chisquare(counts).pvalue > 0.001)


def _spread(found: Values, *, discrete: bool) -> tuple[float, float, bool]:
    if discrete:
        return 0.0, 0.05, True
    return 0.05, 0.05, bool(kstest(found, "uniform").pvalue > 0.001)


def rate(row: Rate, runs: int, seed: int) -> Row:
    runs = min(runs, row.most)
    rng = np.random.default_rng([seed, runs])
    value = float(np.mean([row.one(rng) for _ in range(runs)]))
    error = 3 * sqrt(row.limit * (1 - row.limit) / runs)
    return Row(
        kind="rate", name=row.name, where=row.where, runs=runs, value=value,
        bounds=f"at most {row.limit}", met=value <= row.limit + error,
    )  # fmt: skip


def share(row: Share, runs: int, seed: int) -> Row:
    """The mean share outside of the band; what is outside in one run is alike, so its error is taken over runs."""
    runs = min(runs, row.most)
    rng = np.random.default_rng([seed, runs])
    found = np.array([row.one(rng) for _ in range(runs)])
    excess, error = float(found.mean()) - row.chance, 3 * float(found.std(ddof=1)) / sqrt(runs)
    return Row(
        kind="share", name=row.name, where=row.where, runs=runs, value=float(found.mean()),
        bounds=f"{'at most ' if row.tied else ''}{row.chance:.3f} ± {error:.3f}",
        met=excess <= error and (row.tied or excess >= -error),
    )  # fmt: skip


def _rows() -> list[Interval | Test | Rate | Share]:
    return [*_intervals(), *TESTS, *RATES, *SHARES]


def _job(index: int, runs: int, draws: int, seed: int) -> Row:
    """The row number `index` of all: functions of this script cannot be sent to another process, numbers can."""
    row = _rows()[index]
    if isinstance(row, Interval):
        return coverage(row, runs, draws, seed)
    if isinstance(row, Test):
        return uniformity(row, runs, seed)
    return rate(row, runs, seed) if isinstance(row, Rate) else share(row, runs, seed)


def simulate(runs: int, draws: int, *, seed: int = 0, only: str = "", workers: int = 1) -> list[Row]:
    chosen = [i for i, row in enumerate(_rows()) if only in row.name or only in row.where]
    one = partial(_job, runs=runs, draws=draws, seed=seed)
    if workers == 1:
        return [one(i) for i in chosen]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(one, chosen))


_PROBES = "## The null of a probe\n"
_HEAD = """# What the intervals and p-values are worth

Written by `make selftest`: {runs:,} simulated runs per row (slow ones fewer), {draws} resamples each, seed {seed}. The data come from processes whose true
value is known. An interval should cover it 95 % of the time and must do so {low:.0%} to {high:.0%}; without an effect, a p-value should be
at most .05 in 5 % of the runs, and is also compared with a uniform distribution (Kolmogorov and Smirnov). A share of few tries has few
possible values, so that at a fixed share any interval covers it .90 to .99 of the time; rows with "any share" draw another one per run.

Every row calls the function that it names. Those of ablations, bands and steering run it on a tiny random model whose weights are drawn
again each time, so that every head, direction and answer is as good as any other; those of probes run on noise. Rows whose names end in
"(its interval alone)" test a part of the function.
"""


def _met(row: Row) -> str:
    return "yes" if row.met else "**no**"


def markdown(rows: list[Row], runs: int, draws: int, seed: int) -> str:
    titles = {
        "interval": ("Intervals", "covered"),
        "test": ("p-values", "p ≤ .05"),
        "rate": ("Decisions", "wrong"),
        "share": ("Null bands", "outside"),
    }
    lines = [_HEAD.format(runs=runs, draws=draws, seed=seed, low=0.93, high=0.97)]
    for kind, (title, column) in titles.items():
        lines += [f"## {title}", ""]
        lines += [f"| what | function | runs | {column} | required | met |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.name} | `{row.where}` | {row.runs} | {row.value:.3f} | {row.bounds} | {_met(row)} |"
            for row in rows
            if row.kind == kind
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    rows = simulate(given.runs, given.draws, seed=given.seed, only=given.only, workers=given.workers)
    text = markdown(rows, given.runs, given.draws, given.seed)
    if given.out:
        old = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
        kept = old[old.index(_PROBES) :] if _PROBES in old else ""  # measured by null_of_probes.py
        given.out.write_text(f"{text}\n{kept}" if kept else text, encoding="utf-8")
    sys.stdout.write(f"{text}\n{time.monotonic() - began:.0f} s\n")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
