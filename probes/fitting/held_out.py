"""A probe for each fold, fitted on the traces whose problems the fold does not hold, to read every token of those that it holds.

The sweep judges layers and positions; here its choices become probes, because a score along a trace has to come from a probe that
never saw the trace's problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.intervals import Estimate
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import (
    BASELINES,
    Features,
    Points,
    baseline_predictions,
    embedding,
    embedding_site,
)
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap, difference_to_best, grouped_predictions
from reasonscope.probes.evaluation.metrics import BINARY, auroc
from reasonscope.probes.evaluation.permutation_null import Null, permutation_null
from reasonscope.probes.fitting.linear_probes import LinearProbe, LogisticProbe
from reasonscope.probes.fitting.positions import POSITIONS, Position, position_name, row_at, states_at
from reasonscope.probes.fitting.sweep import LayerChoice, sweep


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """`probes` (row,): of each row a probe that learned from no row of its group; `final` learned from all rows that teach.

    `scores` (row,): the logit of each row by its own probe. `by_layer` (layer,): held-out AUROC of each layer, the mean over folds;
    for a map of the layers, as its maximum is biased upwards and `scores` are not. `shuffled`: the AUROC of the final layer and
    penalty in as many folds among those on labels that whole groups exchanged.
    """

    probes: tuple[LinearProbe, ...]
    final: LinearProbe
    scores: Values
    by_layer: Values
    shuffled: Null


def held_out_probes(
    features: NDArray[np.floating[Any]],
    targets: Values,
    learned: NDArray[np.bool_],
    groups: Sequence[str],
    sites: Sequence[Site],
    *,
    model: Mapping[str, Any],
    provenance: Mapping[str, Any],
    folds: int = 5,
    seed: int = 0,
) -> HeldOut:
    """Fit a binary probe a fold on `features` (row, layer, d_model), layer and penalty chosen inside; only rows in `learned` teach.

    Every row gets a score, taught from or not: that of the probe whose training held no row of its group, which for a group that
    teaches nothing is the final one. Raises InputError where `sweep` does on the rows that teach.
    """
    taught, labels = np.flatnonzero(learned), np.asarray(groups)
    judged = sweep(
        features[taught][:, :, None], targets[taught], labels[taught].tolist(), task="binary", folds=folds, seed=seed
    )

    def fit(choice: LayerChoice, rows: Rows) -> LinearProbe:
        fitted = LogisticProbe(C=1 / choice.penalty, standardise=True).fit(features[rows, choice.layer], targets[rows])
        about = {**provenance, "rows": len(rows), "seed": seed}
        return LinearProbe.of(fitted, site=sites[choice.layer], model=model, provenance=about)

    final = fit(judged.final, taught)
    probes = [final] * len(labels)
    for fold, choice in zip(judged.folds, judged.chosen, strict=True):
        own = fit(choice, taught[fold.train])
        for row in np.flatnonzero(np.isin(labels, labels[taught[fold.test]])):
            probes[row] = own
    layer_of = {site: layer for layer, site in enumerate(sites)}
    scores = [float(probe.scores(row[layer_of[probe.site]])) for probe, row in zip(probes, features, strict=True)]
    by_layer = np.nanmean(judged.scores[:, :, 0], axis=0)

    def judge(labelled: Values) -> float:
        again = LogisticProbe(C=1 / judged.final.penalty, standardise=True)
        states, own = features[taught, judged.final.layer], labels[taught].tolist()
        return auroc(labelled, grouped_predictions(again, states, labelled, own, folds=folds, task="binary", seed=seed))

    return HeldOut(
        probes=tuple(probes),
        final=final,
        scores=np.array(scores),
        by_layer=by_layer,
        shuffled=permutation_null(
            judge, targets[taught], labels[taught].tolist(), within=False, n_permutations=20, seed=seed
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """Held-out AUROC (layer, position), the mean over folds, of a probe trained at each of `sites` and `positions`.

    To look at, not to choose from: its maximum over many cells is biased upwards.
    """

    scores: Values
    sites: tuple[Site, ...]
    positions: tuple[str, ...]


def layer_map(
    store: TraceStore,
    traces: Sequence[Trace],
    targets: Values,
    groups: Sequence[str],
    sites: Sequence[Site],
    positions: Sequence[Position] = POSITIONS,
    *,
    folds: int = 5,
    seed: int = 0,
) -> LayerMap:
    """Sweep every layer and position of `traces` (row,), all of which have every position; only the penalty is chosen."""
    pairs = [(trace, row_at(trace, position)) for trace in traces for position in positions]
    points = Points(traces=[trace for trace, _ in pairs], tokens=[row for _, row in pairs])
    states = states_at(store, points, sites).reshape(len(traces), len(positions), len(sites), -1).swapaxes(1, 2)
    swept = sweep(states, targets, groups, task="binary", folds=folds, seed=seed)
    names = tuple(position_name(position) for position in positions)
    return LayerMap(scores=np.nanmean(swept.scores, axis=0), sites=tuple(sites), positions=names)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """AUROC of held-out scores beside those of the baselines and of shuffled labels; `difference` is to the best baseline.

    `metrics` are the other numbers of `metrics.BINARY`, of the probe's held-out probabilities.
    """

    auroc: Estimate
    metrics: Mapping[str, Estimate]
    shuffled: Null
    baselines: Mapping[str, Estimate]
    difference: Estimate

    @property
    def beats(self) -> bool:
        return self.difference.low > 0


def compared(
    targets: Values,
    held: HeldOut,
    rows: Sequence[int],
    baselines: Mapping[str, Features],
    groups: Sequence[str],
    *,
    folds: int,
    seed: int,
) -> Comparison:
    """Compare the held-out scores of `rows` by AUROC with what `baselines` (features by name) predict in as many grouped folds."""
    scores = held.scores[list(rows)]
    # Features that never vary order nothing; the means of the training parts would order the folds, and the wrong way round.
    predicted = {
        name: baseline_predictions(features, targets, groups, task="binary", folds=folds, seed=seed)
        if features.ndim == 1 or np.ptp(features, axis=0).any()
        else np.full(len(targets), 0.5)
        for name, features in baselines.items()
    }
    probabilities = np.asarray(expit(scores))
    return Comparison(
        auroc=cluster_bootstrap(auroc, targets, scores, groups, seed=seed),
        metrics={
            name: cluster_bootstrap(metric, targets, probabilities, groups, n_resamples=200, seed=seed)
            for name, metric in BINARY.items()
            if name != "auroc"
        },
        shuffled=held.shuffled,
        baselines={n: cluster_bootstrap(auroc, targets, values, groups, seed=seed) for n, values in predicted.items()},
        difference=difference_to_best(auroc, targets, scores, predicted, groups, seed=seed),
    )


def baseline_features(points: Points, store: TraceStore, names: Sequence[str]) -> dict[str, Features]:
    """Features of the baselines `names`, of the first layer, and of the next token where the traces hold its entropy."""
    found = {name: BASELINES[name](points) for name in names}
    first = embedding_site(store)
    if first.layer == 0:
        found["embedding" if first.point == "resid_pre" else "first_layer"] = embedding(points, store)
    if all(trace.entropies is not None and trace.logprobs is not None for trace in points.traces):
        found["next_token"] = BASELINES["next_token"](points)
    return found
