"""A probe of whether the answer would be right if the thinking ended here, and what a probe says at every cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from reasonscope.analysis.exits.signals import ExitSignals
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.conformal import alarm_threshold
from reasonscope.probes.evaluation.grouped_folds import grouped_predictions, mean_log_loss
from reasonscope.probes.fitting.linear_probes import LinearProbe, LogisticProbe
from reasonscope.steering.decoding.monitor import EXIT_TARGET

PENALTIES = (0.001, 0.01, 0.1)  # C of the logistic regression


@dataclass(frozen=True, kw_only=True)
class ExitProbe:
    """A probe of right answers at the cuts of some traces.

    Attributes:
        probe: Fitted on all of them.
        held_out: Its probabilities at the cuts of each trace (cut,), by fits without the trace's group.
        log_loss: Of these, nats per cut.
        base_log_loss: Of the share of right answers, the same everywhere.
    """

    probe: LinearProbe
    held_out: Mapping[str, Values]
    log_loss: float
    base_log_loss: float


def fit_exit_probe(
    store: TraceStore, signals: Sequence[ExitSignals], sites: Sequence[Site], *, folds: int = 5, seed: int = 0
) -> ExitProbe:
    """Learn from forced answers whether the answer would be right if the thinking ended at a cut.

    Args:
        store: A run with the states of `sites`.
        signals: The traces to learn from.
        sites: Sites to choose from, with the penalty, by the log loss of held-out groups.
        folds: Number of folds.
        seed: Seed of the folds.

    Returns:
        The probe, with its held-out probabilities, which thresholds may be chosen by.

    Raises:
        InputError: If the run has no such states, or right or wrong answers are in fewer groups than folds.
    """
    if not sites:
        raise InputError(
            "the run holds no residual states for a probe; record it with --sites 'resid_post.*', or give --probe"
        )
    with_cuts = [one for one in signals if len(one.cuts)]
    right = np.concatenate([one.right for one in with_cuts]).astype(np.float64)
    groups = [one.group for one in with_cuts for _ in one.cuts]
    tried = []
    for site, penalty in product(sites, PENALTIES):
        states = _states(store, with_cuts, site)
        held = grouped_predictions(_pipeline(penalty), states, right, groups, folds=folds, task="binary", seed=seed)
        tried.append((mean_log_loss(right, held), site, penalty, held))
    loss, site, penalty, held = min(tried, key=lambda one: one[0])
    fitted = _pipeline(penalty).fit(_states(store, with_cuts, site), right)
    about = {
        "target": EXIT_TARGET,
        "learned_from": sorted(set(groups)),
        "folds": folds,
        "seed": seed,
    }
    probe = LinearProbe.of(fitted, site=site, model=store.trace(with_cuts[0].trace).model, provenance=about)
    ends = np.cumsum([len(one.cuts) for one in with_cuts])[:-1]
    by_trace = zip((one.trace for one in with_cuts), np.split(held, ends), strict=True)
    base = mean_log_loss(right, np.full(len(right), right.mean()))
    return ExitProbe(probe=probe, held_out=dict(by_trace), log_loss=loss, base_log_loss=base)


def false_alarm_threshold(probe: LinearProbe, signals: Sequence[ExitSignals], *, false_alarms: float) -> float:
    """The score that a probe passes at a place with a wrong answer in at most a share `false_alarms` of new problems.

    Split conformal over groups (`alarm_threshold`), from the highest score at the places of each trace at which the forced answer is
    wrong. Raises InputError if the probe learned from one of these problems, or they are too few.
    """
    learned = set(probe.provenance.get("learned_from", ()))
    if not learned or any(one.group in learned for one in signals):
        raise InputError(
            "a threshold by false alarms needs problems that the probe did not learn from; "
            "give a saved one (--probe) and a run of other problems"
        )
    lowest = min(one.score.min() for one in signals if len(one.score))
    highest = np.array([max([lowest, *one.score[~one.right]]) for one in signals])
    groups = [one.group for one in signals]
    # A rule stops at its threshold, and a false alarm lies above it; scores have four digits.
    return round(alarm_threshold(highest, groups, false_alarms=false_alarms) + 1e-4, 4)


def _pipeline(penalty: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticProbe(penalty))


def _states(store: TraceStore, signals: Sequence[ExitSignals], site: Site) -> NDArray[np.float32]:
    """The states before each cut (row, d_model), trace after trace."""
    rows = [np.asarray(store.activations(one.trace, str(site)))[one.cuts - 1] for one in signals]
    return np.concatenate(rows).astype(np.float32)
