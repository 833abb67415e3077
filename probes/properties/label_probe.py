"""A probe of any label: of a field of the metadata, or of a file, with every control that the other probes have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.data.progress import working
from reasonscope.data.ranks import auroc, spearman
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.baselines import Features, Points, baseline_features, residual_sites
from reasonscope.probes.evaluation.comparison import N_RESAMPLES, compare
from reasonscope.probes.evaluation.grouped_folds import Metric, Task, cluster_bootstrap, trace_groups
from reasonscope.probes.evaluation.metrics import BINARY, r2, reliability
from reasonscope.probes.evaluation.permutation_null import Null
from reasonscope.probes.fitting.baseline_fits import rank_predictions
from reasonscope.probes.fitting.held_out import held_out_probes
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS, permuted_sweep
from reasonscope.probes.fitting.positions import Place, mean_states
from reasonscope.probes.fitting.sweep import sweep
from reasonscope.probes.fitting.token_probes import N_TOKEN_PERMUTATIONS, TokenKind, held_out_token_probes
from reasonscope.probes.properties.label_reports import AnyProbe, AppliedReport, LabelReport, ProbeKind, predicted_words
from reasonscope.probes.properties.labels import Label, Labelled, LabelTask, labelled
from reasonscope.probes.properties.report import NO_TRACES, class_shortage

_MOST_LAYERS = 3  # that a probe of all tokens tries by default, since each is a search by gradient descent
_BASELINES = ("prompt_length", "bag_of_words", "thinking_length", "elapsed_position", "truncated")
_REMEDY = "label more traces, record more problems, or several samples of each (--samples)"
_TASKS: Mapping[LabelTask, Task] = {"classification": "binary", "regression": "regression"}
_METRICS: Mapping[Task, Mapping[str, Metric]] = {
    "binary": {name: metric for name, metric in BINARY.items() if name != "auroc"},
    "regression": {"r2": r2},
}


@working("label probe")
def fit(
    store: TraceStore,
    label: Label,
    traces: Sequence[Trace] | None = None,
    *,
    position: str | float | None = None,
    task: LabelTask = "classification",
    positive: str | None = None,
    kind: ProbeKind = "linear",
    sites: Sequence[Site] | None = None,
    folds: int = 5,
    seed: int = 0,
    n_permutations: int | None = None,
    n_resamples: int = N_RESAMPLES,
) -> LabelReport:
    """Predict any label of yours from one place of a trace, and compare with what needs no probe.

    Args:
        store: A run with residual sites.
        label: A field such as "meta.topic" (of the trace, or else of its problem), a CSV or JSONL file with `id` and `label`, or a
            mapping from ids of traces or problems.
        traces: The traces to learn from; by default all that have a label.
        position: "last_prompt", "first_thinking", "closing" (the end of the thinking, with its tag if it has one), "last", "mean" (over
            the thinking), "every:N" (every N-th thinking token, a row each), or a share of the thinking from 0.0 to 1.0; by default
            "closing". A probe of all tokens reads the thinking ("mean"), or every N-th token of it.
        task: "classification" or "regression".
        positive: The class to predict against all others; by default the affirmative one of two ("true", "yes", "1", "right"), else the
            later by name.
        kind: "linear" reads one state; "attention" (a softmax over the tokens) and "multi-max" (the highest token) read all of them.
        sites: The sites to choose from; by default all residual sites, and three of them for a probe of all tokens.
        folds: Parts that the problems are split into; layer and penalty are chosen inside each training part.
        seed: Seed of the folds, shuffles and resamples.
        n_permutations: Shuffles of the labels; the smallest p-value is 1 / (n_permutations + 1). By default 199, and 19 for a probe of all
            tokens.
        n_resamples: Resamples of the problems for the intervals.

    Returns:
        The held-out scores, and the probe fitted on all rows.

    Raises:
        InputError: No trace has the label and the place, a class is in fewer than `folds` groups, or the run has no residual site.

    Example:
        store = TraceStore.open("runs/mine/store")
        report = fit(store, "labels.csv", position="mean")
        print(report.summary())
    """
    if not store.ids:
        raise InputError(NO_TRACES)
    given, place = list(store) if traces is None else list(traces), _place_of(kind, position)
    chosen = list(sites) if sites is not None else _default_sites(store, kind)
    rows = _Rows.of(labelled(label, given, task, positive), place, task, folds, whole=kind != "linear")
    fold = _Folds(folds=folds, seed=seed, n_permutations=n_permutations, n_resamples=n_resamples)
    held = (
        _linear(store, rows, chosen, place, fold)
        if kind == "linear"
        else _of_tokens(store, rows, chosen, place, kind, fold)
    )
    return _report(rows, place, kind, held, chosen, len(given), fold)


def probe_kind(text: str) -> ProbeKind:
    """The kind of that name. Raises InputError for any other."""
    for kind in get_args(ProbeKind):
        if text == kind:
            return kind  # type: ignore[no-any-return]  # one of its arguments
    raise InputError(f"unknown kind {text!r}; choose one of {', '.join(get_args(ProbeKind))}")


def _place_of(kind: ProbeKind, position: str | float | None) -> Place:
    """The place that a probe of `kind` reads. Raises InputError for an unknown kind, and for a place that it cannot read."""
    kind = probe_kind(kind)
    place = Place.parse(position if position is not None else "closing" if kind == "linear" else "mean")
    if kind != "linear" and place.name != "mean" and not place.every:
        raise InputError(
            f"a probe of kind {kind} reads all of the thinking, not {place.name}; leave --position out, or ask for every:N"
        )
    return place


def _default_sites(store: TraceStore, kind: ProbeKind) -> list[Site]:
    """All residual sites of a run; at most three, evenly spread, for a probe of all tokens. Raises InputError for a run without any."""
    sites = residual_sites(store)
    if kind == "linear" or len(sites) <= _MOST_LAYERS:
        return sites
    return [sites[index] for index in np.linspace(0, len(sites) - 1, _MOST_LAYERS + 2).round().astype(int)[1:-1]]


@dataclass(frozen=True, kw_only=True)
class _Folds:
    """How many folds, shuffles and resamples a fit uses, and their seed."""

    folds: int
    seed: int
    n_permutations: int | None
    n_resamples: int


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What is learned from: the label, and each row with its target and group."""

    of_label: Labelled
    task: Task
    points: Points
    targets: Values
    groups: Sequence[str]

    @classmethod
    def of(cls, given: Labelled, place: Place, task: LabelTask, folds: int, *, whole: bool) -> "_Rows":
        """One row per token that is read, or for a `whole` thinking one per trace."""
        points = _whole(place, given.traces) if whole else place.points(given.traces)
        if not len(points):
            raise InputError(
                f"none of the {len(given.traces)} traces with a label has the position {place.name}; choose another --position, "
                "or record a model that thinks before it answers"
            )
        target_of = {trace.id: target for trace, target in zip(given.traces, given.targets, strict=True)}
        targets = np.array([target_of[trace.id] for trace in points.traces])
        groups = trace_groups(points.traces)
        if task == "classification" and (why := _shortage(given, targets, groups, folds)):
            raise InputError(why)
        return cls(of_label=given, task=_TASKS[task], points=points, targets=targets, groups=groups)

    @property
    def provenance(self) -> dict[str, Any]:
        return {
            "target": predicted_words(self.of_label.name, self.of_label.positive).removeprefix("whether "),
            "label": self.of_label.name,
            "positive": self.of_label.positive,
        }


