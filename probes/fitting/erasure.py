"""Take a concept out of activations so that no linear probe finds it: LEACE (Belrose et al., arXiv 2306.03819), and how well it did."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError, MissingExtraError
from reasonscope.data.intervals import Estimate
from reasonscope.probes.evaluation.grouped_folds import (
    check_finite,
    cluster_bootstrap,
    grouped_folds,
    grouped_predictions,
)
from reasonscope.probes.evaluation.metrics import auroc

if TYPE_CHECKING:
    from concept_erasure import LeaceFitter

# Below this correlation with the label a direction is left as it is. The library's .01 is more than chance at 10,000 rows.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Eraser:
    """x ↦ mean + `projection` · (x − mean), the smallest change of x after which the label is uncorrelated with it.

    `projection` (d_model, d_model) is idempotent but not orthogonal; `mean` (d_model,); both float64. `n` rows taught it.
    """

    projection: Values
    mean: Values
    n: int

    def __call__(self, states: NDArray[np.floating[Any]]) -> Values:
        """Erase from states (…, d_model)."""
        if states.shape[-1:] != self.mean.shape:
            raise InputError(
                f"states {states.shape} for an eraser of width {len(self.mean)}; they have to be of its site"
            )
        return np.asarray((states - self.mean) @ self.projection.T + self.mean, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Guardedness:
    """AUROC of a fresh probe on states that neither it nor the eraser learned from, `before` and `after` erasure; chance is .5."""

    before: Estimate
    after: Estimate
    n_groups: int


def fit_eraser(states: NDArray[np.floating[Any]], labels: NDArray[Any]) -> Eraser:
    """The eraser of `labels` (row,) of two or more classes, or (row, concept) of numbers, from `states` (row, d_model).

    Departure from the library: it compares the label's covariance with an absolute .01, which a class of one row in a thousand never
    reaches, so that nothing is erased. Labels are standardised here first. Raises InputError for a constant label, fewer than three
    rows or numbers that are not finite; MissingExtraError without the extra `erasure`.
    """
    check_finite(states)
    concepts = _standardised(labels)
    if states.ndim != 2 or len(states) != len(concepts) or len(states) < 3:
        raise InputError(
            f"states {states.shape} for {len(concepts)} labels; (row, d_model) and a label a row are needed"
        )
    fitter = _leace()
    rows = torch.as_tensor(np.asarray(states, dtype=np.float64))
    eraser = fitter.fit(rows, torch.as_tensor(concepts), svd_tol=_TOLERANCE).eraser
    return Eraser(projection=eraser.P.numpy(), mean=rows.mean(dim=0).numpy(), n=len(states))


def guardedness(
    states: NDArray[np.floating[Any]],
    labels: NDArray[np.bool_],
    groups: Sequence[str],
    *,
    folds: int = 5,
    seed: int = 0,
) -> Guardedness:
    """How much of `labels` (row,) a fresh probe finds in `states` (row, d_model), before erasure and after.

    The eraser learns from one half of the groups, a fresh probe from the other half in folds; then the halves change places. On the
    rows that taught the eraser no linear probe finds anything, by the theorem, so those rows prove nothing. With few rows to a
    dimension much is left on the others, and this number says how much.
    """
    true, owners = labels.astype(np.float64), np.asarray(groups)
    before, after = np.full(len(true), np.nan), np.full(len(true), np.nan)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    for half in grouped_folds(true, groups, task="binary", folds=2, seed=seed):
        erase = fit_eraser(states[half.train], labels[half.train])
        for found, seen in ((before, states[half.test]), (after, erase(states[half.test]))):
            found[half.test] = grouped_predictions(
                probe, seen, true[half.test], owners[half.test].tolist(), folds=folds, task="binary", seed=seed
            )
    return Guardedness(
        before=cluster_bootstrap(auroc, true, before, groups, seed=seed),
        after=cluster_bootstrap(auroc, true, after, groups, seed=seed),
        n_groups=len(set(groups)),
    )


def _standardised(labels: NDArray[Any]) -> Values:
    """Labels as columns of mean 0 and spread 1: a column a class but the first, or the columns that were given."""
    columns = labels
    if labels.ndim == 1:
        columns = labels[:, None] == np.unique(labels)[None, 1:]
    columns = columns.astype(np.float64)
    spread = columns.std(axis=0)
    if not columns.shape[1] or not np.isfinite(columns).all() or (spread == 0).any():
        raise InputError(
            "a label is the same in every row, or not finite, so there is nothing to erase; give two classes"
        )
    return np.asarray((columns - columns.mean(axis=0)) / spread)


def _leace() -> "type[LeaceFitter]":
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # it compiles a function by torch.jit, which is going away
            from concept_erasure import LeaceFitter
    except ImportError as error:
        raise MissingExtraError(
            "concept erasure needs the extra erasure: pip install 'reasonscope[erasure]'"
        ) from error
    fitter: type[LeaceFitter] = LeaceFitter  # the library has no types
    return fitter
