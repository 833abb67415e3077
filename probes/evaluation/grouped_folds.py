"""Held-out evaluation: predictions from folds that keep a problem together, and intervals that resample whole problems."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import GroupKFold, ParameterGrid, StratifiedGroupKFold
from sklearn.pipeline import Pipeline

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, drawn_groups, percentile_estimate, resample_groups
from reasonscope.data.trace import Trace

# (targets, predictions) of some rows to one number.
Metric = Callable[[Values, Values], float]
Task = Literal["regression", "binary"]

_TINY = np.finfo(np.float64).eps


def _squared_error(targets: Values, predictions: Values) -> float:
    return float(np.mean((targets - predictions) ** 2))


def mean_log_loss(targets: Values, probabilities: Values) -> float:
    """Mean negative log-likelihood of labels 0 and 1, in nats; probabilities are kept off 0 and 1 by the last bit."""
    probabilities = probabilities.clip(_TINY, 1 - _TINY)
    return -float(np.mean(np.log(np.where(targets == 1, probabilities, 1 - probabilities))))


_LOSSES: Mapping[Task, Metric] = {"regression": _squared_error, "binary": mean_log_loss}


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Rows to fit on, `train` (row,), and rows to judge on, `test` (row,); no group is in both."""

    train: Rows
    test: Rows


@dataclass(frozen=True, kw_only=True)
class NestedFold:
    """An `outer` fold, and `inner` folds of its training rows to choose by; indices refer to all rows."""

    outer: Fold
    inner: tuple[Fold, ...]


def _problem_groups(problems: Sequence[str], groups: Sequence[str] | None = None) -> list[str]:
    """The group of each row, given the problem of each row; without `groups`, every row is its own group.

    Raises InputError, naming the problem, if rows of one problem are in two groups. A probe would then be judged on problems that it
    was fitted on: the question text alone reaches AUROC .78 that way, and .52 if problems stay together.
    """
    chosen = [f"row {index}" for index in range(len(problems))] if groups is None else [str(group) for group in groups]
    if len(chosen) != len(problems):
        raise InputError(f"{len(chosen)} groups for {len(problems)} rows; give one per row")
    first: dict[str, str] = {}
    for problem, group in zip(problems, chosen, strict=True):
        if first.setdefault(problem, group) != group:
            raise InputError(
                f"problem {problem!r} has rows in the groups {first[problem]!r} and {group!r}; "
                "give groups that keep the rows of a problem together"
            )
    return chosen


def trace_groups(traces: Sequence[Trace]) -> list[str]:
    """The group of each trace's problem. Raises InputError if two groups hold the same problem, by its id or by its words."""
    groups = [trace.problem.group for trace in traces]
    _problem_groups([trace.problem.id for trace in traces], groups)
    first: dict[str, Trace] = {}
    for trace in traces:
        asked = trace.problem.prompt or "\n".join(f"{m.role}: {m.content}" for m in trace.problem.messages)
        other = first.setdefault(asked, trace)
        if asked and other.problem.group != trace.problem.group:  # nobody knows what an empty prompt asked
            raise InputError(
                f"problems {other.problem.id!r} and {trace.problem.id!r} ask the same in the groups {other.problem.group!r} and "
                f"{trace.problem.group!r}; give them one group, or leave one out"
            )
    return groups


def grouped_folds(
    targets: Values, groups: Sequence[str], *, task: Task = "regression", folds: int = 5, seed: int = 0
) -> list[Fold]:
    """Split rows into `folds` that keep groups whole.

    For a binary task both classes are on every side, in equal shares if possible. Raises InputError for fewer groups than folds, for
    one class only, or for a class in fewer groups than folds.
    """
    labels = np.asarray(groups)
    if len(labels) != len(targets):
        raise InputError(f"{len(labels)} groups for {len(targets)} rows; give one per row")
    if (n := len(np.unique(labels))) < folds or folds < 2:
        remedy = f"record more problems{other_folds(n, folds)}" if folds >= 2 else "ask for at least 2"
        raise InputError(f"{n} groups of problems for {folds} folds; {remedy}")
    if not np.isfinite(targets).all():
        raise InputError("a target is NaN or infinite; leave its row out")
    if task == "binary":
        _check_classes(targets, labels, folds)
    found = _split(targets.astype(np.float64).tobytes(), tuple(labels.tolist()), task, folds, seed)
    if task == "binary" and any(np.ptp(targets[fold.train]) == 0 for fold in found):
        raise InputError(
            f"a class has all its rows in one of {folds} folds, because its groups are too unequal; record more problems"
        )
    return list(found)


@lru_cache(maxsize=16)  # a probe and each of its baselines ask for the same folds
def _split(targets: bytes, groups: tuple[str, ...], task: Task, folds: int, seed: int) -> tuple[Fold, ...]:
    kind = GroupKFold if task == "regression" else StratifiedGroupKFold
    parts = kind(folds, shuffle=True, random_state=seed).split(groups, np.frombuffer(targets), groups)
    return tuple(Fold(train=train, test=test) for train, test in parts)


