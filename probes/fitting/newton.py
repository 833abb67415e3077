"""Newton's method along a path of penalties for logistic regression, in the space of the rows or of the features, whichever are fewer.

Two things save most of the factorisations: each penalty starts where a line through the last two fits leads, and a factor is used again as
long as the steps with it shrink fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reasonscope.data.errors import InputError
from reasonscope.probes.fitting.cholesky import factored, ridged

MAX_STEPS = 500
LOGIT_TOLERANCE = 1e-9
# A step with an old factor costs about a tenth of a step with a new one.
SLOWEST_RATE = 0.5
# This keeps the square roots of the curvature invertible; the next step corrects a factor that is slightly wrong.
LEAST_CURVATURE = 1e-10

NewtonStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Space(Protocol):
    """The space in which Newton's steps are solved: logits are `values(θ) + b`, the penalty is λ/2 `square(θ, values(θ))`."""

    def values(self, theta: Tensor) -> Tensor: ...
    def square(self, theta: Tensor, values: Tensor) -> Tensor: ...
    def newton(self, curvature: Tensor, penalty: Tensor) -> NewtonStep:
        """Newton's step for the `curvature` p (1 − p) (m,): from θ (k,) and the errors target − p (m,) to the change of θ and of b ()."""

    @property
    def start(self) -> Tensor:
        """θ = 0."""


@dataclass(frozen=True)
class RowSpace:
    """w = Σ θ_i x_i over the training rows; `gram` (m, m)."""

    gram: Tensor

    def values(self, theta: Tensor) -> Tensor:
        return self.gram @ theta

    def square(self, theta: Tensor, values: Tensor) -> Tensor:
        return theta @ values

    def newton(self, curvature: Tensor, penalty: Tensor) -> NewtonStep:
        # (λ + W K) Δθ + W Δb = errors − λθ with Σ(θ + Δθ) = 0, symmetrised as in Rasmussen & Williams (2006), algorithm 3.1.
        root = curvature.clamp(min=LEAST_CURVATURE).sqrt()
        scaled = (self.gram * (root / penalty)[:, None]).mul_(root)
        solve = factored(ridged(scaled, 1.0))
        slid = root * solve(root) / penalty

        def step(theta: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
            moved = root * solve((errors / penalty - theta) / root)
            change = (theta + moved).sum() / slid.sum()
            return moved - change * slid, change

        return step

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.gram[0])


@dataclass(frozen=True)
class ColumnSpace:
    """w = θ; `features` (m, d)."""

    features: Tensor

    def values(self, theta: Tensor) -> Tensor:
        return self.features @ theta

    def square(self, theta: Tensor, values: Tensor) -> Tensor:
        return theta @ theta

    def newton(self, curvature: Tensor, penalty: Tensor) -> NewtonStep:
        weighted = curvature[:, None] * self.features
        across = weighted.sum(0)
        solve = factored(ridged(self.features.mT @ weighted, penalty))
        slid = solve(across)

        def step(theta: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
            moved = solve(errors @ self.features - penalty * theta)
            change = (errors.sum() - across @ moved) / (curvature.sum() - across @ slid)
            return moved - change * slid, change

        return step

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.features[0])


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """A point of the path: `theta` (k,), `intercept` () and `values` (m,), which are values(θ)."""

    theta: Tensor
    intercept: Tensor
    values: Tensor

    def plus(self, size: float, step: "_Fit") -> "_Fit":
        return _Fit(
            theta=self.theta + size * step.theta,
            intercept=self.intercept + size * step.intercept,
            values=self.values + size * step.values,
        )

    @property
    def logits(self) -> Tensor:
        return self.values + self.intercept


def newton_path(space: Space, targets: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """Fit `targets` 0 and 1 (m,) at every penalty: θ (penalty, k) and b (penalty,)."""
    zero = _Fit(theta=space.start, intercept=targets.new_zeros(()), values=torch.zeros_like(targets))
    order = penalties.argsort(descending=True).tolist()
    passed: list[_Fit] = []
    for i in order:
        objective = _Objective(space=space, targets=targets, penalty=penalties[i])
        passed.append(objective.least_from(_starts(passed, penalties[order]) or [zero]))
    fits = [fit for _, fit in sorted(zip(order, passed, strict=True), key=lambda pair: pair[0])]
    return torch.stack([fit.theta for fit in fits]), torch.stack([fit.intercept for fit in fits])


def _starts(passed: list[_Fit], penalties: Tensor) -> list[_Fit]:
    """The last fit, and where a line in log λ leads from the last two, since logits grow with log λ if there is little noise."""
    if len(passed) < 2:
        return passed
    before, last = passed[-2:]
    older, old, new = penalties[len(passed) - 2 : len(passed) + 1].log().tolist()
    ahead = 1 + (new - old) / (old - older) if old < older else 1.0
    return [last, before.plus(ahead, last.plus(-1, before))]


@dataclass(frozen=True, kw_only=True)
class _Objective:
    """The loss to minimise: Σ log-loss + penalty/2 ‖w‖²."""

    space: Space
    targets: Tensor
    penalty: Tensor

    def at(self, fit: _Fit) -> float:
        logits = fit.logits
        loss = -logsigmoid(-logits).sum() - self.targets @ logits
        return float(loss + self.penalty / 2 * self.space.square(fit.theta, fit.values))

    def least_from(self, starts: list[_Fit]) -> _Fit:
        """Newton's method from the best of `starts` until the error left in any logit is below LOGIT_TOLERANCE."""
        loss, fit = min(((self.at(start), start) for start in starts), key=lambda pair: pair[0])
        newton, before = None, 0.0
        for _ in range(MAX_STEPS):
            probabilities = fit.logits.sigmoid()
            if fresh := newton is None:
                newton = self.space.newton(probabilities * (1 - probabilities), self.penalty)
            theta, intercept = newton(fit.theta, self.targets - probabilities)
            step = _Fit(theta=theta, intercept=intercept, values=self.space.values(theta))
            size, fit, loss = self._lower(fit, step, loss)
            largest = float(step.logits.abs().max())
            # The error after a Newton step is of the order of the step squared; with an old factor, steps shrink at a steady rate.
            rate = largest if fresh else largest / before
            if size == 1 and rate < 1 and rate * largest < LOGIT_TOLERANCE:
                return fit
            if size < 1 or (not fresh and rate > SLOWEST_RATE):
                newton = None
            before = largest
        raise InputError(
            f"a logistic fit did not converge in {MAX_STEPS} steps at penalty {float(self.penalty):g}; "
            "use a stronger penalty or standardise the features"
        )

    def _lower(self, fit: _Fit, step: _Fit, loss: float) -> tuple[float, _Fit, float]:
        """The largest of 1, 1/2, 1/4, … times the step that does not raise the loss, with the fit and the loss after it."""
        noise = 1e-12 * (1 + abs(loss))  # close to the minimum the loss changes only by rounding
        size = 1.0
        while (lower := self.at(ahead := fit.plus(size, step))) > loss + noise and size > 1e-9:
            size /= 2
        return size, ahead, lower
