"""A probe's held-out score beside everything that could reach it without the probe: baselines, and labels that mean nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.intervals import Estimate, percentile_estimate
from reasonscope.data.ranks import auroc, spearman
from reasonscope.data.summary import in_hundredths, in_words, plural
from reasonscope.probes.evaluation.baselines import BASELINE_WORDS, TEXT_BASELINES
from reasonscope.probes.evaluation.grouped_folds import Metric, above_best, resampled_scores
from reasonscope.probes.evaluation.permutation_null import Null

MetricName = Literal["Spearman", "AUROC"]

_METRICS: Mapping[MetricName, Metric] = {"Spearman": spearman, "AUROC": auroc}
_CHANCE: Mapping[MetricName, float] = {"Spearman": 0.0, "AUROC": 0.5}
_SIGNIFICANT = 0.05
N_RESAMPLES = 1000  # of whole groups, for an interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How well a probe predicts held-out problems, and what predicts them without it.

    Attributes:
        metric: What `score`, `baselines` and `shuffled` are: "Spearman" (chance is 0) or "AUROC" (chance is 0.5).
        score: The probe.
        baselines: Each baseline by name, in the same folds (see `reasonscope.probes.evaluation.baselines`).
        difference: The probe minus the best of all `baselines`, chosen again in each resample.
        text_difference: The probe minus the best of the baselines that know only the prompt's text; None if none of them was given.
        shuffled: The score of the whole search (layer and penalty too) among those on labels that whole groups exchanged.
        metrics: Other metrics of the probe's held-out predictions.
        n_rows: Rows that were predicted.
        n_problems: Problems that the rows come from.
        n_groups: Groups of problems, which are resampled for every interval.

    Example:
        found = probes.length(store).comparison
        print(found.score, found.baselines[found.best_baseline], found.difference)
        print(found.beats)
    """

    metric: MetricName
    score: Estimate
    baselines: Mapping[str, Estimate]
    difference: Estimate
    text_difference: Estimate | None
    shuffled: Null
    metrics: Mapping[str, Estimate]
    n_rows: int
    n_problems: int
    n_groups: int

    @property
    def beats(self) -> bool:
        """Whether the interval of `difference` lies above 0."""
        return self.difference.low > 0

    @property
    def predicts(self) -> bool:
        """Whether the interval of `score` lies above chance and shuffled labels reach it in 5 % of the draws at most."""
        return self.score.low > self.chance and self.shuffled.p_value <= _SIGNIFICANT

    @property
    def chance(self) -> float:
        """What `metric` is for predictions that know nothing."""
        return _CHANCE[self.metric]

    @property
    def best_baseline(self) -> str:
        """The name of the baseline with the highest score."""
        return max(self.baselines, key=lambda name: self.baselines[name].value)

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {
            "metric": self.metric,
            "score": self.score.to_dict(),
            "baselines": {name: score.to_dict() for name, score in self.baselines.items()},
            "difference": self.difference.to_dict(),
            "text_difference": None if self.text_difference is None else self.text_difference.to_dict(),
            "shuffled": self.shuffled.to_dict(),
            "metrics": {name: score.to_dict() for name, score in self.metrics.items()},
            "beats": self.beats,
            "n_rows": self.n_rows,
            "n_problems": self.n_problems,
            "n_groups": self.n_groups,
        }

    def finding(self, subject: str, predicted: str) -> str:
        """The result in one sentence, such as "The state … predicts how long … (Spearman 0.92 …), but not better than …".

        Args:
            subject: What the probe reads, such as "The state before the first thinking token".
            predicted: What it is fitted to predict, such as "how long the model will think".
        """
        measured = f"({self.metric} {in_hundredths(self.score)}, {self._size()})"
        if not self.predicts:
            p_value = in_words(self.shuffled.p_value, 2)
            return (
                f"{subject} does not predict {predicted} better than chance {measured}; shuffled labels: p = {p_value}."
            )
        words = BASELINE_WORDS.get(self.best_baseline, self.best_baseline)
        best, difference = (
            in_hundredths(self.baselines[self.best_baseline].value),
            in_hundredths(self.difference, signed=True),
        )
        if self.beats:
            verdict = f"better than {words} ({best}), the best baseline: {difference}"
        elif self.difference.value > 0:
            verdict = f"but not clearly better than {words} ({best}; difference {difference})"
        else:
            verdict = f"but not better than {words} ({best})"
        return f"{subject} predicts {predicted} {measured}, {verdict}."

    def rows(self) -> list[tuple[str, str, str]]:
        """A table for people: what was compared, its score, and the number of problems (see `columns`)."""
        n, draws = str(self.n_problems), self.shuffled.null
        named = {"probe": self.score} | {name.replace("_", " "): score for name, score in self.baselines.items()}
        mean, highest = in_hundredths(float(draws.mean())), in_hundredths(float(draws.max()))
        chance = f"{mean} (highest {highest}, p = {in_words(self.shuffled.p_value, 2)})"
        differences = {"probe − best baseline": self.difference, "probe − best text baseline": self.text_difference}
        return [
            *((name, in_hundredths(score), n) for name, score in named.items()),
            (f"shuffled labels, {len(draws)} draws", chance, n),
            *((name, in_hundredths(one, signed=True), n) for name, one in differences.items() if one is not None),
        ]

    @property
    def columns(self) -> tuple[str, str, str]:
        """The heads of `rows`."""
        return "", f"{self.metric} [95 % interval]", "problems"

    def _size(self) -> str:
        grouped = "" if self.n_groups == self.n_problems else f" in {self.n_groups} groups"
        return f"{plural(self.n_problems, 'problem')}{grouped}"


def compare(
    metric: MetricName,
    targets: Values,
    predictions: Values,
    baselines: Mapping[str, Values],
    groups: Sequence[str],
    *,
    problems: Sequence[str],
    shuffled: Null,
    metrics: Mapping[str, Estimate],
    n_resamples: int = N_RESAMPLES,
    seed: int,
) -> Comparison:
    """Score a probe and its baselines on the same resamples of whole groups.

    Args:
        metric: What to compare by.
        targets: What is true of each row, (row,).
        predictions: The probe's held-out predictions, (row,).
        baselines: Held-out predictions of each baseline, (row,).
        groups: The group of each row; groups are resampled whole.
        problems: The problem of each row.
        shuffled: The score on shuffled labels.
        metrics: Other metrics of `predictions`, kept as they are.
        n_resamples: Number of resamples.
        seed: Seed of the resamples.

    Raises:
        InputError: The metric is undefined on the rows or on most resamples.
    """
    columns = [predictions, *baselines.values()]
    scored = resampled_scores(_METRICS[metric], targets, columns, groups, n_resamples=n_resamples, seed=seed)
    n = len(set(groups))

    def estimate(values: Values) -> Estimate:
        return percentile_estimate(float(values[0]), values[1:], n)

    ours, theirs = scored[:, 0], dict(zip(baselines, scored[:, 1:].T, strict=True))
    text = [theirs[name] for name in TEXT_BASELINES if name in theirs]
    return Comparison(
        metric=metric,
        score=estimate(ours),
        baselines={name: estimate(values) for name, values in theirs.items()},
        difference=above_best(ours, scored[:, 1:], n),
        text_difference=above_best(ours, np.stack(text, axis=1), n) if text else None,
        shuffled=shuffled,
        metrics=metrics,
        n_rows=len(targets),
        n_problems=len(set(problems)),
        n_groups=n,
    )
