"""Erase a concept from activations so that no linear probe finds it (LEACE, Belrose et al., arXiv 2306.03819), and check it."""

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
from reasonscope.data.ranks import auroc
from reasonscope.probes.evaluation.grouped_folds import (
    check_finite,
    cluster_bootstrap,
    grouped_folds,
    grouped_predictions,
)

if TYPE_CHECKING:
    from concept_erasure import LeaceFitter

# A direction with less correlation with the label than this is left alone. The library's .01 is more than chance at 10,000 rows.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class _Eraser:
    """x ↦ mean + projection · (x − mean), the smallest change of x after which the label is uncorrelated with it.

    Attributes:
        projection: (d_model, d_model) float64, idempotent but not orthogonal.
        mean: (d_model,) float64.
        n: Number of rows that it was fitted on.
    """

    projection: Values
    mean: Values
    n: int

    def __call__(self, states: NDArray[np.floating[Any]]) -> Values:
        """Erase from states (…, d_model)."""
        if states.shape[-1:] != self.mean.shape:
            raise InputError(
                f"states of shape {states.shape} for an eraser of width {len(self.mean)}; give states of the site that it was fitted on"
            )
        return np.asarray((states - self.mean) @ self.projection.T + self.mean, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class _Guardedness:
    """AUROC of a fresh probe on states that neither it nor the eraser was fitted on, `before` and `after` erasure; chance is .5."""

    before: Estimate
    after: Estimate
    n_groups: int


def fit_eraser(states: NDArray[np.floating[Any]], labels: NDArray[Any]) -> _Eraser:
    """Fit the eraser of `labels`, (row,) of two or more classes or (row, concept) of numbers, on `states` (row, d_model).

    Departure from the library: labels are standardised first. The library compares their covariance with an absolute .01, which a class
    of one row in a thousand never reaches, so that nothing is erased. Raises InputError for a constant label, fewer than three rows or
    numbers that are not finite, MissingExtraError without the extra `erasure`.
    """
    check_finite(states)
    concepts = _standardised(labels)
    if states.ndim != 2 or len(states) != len(concepts) or len(states) < 3:
        raise InputError(
            f"states of shape {states.shape} for {len(concepts)} labels; give (row, d_model) and one label per row, at least 3 rows"
        )
    fitter = _leace()
    rows = torch.as_tensor(np.asarray(states, dtype=np.float64))
    eraser = fitter.fit(rows, torch.as_tensor(concepts), svd_tol=_TOLERANCE).eraser
    return _Eraser(projection=eraser.P.numpy(), mean=rows.mean(dim=0).numpy(), n=len(states))


def guardedness(
    states: NDArray[np.floating[Any]],
    labels: NDArray[np.bool_],
    groups: Sequence[str],
    *,
    folds: int = 5,
    seed: int = 0,
) -> _Guardedness:
    """How much of `labels` (row,) a fresh probe finds in `states` (row, d_model), before erasure and after.

    The eraser is fitted on one half of the groups and a fresh probe on the other half, in folds; then the halves change places. On the
    rows that the eraser was fitted on no linear probe finds anything, by the theorem, so they prove nothing. If there are few rows per
    dimension, much is left in the other rows, and this number says how much.
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
    return _Guardedness(
        before=cluster_bootstrap(auroc, true, before, groups, seed=seed),
        after=cluster_bootstrap(auroc, true, after, groups, seed=seed),
        n_groups=len(set(groups)),
    )


def _standardised(labels: NDArray[Any]) -> Values:
    """Labels as columns of mean 0 and spread 1: one column for each class but the first, or the columns that were given."""
    columns = labels
    if labels.ndim == 1:
        columns = labels[:, None] == np.unique(labels)[None, 1:]
    columns = columns.astype(np.float64)
    spread = columns.std(axis=0)
    if not columns.shape[1] or not np.isfinite(columns).all() or (spread == 0).any():
        raise InputError(
            "a label is the same in every row or not finite, so there is nothing to erase; give two classes"
        )
    return np.asarray((columns - columns.mean(axis=0)) / spread)


def _leace() -> "type[LeaceFitter]":
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # it compiles a function with torch.jit, which is deprecated
            from concept_erasure import LeaceFitter
    except ImportError as error:
        raise MissingExtraError(
            "concept erasure needs the extra erasure: pip install 'reasonscope[erasure]'"
        ) from error
    fitter: type[LeaceFitter] = LeaceFitter  # the library has no types
    return fitter
