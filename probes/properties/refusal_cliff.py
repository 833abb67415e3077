"""Scores along a trace: at every token, their means over traces, and the cliff at the closing tag (Refusal Falls off a Cliff).

Row r of a trace is the state at its token r, so the score at row r is what the probe reads after token r: the score that decides
the first token of the answer is the one at the last token of the close window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import t

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import in_hundredths
from reasonscope.data.trace import Trace
from reasonscope.data.variants import Variant, is_published
from reasonscope.probes.evaluation.comparison import N_RESAMPLES
from reasonscope.probes.evaluation.grouped_folds import Metric, cluster_bootstrap
from reasonscope.probes.fitting.held_out import HeldOut
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import thinking_to_window
from reasonscope.probes.properties.request_outcomes import BENIGN_COMPLIED, HARMFUL_COMPLIED, RequestOutcome

PLATEAU = 0.5  # the plateau is the median over this share of the thinking, counted from its end


@dataclass(frozen=True, kw_only=True)
class MeanTrajectory:
    """Mean scores of several traces, aligned at their last scores.

    Attributes:
        mean: Mean score at each position, (position,).
        n: Number of traces that reach a position, (position,).
        low: Lower end of the 95 % interval over problems, (position,); NaN if fewer than two problems reach it or none were named.
        high: Upper end of it, (position,).
    """

    mean: Values
    n: NDArray[np.int64]
    low: Values
    high: Values


@dataclass(frozen=True, kw_only=True)
class Cliff:
    """How far scores fall at the closing tag.

    Attributes:
        ids: The traces, (trace,).
        plateaus: The plateau of each trace, (trace,).
        ends: The score at the end of its close window, (trace,).
        plateau: Mean of `plateaus`; all intervals resample whole groups.
        end: Mean of `ends`.
        drop: Mean of plateau minus end, in the unit of the scores.
    """

    ids: tuple[str, ...]
    plateaus: Values
    ends: Values
    plateau: Estimate
    end: Estimate
    drop: Estimate

    @property
    def drops(self) -> Values:
        """Plateau minus end of each trace, (trace,)."""
        return self.plateaus - self.ends

    def to_dict(self) -> dict[str, Any]:
        """The means, for JSON."""
        means = {"plateau": self.plateau, "end": self.end, "drop": self.drop}
        return {**{name: mean.to_dict() for name, mean in means.items()}, "n": len(self.ids)}


def token_scores(probe: LinearProbe, store: TraceStore, trace: Trace) -> Values:
    """What `probe` says at every token but the last (row,): probabilities of a binary probe, else values in the unit of its target.

    Raises SiteError if the run has no states of the probe's site, and InputError if it is of another model.
    """
    probe.check(probe.site, trace.model)
    states = np.asarray(store.activations(trace.id, str(probe.site)), dtype=np.float64)
    return probe.probabilities(states) if probe.task == "binary" else probe.scores(states)


def mean_trajectory(
    scores: Sequence[Values], *, groups: Sequence[str] = (), variant: Variant = "corrected"
) -> MeanTrajectory:
    """Mean over traces of `scores` (one array (row,) each), aligned at their last rows; `groups` names the problem of each.

    "corrected" takes the mean over the traces that reach a position, so that a constant score stays constant whatever the lengths.
    "published" counts absent positions as 0, as the code of arXiv 2510.06036 does, which draws a rise that is not there. Raises
    InputError for no trace, a trace without scores, or another number of groups than of traces.
    """
    if not scores or not all(len(values) for values in scores):
        raise InputError(f"{len(scores)} trajectories, some of them perhaps empty; give at least one score per trace")
    if groups and len(groups) != len(scores):
        raise InputError(f"{len(groups)} groups for {len(scores)} trajectories; name the problem of each, or of none")
    longest = max(len(values) for values in scores)
    padded = np.full((len(scores), longest), np.nan)
    for row, values in zip(padded, scores, strict=True):
        row[longest - len(values) :] = values
    reached = ~np.isnan(padded)
    total = np.where(reached, padded, 0.0).sum(axis=0)
    n = reached.sum(axis=0)
    counted = np.full(longest, len(scores)) if is_published(variant) else n
    mean = total / counted
    reach = _reach(padded, groups) * n / counted
    return MeanTrajectory(mean=mean, n=n, low=mean - reach, high=mean + reach)


def _reach(padded: Values, groups: Sequence[str]) -> Values:
    """Half the 95 % interval of the mean over the traces at each position; traces of one problem are not independent.

    Student's t over the G problems there, with the cluster-robust variance of a mean, G / (G − 1) · Σ_g (Σ_{i in g} (x_i − mean))² / n².
    """
    names, of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    reached = ~np.isnan(padded)
    sums = np.zeros((len(names), padded.shape[1]))
    there = np.zeros_like(sums, dtype=bool)
    if len(names):
        centre = np.where(reached, padded, 0.0).sum(axis=0) / reached.sum(axis=0)
        np.add.at(sums, of, np.where(reached, padded - centre, 0.0))
        np.logical_or.at(there, of, reached)
    many = there.sum(axis=0)
    known = many > 1
    reach = np.full(padded.shape[1], np.nan)
    n, g = reached.sum(axis=0)[known], many[known]
    reach[known] = t.ppf(0.975, g - 1) * np.sqrt(g / (g - 1) * (sums[:, known] ** 2).sum(axis=0)) / n
    return reach


def _plateau_and_end(scores: Values, trace: Trace, *, plateau: float = PLATEAU) -> tuple[float, float]:
    """The median of `scores` (row,) over the last share `plateau` of the thinking before the close window, and the score at its end.

    The paper takes the maximum instead, which over thousands of tokens is high for any score that varies.
    """
    if not 0 < plateau <= 1:
        raise InputError(f"plateau {plateau} has to be a share of the thinking, above 0 and at most 1")
    rows = thinking_to_window(trace)
    if len(scores) <= rows[-1]:
        raise InputError(
            f"trace {trace.id!r}: {len(scores)} scores for {len(trace.token_ids) - 1} rows; give one score per row"
        )
    thinking = rows[rows < trace.tokens.close_window.start]
    last = thinking[-max(1, round(plateau * len(thinking))) :]
    return float(np.median(scores[last])), float(scores[rows[-1]])


def cliff(
    scores: Mapping[str, Values],
    traces: Sequence[Trace],
    *,
    plateau: float = PLATEAU,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Cliff:
    """The cliff of `traces`, whose `scores` are given by id, each (row,). Raises InputError for no trace."""
    plateaus, ends = _plateaus_and_ends(scores, traces, plateau)
    groups = [trace.problem.group for trace in traces]

    def estimate(metric: Metric, values: Values, others: Values) -> Estimate:
        return cluster_bootstrap(metric, values, others, groups, n_resamples=n_resamples, seed=seed)

    return Cliff(
        ids=tuple(trace.id for trace in traces),
        plateaus=plateaus,
        ends=ends,
        plateau=estimate(_mean_of_first, plateaus, ends),
        end=estimate(_mean_of_first, ends, plateaus),
        drop=estimate(_mean_difference, plateaus, ends),
    )


def random_direction_drops(
    probe: LinearProbe,
    store: TraceStore,
    traces: Sequence[Trace],
    *,
    n_controls: int = 100,
    plateau: float = PLATEAU,
    seed: int = 0,
) -> Values:
    """Plateau minus end of `traces` along random unit directions (direction, trace): what any direction shows at the closing tag.

    Each direction's values are shifted and scaled to the mean and spread of the probe's own values over the same rows (thinking and
    close window of all traces) and then turned into probabilities, so that they saturate as much as the probe's.
    """
    units = np.random.default_rng(seed).standard_normal((n_controls, len(probe.coef)))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    states = [np.asarray(store.activations(trace.id, str(probe.site)), dtype=np.float64) for trace in traces]
    chosen = np.concatenate([x[thinking_to_window(t)] for x, t in zip(states, traces, strict=True)])
    own, other = probe.scores(chosen), chosen @ units.T
    spread = own.std() / np.maximum(other.std(axis=0), np.finfo(float).tiny)
    shift = own.mean() - spread * other.mean(axis=0)
    read = expit if probe.task == "binary" else np.asarray
    drops = [
        np.subtract(*_plateau_and_end(scores, trace, plateau=plateau))
        for x, trace in zip(states, traces, strict=True)
        for scores in read(x @ units.T * spread + shift).T
    ]
    return np.reshape(drops, (len(traces), n_controls)).T


def _plateaus_and_ends(scores: Mapping[str, Values], traces: Sequence[Trace], plateau: float) -> tuple[Values, Values]:
    if not traces:
        raise InputError("no traces to measure a cliff on; give at least one")
    pairs = np.array([_plateau_and_end(scores[trace.id], trace, plateau=plateau) for trace in traces])
    return pairs[:, 0], pairs[:, 1]


def _mean_of_first(values: Values, others: Values) -> float:
    return float(values.mean())


def _mean_difference(plateaus: Values, ends: Values) -> float:
    return float((plateaus - ends).mean())


@dataclass(frozen=True, kw_only=True)
class CliffStudy:
    """How far the scores of one probe fall at the closing tag, and how far they would fall by chance.

    Every state changes at a closing tag, so a drop alone says little.

    Attributes:
        cliffs: The cliff of each cell with at least two problems.
        scores: Scores of every trace by id, (token,), each from a probe that was not fitted on its problem.
        random: Mean drop of harmful requests that were complied with along random directions, (direction,).
        excess: How much further these fall than benign requests that were complied with; None without such benign requests.
        random_excess: The same along random directions, (direction,).
    """

    cliffs: Mapping[RequestOutcome, Cliff]
    scores: Mapping[str, Values]
    random: Values
    excess: Estimate | None
    random_excess: Values | None

    @property
    def above_nulls(self) -> bool:
        """Whether the interval of the drop lies above that of benign requests and above 97.5 % of the random directions."""
        benign = self.cliffs.get(BENIGN_COMPLIED)
        low = self.cliffs[HARMFUL_COMPLIED].drop.low
        return benign is not None and low > benign.drop.high and low > float(np.quantile(self.random, 0.975))

    @property
    def excess_above_random(self) -> bool:
        """Whether the interval of the excess lies above 97.5 % of the random directions."""
        if self.excess is None or self.random_excess is None:
            return False
        return self.excess.low > float(np.quantile(self.random_excess, 0.975))

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON; for random directions the mean, the central 95 % and the highest."""
        shown: dict[str, Any] = {" ".join(of): cliff.to_dict() for of, cliff in self.cliffs.items()}
        highest = float(self.random.max())
        shown["random_directions"] = {"drop": _middle(self.random).to_dict(), "highest": highest, "n": len(self.random)}
        shown["above_nulls"] = self.above_nulls
        if self.excess is not None and self.random_excess is not None:
            shown["excess_over_benign"] = {
                **self.excess.to_dict(),
                "random_directions": _middle(self.random_excess).to_dict(),
                "above_random": self.excess_above_random,
            }
        return shown

    def sentence(self, name: str) -> str:
        """What the cliff of the contrast `name` shows."""
        fell, benign, chance = self.cliffs[HARMFUL_COMPLIED], self.cliffs.get(BENIGN_COMPLIED), _middle(self.random)
        others = "" if benign is None else f"; for benign requests by {in_hundredths(benign.drop)}"
        verdict = "more than both" if self.above_nulls else "not more than by chance"
        return (
            f"Cliff of {name} at the end of the thinking: for {len(fell.ids)} harmful requests that were complied with, the probability "
            f"falls from {in_hundredths(fell.plateau.value)} to {in_hundredths(fell.end.value)}, by {in_hundredths(fell.drop)}{others}; "
            f"along random directions by {in_hundredths(chance.low)} to {in_hundredths(chance.high)} ({verdict})."
        )