def _shortage(given: Labelled, targets: Values, groups: Sequence[str], folds: int) -> str:
    """Which class is in too few groups of problems, if any."""
    other = "others" if len(given.counts) > 2 else next(word for word in given.counts if word != given.positive)
    labels = np.asarray(groups)
    found = {
        f"class {word!r} ({int((targets == value).sum())} rows)": len(set(labels[targets == value]))
        for word, value in ((given.positive, 1), (other, 0))
    }
    return class_shortage(found, folds, _REMEDY)


def _whole(place: Place, traces: Sequence[Trace]) -> Points:
    read = [(trace, rows[-1]) for trace in traces if (rows := place.rows(trace))]
    return Points(traces=[trace for trace, _ in read], tokens=[row for _, row in read])


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """A probe of all rows; held-out scores (row,), logits or quantities; and what predicts as much without it, (row,) each."""

    probe: AnyProbe
    scores: Values
    by_layer: Values
    shuffled: Null
    baselines: Mapping[str, Values]


def _linear(store: TraceStore, rows: _Rows, sites: Sequence[Site], place: Place, how: _Folds) -> _HeldOut:
    states = place.states(store, rows.points, sites)
    baselines = _baselines(store, rows, place, how)
    about, model = {**rows.provenance, "position": place.name}, rows.points.traces[0].model
    n_permutations = N_PERMUTATIONS if how.n_permutations is None else how.n_permutations
    if rows.task == "binary":
        held = held_out_probes(
            states[:, :, 0],
            rows.targets,
            np.ones(len(rows.targets), dtype=bool),
            rows.groups,
            sites,
            model=model,
            provenance=about,
            n_permutations=n_permutations,
            folds=how.folds,
            seed=how.seed,
        )
        return _HeldOut(
            probe=held.final, scores=held.scores, by_layer=held.by_layer, shuffled=held.shuffled, baselines=baselines
        )
    swept = sweep(states, rows.targets, rows.groups, task="regression", folds=how.folds, seed=how.seed)
    probe = LinearProbe(
        coef=swept.coef,
        intercept=swept.intercept,
        site=sites[swept.final.layer],
        task="regression",
        method="ridge",
        model=model,
        provenance={
            **about,
            "penalty": swept.final.penalty,
            "rows": len(rows.targets),
            "learned_from": sorted(set(rows.groups)),
            "seed": how.seed,
        },
    )
    shuffled = permuted_sweep(
        states,
        rows.targets,
        rows.groups,
        task="regression",
        n_permutations=n_permutations,
        folds=how.folds,
        seed=how.seed,
    )
    by_layer = np.nanmean(swept.scores[:, :, 0], axis=0)
    return _HeldOut(probe=probe, scores=swept.predictions, by_layer=by_layer, shuffled=shuffled, baselines=baselines)


