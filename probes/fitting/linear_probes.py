"""Linear probes: estimators with scikit-learn's interface, and the frozen probe that is saved, with its site, model and provenance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.linear_model import Lasso
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.storage.safetensors_file import SafetensorsFormat
from reasonscope.data.storage.untrusted import wrap_errors
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.identity import differences
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.solvers import LinearPath, logistic_path, ridge_path

_KIND = SafetensorsFormat(
    key="reasonscope.probe",
    noun="probe",
    version=1,
    fields={"site": str, "task": str, "method": str, "model": dict, "provenance": dict},
)
Task = Literal["regression", "binary"]


@dataclass(frozen=True, kw_only=True)
class FittedProbe:
    """What every saved probe says of itself, and whom it may judge.

    Attributes:
        site: The site whose activations it reads.
        task: "regression" scores in the units of its target, "binary" in logits of the positive class.
        method: Name of the estimator.
        model: The fingerprint of the model that was read.
        provenance: Data, counts, penalty and seed, as JSON.
    """

    site: Site
    task: Task
    method: str
    model: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def check(self, site: Site, model: Mapping[str, Any]) -> None:
        """Raise SiteError for activations from another site, InputError for another model (its weights or tokenizer)."""
        if site != self.site:
            raise SiteError(f"activations of {site}; the probe reads {self.site}: record that site or fit a new probe")
        if other := differences(self.model, model, ("weights", "tokenizer")):
            raise InputError(
                f"activations of {model.get('name')!r}, which differs in {' and '.join(other)} from {self.model.get('name')!r} "
                "that the probe was fitted on; fit a new probe"
            )

    def unseen(self, traces: Sequence[Trace]) -> list[Trace]:
        """Those of `traces` whose problems the probe did not learn from: the ones that it may be judged on.

        Raises InputError for a probe that does not say what it learned from, and if it learned from all of them.
        """
        if "learned_from" not in self.provenance:
            raise InputError(
                "this probe does not say which problems it learned from; fit it again with `reasonscope probe`"
            )
        seen = set(self.provenance["learned_from"])
        if not (left := [trace for trace in traces if trace.problem.group not in seen]):
            raise InputError(
                f"the probe learned from the problems of all {len(traces)} traces, so it cannot be judged on them; "
                "fit it on part of the run with --held-out 0.5, or take a run of other problems"
            )
        return left

    def _header(self) -> dict[str, Any]:
        """What is saved beside the weights."""
        return {
            "site": str(self.site),
            "task": self.task,
            "method": self.method,
            "model": dict(self.model),
            "provenance": dict(self.provenance),
        }


@dataclass(frozen=True, kw_only=True)
class LinearProbe(FittedProbe):
    """A direction at a site that reads one property: score = coef · activation + intercept.

    Attributes:
        coef: (d_model,) float64, in the units of the raw activations; centring and scaling are folded in.
        intercept: What is added.
        site: The site whose activations it reads.
        task: "regression" scores in the units of its target, "binary" in logits of the positive class.
        method: Name of the estimator.
        model: The fingerprint of the model that was read.
        provenance: Data, counts, penalty and seed, as JSON.

    Example:
        probe = LinearProbe.load("runs/mine/probes/length.safetensors")
        states = store.activations(store.ids[0], str(probe.site))
        print(probe.scores(states))  # one per token
    """

    coef: Values
    intercept: float

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise InputError(f"unknown task {self.task!r}; choose one of {', '.join(get_args(Task))}")
        if self.coef.ndim != 1 or not self.coef.size or self.coef.dtype != np.float64:
            raise InputError(f"coef is {self.coef.dtype} of shape {self.coef.shape}; it has to be float64 (d_model,)")
        if not (np.isfinite(self.coef).all() and np.isfinite(self.intercept)):
            raise InputError("a coefficient is NaN or infinite; check the activations that the probe was fitted on")

    @classmethod
    def of(
        cls, fitted: BaseEstimator, *, site: Site, model: Mapping[str, Any], provenance: Mapping[str, Any] | None = None
    ) -> Self:
        """A probe from a fitted estimator of this module, or from a Pipeline of a StandardScaler and one. Raises InputError for others."""
        coef, intercept, last = _folded(fitted)
        return cls(
            coef=coef,
            intercept=intercept,
            site=site,
            task="binary" if isinstance(last, ClassifierMixin) else "regression",
            method=type(last).__name__,
            model=model,
            provenance={"parameters": last.get_params(), **(provenance or {})},
        )

    @property
    def direction(self) -> Values:
        """`coef` scaled to length 1, (d_model,). Raises InputError if it is 0, as for a lasso that kept nothing."""
        if not (norm := np.linalg.norm(self.coef)):
            raise InputError("the probe's coefficients are all 0, so it has no direction; fit it with a weaker penalty")
        return np.asarray(self.coef / norm)

    def scores(self, activations: ArrayLike) -> Values:
        """Scores (…) of `activations` (…, d_model). Raises InputError for another width, NaN or infinity."""
        states = np.asarray(activations)
        if states.ndim < 1 or states.shape[-1] != len(self.coef):
            raise InputError(f"activations of shape {states.shape}; the last axis of this probe is {len(self.coef)}")
        scores = states.astype(np.float64) @ self.coef + self.intercept
        if not np.isfinite(scores).all():
            raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")
        return np.asarray(scores)

    def probabilities(self, activations: ArrayLike) -> Values:
        """Probabilities (…) of the positive class, which are not calibrated. Raises InputError for a regression."""
        if self.task != "binary":
            raise InputError("a regression has no probabilities; use its scores")
        return np.asarray(expit(self.scores(activations)))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, `coef` and `intercept` float64, the rest as JSON in its header. Raises StoreError."""
        _KIND.write(Path(path), self._header(), {"coef": self.coef, "intercept": np.array([self.intercept])})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote. Raises InputError for any other file, a newer version, or NaN."""
        header, tensors = _KIND.read(Path(path))
        with wrap_errors(path):
            kept = {name: header[name] for name in ("task", "method", "model", "provenance")}
            coef, intercept = tensors["coef"], float(tensors["intercept"][0])
            return cls(coef=coef, intercept=intercept, site=Site.parse(header["site"]), **kept)


def _folded(fitted: BaseEstimator) -> tuple[Values, float, BaseEstimator]:
    """Coefficients and intercept for raw activations, and the estimator that they come from."""
    steps = [step for _, step in fitted.steps] if isinstance(fitted, Pipeline) else [fitted]
    *before, last = steps
    if len(before) > 1 or not all(isinstance(step, StandardScaler) for step in before):
        raise InputError(f"{fitted} has more steps than a StandardScaler and a probe; fit a pipeline of these two")
    if not hasattr(last, "coef_"):
        raise InputError(f"{last} has no coef_; fit it first")
    coef, intercept = np.asarray(last.coef_, dtype=np.float64).reshape(-1), float(np.ravel(last.intercept_)[0])
    for scaler in before:
        if scaler.with_std:
            coef = coef / scaler.scale_
        if scaler.with_mean:  # `mean_` exists even without it
            intercept -= float(coef @ scaler.mean_)
    return coef, intercept, last


def _read(fitted: BaseEstimator, features: ArrayLike) -> Values:
    """coef_ · row + intercept_ for each row of `features` (row, d_model): (row,)."""
    check_is_fitted(fitted)
    states = np.asarray(features, dtype=np.float64)
    if states.ndim != 2 or states.shape[1] != len(fitted.coef_):
        raise InputError(f"features of shape {states.shape}; this probe needs (row, {len(fitted.coef_)})")
    return np.asarray(states @ fitted.coef_ + fitted.intercept_)


class _Regressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A number from activations: `coef_` (d_model,), `intercept_`."""

    coef_: Values
    intercept_: float

    def predict(self, features: ArrayLike) -> Values:
        return _read(self, features)