def nested_folds(
    targets: Values, groups: Sequence[str], *, task: Task = "regression", folds: int = 5, seed: int = 0
) -> list[NestedFold]:
    """`grouped_folds`, and the same again inside each training part, with fewer folds if the rarer class has fewer groups left.

    Raises InputError as that does, and if a training part has fewer than two groups of a class.
    """
    labels = np.asarray(groups)
    nested = []
    for outer in grouped_folds(targets, groups, task=task, folds=folds, seed=seed):
        train = outer.train
        n_inner = min(folds, _groups_of_rarest(targets[train], labels[train], task))
        if n_inner < 2:
            n, of = _groups_of_rarest(targets, labels, task), "" if task == "regression" else " of a class"
            raise InputError(
                f"{n} groups of problems{of} for {folds} folds leave {n_inner} to learn from in one of them, and the choice of layer and "
                f"penalty needs 2; record more problems{other_folds(n, folds)}"
            )
        inner = grouped_folds(targets[train], labels[train].tolist(), task=task, folds=n_inner, seed=seed)
        whole = tuple(Fold(train=train[fold.train], test=train[fold.test]) for fold in inner)
        nested.append(NestedFold(outer=outer, inner=whole))
    return nested


def grouped_predictions(
    estimator: BaseEstimator,
    features: NDArray[np.generic],
    targets: Values,
    groups: Sequence[str],
    *,
    grid: dict[str, list[object]] | None = None,
    folds: int = 5,
    task: Task = "regression",
    seed: int = 0,
) -> Values:
    """Predict each row by a fit on the folds that hold no row of its group.

    Args:
        estimator: A scikit-learn estimator; it is cloned for every fit.
        features: (row, …), or an object array of texts for a pipeline that reads texts.
        targets: (row,): quantities, or labels 0 and 1.
        groups: The group of each row.
        grid: Parameters to choose, such as a penalty, with their values. They are chosen by grouped folds inside the training part of
            each fold, so no choice ever saw the row that it predicts.
        folds: Number of folds.
        task: "regression" or "binary".
        seed: Seed of the folds.

    Returns:
        Held-out predictions, (row,); for a binary task the probability of class 1.

    Raises:
        InputError: A feature is not finite, there are fewer groups than folds, or a class is in fewer groups than folds.

    Example:
        states = np.stack([store.activations(id, "resid_post.4")[-1] for id in store.ids])
        held_out = grouped_predictions(RidgeProbe(10.0), states, lengths, groups)
        print(spearman(lengths, held_out))
    """
    check_finite(features)
    predictions = np.full(len(targets), np.nan)
    if grid is None:
        for fold in grouped_folds(targets, groups, task=task, folds=folds, seed=seed):
            fitted = clone(estimator).fit(features[fold.train], targets[fold.train])
            predictions[fold.test] = predict(fitted, features[fold.test], task)
        return predictions
    for nested in nested_folds(targets, groups, task=task, folds=folds, seed=seed):
        # Without these checks many small fits take two thirds of the time.
        with config_context(assume_finite=True, skip_parameter_validation=True):
            best = _least_loss(estimator, grid, features, targets, nested.inner, task)
            fitted = clone(estimator).set_params(**best)
            fitted.fit(features[nested.outer.train], targets[nested.outer.train])
            predictions[nested.outer.test] = predict(fitted, features[nested.outer.test], task)
    return predictions


def _least_loss(
    estimator: BaseEstimator,
    grid: dict[str, list[object]],
    features: NDArray[np.generic],
    targets: Values,
    folds: Sequence[Fold],
    task: Task,
) -> dict[str, object]:
    """The parameters of `grid` with the least loss, averaged over `folds`: what scikit-learn's `GridSearchCV` finds.

    It fits a whole pipeline for each of them. Here the steps before the last are fitted once per fold, if `grid` names none of theirs.
    """
    points: list[dict[str, object]] = list(ParameterGrid(grid))
    losses = np.empty((len(folds), len(points)))
    name = estimator.steps[-1][0] if isinstance(estimator, Pipeline) else ""
    shared = bool(name) and all(key.startswith(f"{name}__") for key in grid)
    for row, fold in zip(losses, folds, strict=True):
        train, test, last = features[fold.train], features[fold.test], estimator
        if shared:
            before = clone(estimator[:-1])
            train, test, last = before.fit_transform(train, targets[fold.train]), before.transform(test), estimator[-1]
        for column, point in enumerate(points):
            own = {key.removeprefix(f"{name}__"): value for key, value in point.items()} if shared else point
            fitted = clone(last).set_params(**own).fit(train, targets[fold.train])
            row[column] = _LOSSES[task](targets[fold.test], predict(fitted, test, task))
    return points[int(losses.mean(axis=0).argmin())]