def _of_tokens(
    store: TraceStore, rows: _Rows, sites: Sequence[Site], place: Place, kind: TokenKind, how: _Folds
) -> _HeldOut:
    """A probe of all tokens; the linear probe of their mean is one of its baselines."""
    traces = rows.points.traces
    held = held_out_token_probes(
        [[span_states(store, trace, place, site) for trace in traces] for site in sites],
        rows.targets,
        rows.groups,
        sites,
        kind=kind,
        task=rows.task,
        model=traces[0].model,
        provenance={**rows.provenance, "position": place.name},
        n_permutations=N_TOKEN_PERMUTATIONS if how.n_permutations is None else how.n_permutations,
        folds=how.folds,
        seed=how.seed,
    )
    means = mean_states(store, traces, place, sites)
    of_mean = sweep(means, rows.targets, rows.groups, task=rows.task, folds=how.folds, seed=how.seed).predictions
    return _HeldOut(
        probe=held.final,
        scores=held.scores,
        by_layer=held.by_layer,
        shuffled=held.shuffled,
        baselines={**_baselines(store, rows, place, how), "linear_probe_of_the_mean": of_mean},
    )


def span_states(store: TraceStore, trace: Trace, place: Place, site: Site) -> NDArray[np.float32]:
    """The states of the tokens that `place` reads, (token, d_model)."""
    return np.asarray(store.activations(trace.id, str(site))[place.rows(trace)], dtype=np.float32)


def _baselines(store: TraceStore, rows: _Rows, place: Place, how: _Folds) -> dict[str, Values]:
    features: dict[str, Features] = baseline_features(rows.points, store, _BASELINES)
    if place.name == "mean":  # the baseline of the first layer reads what the probe reads
        first = mean_states(store, rows.points.traces, place, residual_sites(store)[:1])[:, 0, 0].astype(np.float64)
        features |= {name: first for name in ("embedding", "first_layer") if name in features}
    return rank_predictions(features, rows.targets, rows.groups, task=rows.task, folds=how.folds, seed=how.seed)