def cliff_study(
    held: HeldOut,
    store: TraceStore,
    traces: Sequence[Trace],
    cells: Sequence[RequestOutcome],
    *,
    plateau: float = PLATEAU,
    n_controls: int = 100,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> CliffStudy:
    """The cliff of each cell, scored by the probe of `held` that did not learn from the trace, beside random directions."""
    pairs = tracked(list(zip(traces, held.probes, strict=True)), "scoring tokens", "traces")
    scores = {trace.id: token_scores(probe, store, trace) for trace, probe in pairs}
    members: dict[RequestOutcome, list[Trace]] = {of: [] for of in sorted(set(cells))}
    for trace, of in zip(traces, cells, strict=True):
        members[of].append(trace)
    several = {of: own for of, own in members.items() if len({trace.problem.group for trace in own}) > 1}
    cliffs = {
        of: cliff(scores, own, plateau=plateau, n_resamples=n_resamples, seed=seed) for of, own in several.items()
    }
    fell, stood = several[HARMFUL_COMPLIED], several.get(BENIGN_COMPLIED, [])
    drops = random_direction_drops(
        held.final, store, [*fell, *stood], n_controls=n_controls, plateau=plateau, seed=seed
    )
    random = drops[:, : len(fell)].mean(axis=1)
    return CliffStudy(
        cliffs=cliffs,
        scores=scores,
        random=random,
        excess=_excess(cliffs[HARMFUL_COMPLIED], cliffs[BENIGN_COMPLIED], [*fell, *stood], n_resamples, seed)
        if stood
        else None,
        random_excess=random - drops[:, len(fell) :].mean(axis=1) if stood else None,
    )


def _excess(fell: Cliff, stood: Cliff, traces: Sequence[Trace], n_resamples: int, seed: int) -> Estimate:
    drops = np.concatenate([fell.drops, stood.drops])
    n = len(fell.drops)

    def difference(rows: Rows) -> float:
        ours, theirs = drops[rows[rows < n]], drops[rows[rows >= n]]
        return float(ours.mean() - theirs.mean()) if len(ours) and len(theirs) else float("nan")

    groups = [trace.problem.group for trace in traces]
    return resample_groups(difference, groups, n_resamples=n_resamples, seed=seed)


def _middle(values: Values) -> Estimate:
    """The mean and the central 95 % of the draws of a null."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value=float(values.mean()), low=float(low), high=float(high))