def predict(fitted: BaseEstimator, features: NDArray[np.generic], task: Task) -> Values:
    """What a fitted estimator predicts for each row: a quantity, or for a binary task the probability of class 1."""
    values = fitted.predict(features) if task == "regression" else fitted.predict_proba(features)[:, 1]
    return np.asarray(values, dtype=np.float64)


def check_finite(*activations: NDArray[np.generic]) -> None:
    """Raise InputError if an activation is NaN or infinite."""
    if any(values.dtype.kind == "f" and not np.isfinite(values).all() for values in activations):
        raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")


def cluster_bootstrap(
    metric: Metric,
    targets: Values,
    predictions: Values,
    groups: Sequence[str],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`metric` with its 95 % interval over resamples of whole groups, because rows of one problem are not independent.

    Args:
        metric: A function of (targets, predictions); NaN if it is undefined on the rows.
        targets: What is true of each row, (row,).
        predictions: What was predicted, (row,).
        groups: The group of each row.
        n_resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        The metric of all rows, with the percentile interval.

    Raises:
        InputError: There is only one group, or the metric is undefined on the rows or on most resamples.

    Example:
        held_out = grouped_predictions(RidgeProbe(), states, lengths, groups)
        print(cluster_bootstrap(spearman, lengths, held_out, groups))
    """
    return resample_groups(
        lambda rows: metric(targets[rows], predictions[rows]), groups, n_resamples=n_resamples, seed=seed
    )


def resampled_scores(
    metric: Metric,
    targets: Values,
    predictions: Sequence[Values],
    groups: Sequence[str],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Values:
    """`metric` of each of `predictions` on all rows and on the resamples of `cluster_bootstrap`: (1 + resample, prediction)."""
    draws = drawn_groups(groups, n_resamples=n_resamples, seed=seed)
    return np.array(
        [
            [metric(targets[rows], values[rows]) for values in predictions]
            for rows in chain([np.arange(len(targets))], draws)
        ]
    )


def difference_to_best(
    metric: Metric,
    targets: Values,
    predictions: Values,
    baselines: Mapping[str, Values],
    groups: Sequence[str],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """How far `metric`, of which more is better, is above the best of `baselines`, on the same resamples for all of them.

    The best baseline is chosen again in each resample, so the interval includes the uncertainty of that choice.
    """
    if not baselines:
        raise InputError("no baseline to compare with; give at least one")
    columns = [predictions, *baselines.values()]
    scores = resampled_scores(metric, targets, columns, groups, n_resamples=n_resamples, seed=seed)
    return above_best(scores[:, 0], scores[:, 1:], len(set(groups)))


def above_best(ours: Values, theirs: Values, n_groups: int) -> Estimate:
    """`ours` (1 + resample,) minus the best column of `theirs` (1 + resample, baseline), as `resampled_scores` gives them."""
    differences = ours - theirs.max(axis=1)
    return percentile_estimate(float(differences[0]), differences[1:], n_groups)


def direction_cosines(directions: NDArray[np.floating]) -> Values:
    """Cosine of each pair of `directions` (fold, d_model): (fold, fold). Raises InputError for a direction of length 0.

    Folds share most of their rows, so the cosines have to be compared with those of shuffled labels.
    """
    norms = np.linalg.norm(directions, axis=-1, keepdims=True)
    if not (norms > 0).all():
        raise InputError(
            "a direction has length 0 and therefore no angle: its probe learned nothing; lower the penalty"
        )
    unit = directions / norms
    return np.asarray(unit @ unit.T, dtype=np.float64)


def other_folds(groups: int, folds: int) -> str:
    """The advice to ask for as many folds as there are `groups` of problems, in place of `folds`; empty if that would not work either.

    Each training part then lacks one group, and has to be split again.
    """
    return f", or ask for {groups} folds (--folds {groups})" if groups >= 3 and groups != folds else ""


def _check_classes(targets: Values, labels: NDArray[np.str_], folds: int) -> None:
    classes = np.unique(targets)
    if not np.isin(classes, [0, 1]).all():
        raise InputError(f"targets {classes[:5].tolist()} of a binary task have to be 0 and 1")
    if len(classes) < 2:
        raise InputError(f"all {len(targets)} rows are of class {classes[0]:.0f}; a probe needs rows of both")
    for value in classes:
        if (n := len(np.unique(labels[targets == value]))) < folds:
            raise InputError(
                f"class {value:.0f} is in {n} groups of problems for {folds} folds; record more of it{other_folds(n, folds)}"
            )


def _groups_of_rarest(targets: Values, labels: NDArray[np.str_], task: Task) -> int:
    if task == "regression":
        return len(np.unique(labels))
    return min(len(np.unique(labels[targets == value])) for value in np.unique(targets))