def _report(
    rows: _Rows, place: Place, kind: ProbeKind, held: _HeldOut, sites: Sequence[Site], n_given: int, how: _Folds
) -> LabelReport:
    read = {trace.id: trace for trace in rows.points.traces}
    binary, resampling = rows.task == "binary", {"n_resamples": how.n_resamples, "seed": how.seed}
    values = np.asarray(expit(held.scores)) if binary else held.scores
    return LabelReport(
        label=rows.of_label.name,
        positive=rows.of_label.positive,
        place=place,
        comparison=compare(
            "AUROC" if binary else "Spearman",
            rows.targets,
            held.scores,
            held.baselines,
            rows.groups,
            problems=[trace.problem.id for trace in rows.points.traces],
            shuffled=held.shuffled,
            metrics=_measured(_METRICS[rows.task], rows.targets, values, rows.groups, **resampling),
            **resampling,
        ),
        reliability=reliability(rows.targets, values) if binary else None,
        probe=held.probe,
        kind=kind,
        sites=tuple(sites),
        by_layer=held.by_layer,
        counts=rows.of_label.counts,
        n_rows=len(rows.targets),
        n_negative=int((rows.targets == 0).sum()),
        n_traces=len(read),
        n_truncated=sum(trace.state == "truncated" for trace in read.values()),
        n_left_out=n_given - len(read),
        n_groups=len(set(rows.groups)),
    )


def _measured(
    metrics: Mapping[str, Metric],
    targets: Values,
    predictions: Values,
    groups: Sequence[str],
    *,
    n_resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Each of `metrics` with an interval from at most 200 resamples of whole groups."""
    n = min(n_resamples, 200)
    return {
        name: cluster_bootstrap(metric, targets, predictions, groups, n_resamples=n, seed=seed)
        for name, metric in metrics.items()
    }


def judge_on(
    probe: AnyProbe,
    store: TraceStore,
    label: Label,
    *,
    positive: str | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> AppliedReport:
    """Score the traces of `store` that have a label with a saved probe, leaving out problems that it learned from.

    Raises InputError for a probe that `fit` did not make, if no problem is left that it did not learn from, or if the traces that are left
    are of one class.
    """
    about = probe.provenance
    if not {"label", "position"} <= about.keys():
        other = " or forecast with it (`reasonscope probe forecast`)," if "interval" in about else ""
        raise InputError(
            f"a probe of {about.get('target', 'something else')} cannot be judged by a label, because `reasonscope probe fit` did not make "
            f"it; leave --label out to score tokens with it,{other} or fit a probe of the label"
        )
    task: LabelTask = "classification" if probe.task == "binary" else "regression"
    place = Place.parse(about["position"])
    given = labelled(label, list(store), task, positive or about.get("positive") or None)
    unseen = {trace.id for trace in probe.unseen(given.traces)}
    target_of = {t.id: y for t, y in zip(given.traces, given.targets, strict=True) if t.id in unseen}
    left = [trace for trace in given.traces if trace.id in unseen]
    points = place.points(left) if isinstance(probe, LinearProbe) else _whole(place, left)
    targets = np.array([target_of[trace.id] for trace in points.traces])
    if not len(points) or not np.ptp(targets):
        counted = ", ".join(f"{int((targets == y).sum())} are {w}" for y, w in ((1, given.positive), (0, "not")) if w)
        raise InputError(
            f"{len(points)} rows of problems that the probe did not learn from ({counted}); label some of each class"
        )
    probe.check(probe.site, points.traces[0].model)
    scores = _row_scores(probe, store, points, place)
    first: Mapping[str, Metric] = {"auroc": auroc} if probe.task == "binary" else {"spearman": spearman}
    values = np.asarray(expit(scores)) if probe.task == "binary" else scores
    groups = trace_groups(points.traces)
    return AppliedReport(
        label=given.name,
        positive=given.positive,
        place=place,
        metrics=_measured(
            {**first, **_METRICS[probe.task]}, targets, values, groups, n_resamples=n_resamples, seed=seed
        ),
        n_traces=len({trace.id for trace in points.traces}),
        n_seen=len(given.traces) - len(unseen),
        n_negative=int((targets == 0).sum()),
        n_groups=len(set(groups)),
    )


def _row_scores(probe: AnyProbe, store: TraceStore, points: Points, place: Place) -> Values:
    if isinstance(probe, LinearProbe):
        return probe.scores(place.states(store, points, [probe.site])[:, 0, 0])
    return np.array([probe.scores(span_states(store, trace, place, probe.site))[-1] for trace in points.traces])