class _Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # for the same reason
    """One of two classes from activations: `coef_` (d_model,), `intercept_`, and sorted `classes_`, of which the second is positive."""

    classes_: NDArray[Any]
    coef_: Values
    intercept_: float

    def decision_function(self, features: ArrayLike) -> Values:
        """Logits of the positive class, (row,)."""
        return _read(self, features)

    def predict(self, features: ArrayLike) -> NDArray[Any]:
        return np.asarray(self.classes_[(self.decision_function(features) > 0).astype(int)])

    def predict_proba(self, features: ArrayLike) -> Values:
        """Probabilities of both classes, (row, 2)."""
        positive = expit(self.decision_function(features))
        return np.stack([1 - positive, positive], axis=1)

    def _encoded(self, features: ArrayLike, targets: ArrayLike) -> tuple[Values, Values]:
        """Checked features and targets as 0 and 1; sets `classes_`."""
        states, labels = _checked(features, targets)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) != 2:
            raise InputError(f"{len(self.classes_)} classes among {len(labels)} rows; a probe distinguishes 2")
        return states, codes.astype(np.float64)


class RidgeProbe(_Regressor):
    """Ridge regression: least squares with the penalty `alpha` ‖w‖², as scikit-learn's `Ridge`.

    Args:
        alpha: Strength of the penalty.
        standardise: Divide the features by the standard deviation of the training rows; `coef_` is in their own units all the same.

    Raises:
        InputError: By `fit`, for shapes that do not fit and for values that are not finite.

    Example:
        fitted = RidgeProbe(10.0, standardise=True).fit(states, lengths)  # states (row, d_model), lengths (row,)
        probe = LinearProbe.of(fitted, site=Site("resid_post", 4), model=model.fingerprint)
        probe.save("length.safetensors")
    """

    def __init__(self, alpha: float = 1.0, *, standardise: bool = False) -> None:
        self.alpha = alpha
        self.standardise = standardise

    def fit(self, features: ArrayLike, targets: ArrayLike) -> Self:
        states, values = _checked(features, targets)
        path = ridge_path(_problem(states), _tensor(values), [self.alpha], standardise=self.standardise)
        self.coef_, self.intercept_ = _only(path)
        return self


