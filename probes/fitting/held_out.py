"""One probe per fold, which scores every token of traces whose problems it was not fitted on.

The sweep chooses layers and penalties; here its choices become probes, because a score along a trace has to come from a probe that
never saw the trace's problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import Features, Points
from reasonscope.probes.evaluation.comparison import N_RESAMPLES, Comparison, compare
from reasonscope.probes.evaluation.grouped_folds import cluster_bootstrap
from reasonscope.probes.evaluation.metrics import BINARY
from reasonscope.probes.evaluation.permutation_null import Null
from reasonscope.probes.fitting.baseline_fits import rank_predictions
from reasonscope.probes.fitting.linear_probes import LinearProbe, LogisticProbe
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS, permuted_sweep
from reasonscope.probes.fitting.positions import POSITIONS, Position, position_name, row_at, states_at
from reasonscope.probes.fitting.sweep import LayerChoice, sweep


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A binary probe for each fold, and what each says of the rows that it was not fitted on.

    Attributes:
        probes: For each row a probe that was fitted on no row of its group, (row,).
        final: The probe that was fitted on all training rows.
        scores: The logit of each row by its own probe, (row,).
        by_layer: Held-out AUROC of each layer, the mean over folds, (layer,). It is for a map of the layers: its maximum is biased
            upwards, `scores` are not.
        shuffled: The AUROC of a search by least squares, among those of the same search on labels that whole groups exchanged.
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
    n_permutations: int = N_PERMUTATIONS,
    folds: int = 5,
    seed: int = 0,
) -> HeldOut:
    """Fit one binary probe per fold on `features` (row, layer, d_model), with layer and penalty chosen inside the fold.

    Only the rows in `learned` (row,) are fitted on, but every row gets a score, from a probe that was fitted on no row of its group.
    For a group without training rows that is the final probe. Raises InputError as `sweep` does on the training rows.
    """
    training, labels = np.flatnonzero(learned), np.asarray(groups)
    swept = sweep(
        features[training][:, :, None],
        targets[training],
        labels[training].tolist(),
        task="binary",
        folds=folds,
        seed=seed,
    )

    def fit(choice: LayerChoice, rows: Rows) -> LinearProbe:
        fitted = LogisticProbe(C=1 / choice.penalty, standardise=True).fit(features[rows, choice.layer], targets[rows])
        about = {**provenance, "rows": len(rows), "learned_from": sorted(set(labels[rows].tolist())), "seed": seed}
        return LinearProbe.of(fitted, site=sites[choice.layer], model=model, provenance=about)

    final = fit(swept.final, training)
    probes = [final] * len(labels)
    chosen = list(zip(swept.folds, swept.chosen, strict=True))
    for fold, choice in tracked(chosen, "fitting", "folds"):
        own = fit(choice, training[fold.train])
        for row in np.flatnonzero(np.isin(labels, labels[training[fold.test]])):
            probes[row] = own
    layer_of = {site: layer for layer, site in enumerate(sites)}
    scores = [float(probe.scores(row[layer_of[probe.site]])) for probe, row in zip(probes, features, strict=True)]
    by_layer = np.nanmean(swept.scores[:, :, 0], axis=0)

    return HeldOut(
        probes=tuple(probes),
        final=final,
        scores=np.array(scores),
        by_layer=by_layer,
        shuffled=permuted_sweep(
            features[training][:, :, None],
            targets[training],
            labels[training].tolist(),
            task="binary",
            n_permutations=n_permutations,
            folds=folds,
            seed=seed,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """Held-out AUROC (layer, position), the mean over folds, of a probe fitted at each of `sites` and `positions`.

    It is to look at, not to choose from: its maximum over many cells is biased upwards.
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
    """Fit a probe at every layer and position of `traces` (row,), which must all have every position; only the penalty is chosen."""
    pairs = [(trace, row_at(trace, position)) for trace in traces for position in positions]
    points = Points(traces=[trace for trace, _ in pairs], tokens=[row for _, row in pairs])
    states = states_at(store, points, sites).reshape(len(traces), len(positions), len(sites), -1).swapaxes(1, 2)
    swept = sweep(states, targets, groups, task="binary", folds=folds, seed=seed)
    names = tuple(position_name(position) for position in positions)
    return LayerMap(scores=np.nanmean(swept.scores, axis=0), sites=tuple(sites), positions=names)


def compare_binary(
    targets: Values,
    held: HeldOut,
    rows: Sequence[int],
    baselines: Mapping[str, Features],
    groups: Sequence[str],
    *,
    problems: Sequence[str],
    n_resamples: int = N_RESAMPLES,
    folds: int,
    seed: int,
) -> Comparison:
    """Compare the held-out scores of `rows` by AUROC with what `baselines` (features by name) predict in the same number of folds."""
    scores = held.scores[list(rows)]
    probabilities = np.asarray(expit(scores))
    return compare(
        "AUROC",
        targets,
        scores,
        rank_predictions(baselines, targets, groups, task="binary", folds=folds, seed=seed),
        groups,
        problems=problems,
        shuffled=held.shuffled,
        metrics={
            name: cluster_bootstrap(
                metric, targets, probabilities, groups, n_resamples=min(n_resamples, 200), seed=seed
            )
            for name, metric in BINARY.items()
            if name != "auroc"
        },
        n_resamples=n_resamples,
        seed=seed,
    )
