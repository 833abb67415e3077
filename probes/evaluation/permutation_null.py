"""What could have produced a score by chance: labels that mean nothing, put through the same fit and the same metric."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, permutation_p, resample_groups
from reasonscope.data.progress import tracked
from reasonscope.probes.evaluation.grouped_folds import Metric

# From targets to the score of held-out predictions of them: the whole fit, including its choices and folds.
Judge = Callable[[Values], float]


@dataclass(frozen=True, kw_only=True)
class Null:
    """A score among those on shuffled labels.

    Attributes:
        observed: The score on the true labels.
        null: The score on each shuffle of the labels, (draw,).
        p_value: The share of draws that reach `observed`, which counts as a draw itself, so it is never 0.
    """

    observed: float
    null: Values
    p_value: float

    def to_dict(self) -> dict[str, float]:
        """The numbers, for JSON, with the mean and the highest draw."""
        return {
            "observed": self.observed,
            "mean": float(self.null.mean()),
            "highest": float(self.null.max()),
            "p_value": self.p_value,
            "n_permutations": len(self.null),
        }


@dataclass(frozen=True, kw_only=True)
class _ControlTask:
    """How much better the task is predicted than random labels of the same types (Hewitt & Liang 2019).

    Attributes:
        task: The metric of the predictions of the task.
        control: The metric of the predictions of the random labels.
        selectivity: The difference of the two.
    """

    task: Estimate
    control: Estimate
    selectivity: Estimate


def _shuffled_within(targets: Values, groups: Sequence[str], *, seed: int) -> Values:
    """Permute the targets inside each group: what distinguishes the groups stays, what distinguishes the rows of a group is lost."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(groups)
    moved = targets.copy()
    for group in np.unique(labels):
        rows = np.flatnonzero(labels == group)
        moved[rows] = targets[rng.permutation(rows)]
    return moved


def _shuffled_between(targets: Values, groups: Sequence[str], *, seed: int) -> Values:
    """Give the targets of whole groups to other groups: rows of one group stay as alike as they were.

    Of a group of another size, a row gets the target as far through that group as the row is through its own. So a label that a whole
    group shares stays shared, and a row keeps its place in a trace.
    """
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1])
    rng = np.random.default_rng(seed)
    moved = np.empty_like(targets)
    for goal, drawn in zip(rows, rng.permutation(len(rows)), strict=True):
        source = rows[drawn]
        moved[goal] = targets[source[(2 * np.arange(len(goal)) + 1) * len(source) // (2 * len(goal))]]
    return moved


def _control_labels(types: Sequence[object], targets: Values, *, seed: int) -> Values:
    """A random label for each type, drawn from the targets: the control task of Hewitt & Liang (2019), section 2.

    A type is what a probe could memorise: the problem, the id of the last token, the kind of sentence. In folds that are grouped by the
    same key the control cannot be learned, so a score above chance means that something leaks.
    """
    if len(types) != len(targets):
        raise InputError(f"{len(types)} types for {len(targets)} rows; give one per row")
    _, type_of = np.unique(np.asarray(types), return_inverse=True)
    drawn: NDArray[np.float64] = np.random.default_rng(seed).choice(targets, size=type_of.max() + 1)
    return drawn[type_of]


def shuffled_targets(
    targets: Values, groups: Sequence[str], *, within: bool, n_permutations: int, seed: int
) -> list[Values]:
    """`n_permutations` shuffles of the targets, between groups or within them. Raises InputError if no shuffle changes a target."""
    shuffle = _shuffled_within if within else _shuffled_between
    seeds = [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(n_permutations)]
    moved = [shuffle(targets, groups, seed=child) for child in seeds]
    if all(np.array_equal(values, targets) for values in moved):
        raise InputError(
            f"no shuffle {'within' if within else 'between'} groups changes a target; shuffle {'between' if within else 'within'} them"
        )
    return moved


def permutation_null(
    judge: Judge, targets: Values, groups: Sequence[str], *, within: bool, n_permutations: int = 20, seed: int = 0
) -> Null:
    """The score on the targets among those on `n_permutations` shuffles of them; one-sided, more is better.

    Targets are shuffled `within` groups, or whole groups exchange theirs. Raises InputError if no shuffle changes a target.
    """
    moved = shuffled_targets(targets, groups, within=within, n_permutations=n_permutations, seed=seed)
    observed = judge(targets)
    null = np.array([judge(values) for values in tracked(moved, "fitting on shuffled labels", "shuffles")])
    return Null(observed=observed, null=null, p_value=float(permutation_p(observed, null)))


def control_task(
    metric: Metric,
    targets: Values,
    predict: Callable[[Values], Values],
    types: Sequence[object],
    groups: Sequence[str],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> _ControlTask:
    """Compare the held-out predictions that `predict` makes of the targets and of `_control_labels`, on the same resamples."""
    control = _control_labels(types, targets, seed=seed)
    predicted, memorised = predict(targets), predict(control)

    def of_task(rows: Rows) -> float:
        return metric(targets[rows], predicted[rows])

    def of_control(rows: Rows) -> float:
        return metric(control[rows], memorised[rows])

    return _ControlTask(
        task=resample_groups(of_task, groups, n_resamples=n_resamples, seed=seed),
        control=resample_groups(of_control, groups, n_resamples=n_resamples, seed=seed),
        selectivity=resample_groups(
            lambda rows: of_task(rows) - of_control(rows), groups, n_resamples=n_resamples, seed=seed
        ),
    )