class LogisticProbe(_Classifier):
    """Logistic regression with an L2 penalty, as scikit-learn's `LogisticRegression`.

    Args:
        C: Inverse strength of the penalty: smaller is stronger.
        standardise: Divide the features by the standard deviation of the training rows; `coef_` is in their own units all the same.

    Raises:
        InputError: By `fit`, for shapes that do not fit, values that are not finite, or another number of classes than 2.

    Example:
        fitted = LogisticProbe(0.1, standardise=True).fit(states, refused)  # states (row, d_model), refused (row,)
        probe = LinearProbe.of(fitted, site=Site("resid_post", 4), model=model.fingerprint)
        print(probe.probabilities(states))
    """

    def __init__(self, C: float = 1.0, *, standardise: bool = False) -> None:
        self.C = C
        self.standardise = standardise

    def fit(self, features: ArrayLike, targets: ArrayLike) -> Self:
        states, codes = self._encoded(features, targets)
        if not self.C > 0:
            raise InputError(f"C is {self.C}; it has to be above 0, and smaller for a stronger penalty")
        path = logistic_path(_problem(states), _tensor(codes), [1 / self.C], standardise=self.standardise)
        self.coef_, self.intercept_ = _only(path)
        return self


class LassoProbe(_Regressor):
    """Lasso, as scikit-learn's: the probe of On Reasoning Strength Planning (arXiv 2506.08390, α = 10 on raw token counts)."""

    def __init__(self, alpha: float = 1.0, *, max_iter: int = 10_000) -> None:
        self.alpha = alpha
        self.max_iter = max_iter

    def fit(self, features: ArrayLike, targets: ArrayLike) -> Self:
        states, values = _checked(features, targets)
        lasso = Lasso(alpha=self.alpha, max_iter=self.max_iter).fit(states, values)
        self.coef_, self.intercept_ = np.asarray(lasso.coef_), float(lasso.intercept_)
        return self


class MeanDifferenceProbe(_Classifier):
    """Difference of means: θ = mean of the positive class − mean of the other, and 0 half-way between the means.

    Departure: directions by difference in means have no threshold. This one lies at equal odds of both classes if they have
    the same spherical shape. Its logits are in squared units of the activations and are not calibrated.
    """

    def fit(self, features: ArrayLike, targets: ArrayLike) -> Self:
        states, codes = self._encoded(features, targets)
        negative, positive = (states[codes == code].mean(axis=0) for code in (0, 1))
        self.coef_ = positive - negative
        self.intercept_ = -float(self.coef_ @ (positive + negative) / 2)
        return self


class MassMeanProbe(_Classifier):
    """Mass-mean probe (Geometry of Truth, arXiv 2310.06824, section 5.1): Σ⁺θ with `covariance`, θ without it.

    θ is the difference of the class means, Σ the covariance pooled within the classes (divided by the number of rows), Σ⁺ its
    pseudo-inverse without eigenvalues up to `atol`. With Σ the logits are those of two Gaussians with the same covariance.
    Departures: (1) The threshold is half-way between the class means; the paper's code has none and needs centred data.
    (2) Σ⁺ comes from a singular value decomposition of the rows, which gives the same numbers without a d_model × d_model matrix.
    As in the paper's code `atol` is absolute, so with tiny activations nothing is left, which is an error here.
    """

    def __init__(self, covariance: bool = True, *, atol: float = 1e-3) -> None:
        self.covariance = covariance
        self.atol = atol

    def fit(self, features: ArrayLike, targets: ArrayLike) -> Self:
        states, codes = self._encoded(features, targets)
        means = np.stack([states[codes == code].mean(axis=0) for code in (0, 1)])
        self.coef_ = means[1] - means[0]
        if self.covariance:
            self.coef_ = _whitened(self.coef_, states - means[codes.astype(int)], self.atol)
        self.intercept_ = -float(self.coef_ @ means.mean(axis=0))
        return self


def _whitened(direction: Values, within: Values, atol: float) -> Values:
    """Σ⁺ `direction`, with Σ the covariance of `within` (row, d_model), whose mean is 0."""
    _, scales, axes = np.linalg.svd(within, full_matrices=False)
    variances = scales**2 / len(within)
    if not (kept := variances > atol).any():
        raise InputError(
            f"no variance within the classes is above atol = {atol:g} (the largest is {variances.max():g}); "
            "give each class more rows, scale the activations or lower atol"
        )
    return np.asarray((axes[kept] @ direction / variances[kept]) @ axes[kept])


def _checked(features: ArrayLike, targets: ArrayLike) -> tuple[Values, NDArray[Any]]:
    states, values = np.asarray(features, dtype=np.float64), np.asarray(targets)
    if states.ndim != 2 or values.shape != states.shape[:1] or len(values) < 2:
        raise InputError(
            f"features of shape {states.shape} and targets of shape {values.shape}; give (row, d_model) and (row,), 2 rows at least"
        )
    if not np.isfinite(states).all():
        raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError("a target is NaN or infinite; leave its row out")
    return states, values


def _problem(states: Values) -> torch.Tensor:
    return _tensor(states)[None]


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))


def _only(path: LinearPath) -> tuple[Values, float]:
    return path.coef[0, 0].numpy(), float(path.intercept[0, 0])
