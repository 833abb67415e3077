"""Newton's method along a path of penalties for logistic regressions, in the space of the rows or of the features, whichever are fewer.

Two things save most of the factorisations: each penalty starts where a line through the last two fits leads, and a factor is used again as
long as the steps with it shrink fast. Small regressions, such as the folds of a probe, are fitted as a batch, because calls of torch would
take longer than their sums. Each has its own step size, its own age of the factor and its own end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reasonscope.data.errors import InputError
from reasonscope.probes.fitting.cholesky import Factors, ridged

MAX_STEPS = 500
_LOGIT_TOLERANCE = 1e-9
# A step with an old factor costs about a tenth of a step with a new one.
_SLOWEST_RATE = 0.5
# This keeps the square roots of the curvature invertible; the next step corrects a factor that is slightly wrong.
_LEAST_CURVATURE = 1e-10

NewtonStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Space(Protocol):
    """The space in which Newton's steps of a batch are solved: logits are `values(θ) + b`, the penalty is λ/2 `square(θ, values(θ))`.

    Training sets with fewer rows than the largest are filled up with rows of 0, which `weight` (batch, m) leaves out: it is 1 or 0.
    """

    @property
    def weight(self) -> Tensor: ...
    @property
    def start(self) -> Tensor:
        """θ = 0, (batch, k)."""

    def values(self, theta: Tensor) -> Tensor: ...
    def square(self, theta: Tensor, values: Tensor) -> Tensor: ...
    def newton(self, curvature: Tensor, penalty: Tensor, factors: Factors, renewed: Tensor | slice) -> NewtonStep:
        """Newton's step for the `curvature` p (1 − p) (batch, m), which is a new one for `renewed` members and an old one for others.

        The step leads from θ (batch, k) and the errors target − p (batch, m) to the change of θ and of b (batch, 1).
        """


@dataclass(frozen=True)
class RowSpace:
    """w = Σ θ_i x_i over the training rows; `gram` (batch, m, m), `weight` (batch, m)."""

    gram: Tensor
    weight: Tensor

    def values(self, theta: Tensor) -> Tensor:
        return _product(theta, self.gram)

    def square(self, theta: Tensor, values: Tensor) -> Tensor:
        return _inner(theta, values)

    def newton(self, curvature: Tensor, penalty: Tensor, factors: Factors, renewed: Tensor | slice) -> NewtonStep:
        # (λ + W K) Δθ + W Δb = errors − λθ with Σ(θ + Δθ) = 0, symmetrised as in Rasmussen & Williams (2006), algorithm 3.1.
        root = curvature.clamp(min=_LEAST_CURVATURE).sqrt()
        new = root[renewed]
        scaled = (self.gram[renewed] * (new / penalty)[..., None]).mul_(new[:, None])
        factors.renew(ridged(scaled, 1.0), renewed)
        slid = root * factors.solve(root * self.weight) / penalty

        def step(theta: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
            moved = root * factors.solve((errors / penalty - theta) / root)
            change = (theta + moved).sum(-1, keepdim=True) / slid.sum(-1, keepdim=True)
            return moved - change * slid, change

        return step

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.weight)


@dataclass(frozen=True)
class ColumnSpace:
    """w = θ; `features` (batch, m, d), `weight` (batch, m)."""

    features: Tensor
    weight: Tensor

    def values(self, theta: Tensor) -> Tensor:
        return _product(theta, self.features.mT)

    def square(self, theta: Tensor, values: Tensor) -> Tensor:
        return _inner(theta, theta)

    def newton(self, curvature: Tensor, penalty: Tensor, factors: Factors, renewed: Tensor | slice) -> NewtonStep:
        states, own = self.features[renewed], curvature[renewed]
        hessians = states.new_empty(len(states), states.shape[-1], states.shape[-1])
        for one in range(len(states)):  # because torch takes twice the time for a batch of large products
            torch.mm(states[one].mT, own[one][:, None] * states[one], out=hessians[one])
        factors.renew(ridged(hessians, penalty), renewed)
        across, whole = _product(curvature, self.features), curvature.sum(-1, keepdim=True)
        slid = factors.solve(across)

        def step(theta: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
            moved = factors.solve(_product(errors, self.features) - penalty * theta)
            change = (errors.sum(-1, keepdim=True) - _inner(across, moved)) / (whole - _inner(across, slid))
            return moved - change * slid, change

        return step

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.features[:, 0])


def _product(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Each of `vectors` (batch, k) times its matrix (batch, k, n), which takes torch a fifth of the time of the matrix times the vector."""
    return (vectors[:, None] @ matrices)[:, 0]


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """A point of each path: `theta` (batch, k), `intercept` (batch, 1) and `values` (batch, m), which are values(θ)."""

    theta: Tensor
    intercept: Tensor
    values: Tensor

    def plus(self, size: Tensor | float, step: Self) -> Self:
        return self._with(step, lambda here, change: here + size * change)

    def or_else(self, other: Self, chosen: Tensor) -> Self:
        """The members that are `chosen` (batch, 1) from here, the rest from `other`."""
        return self._with(other, lambda here, there: torch.where(chosen, here, there))

    def _with(self, other: Self, combined: Callable[[Tensor, Tensor], Tensor]) -> Self:
        return type(self)(
            theta=combined(self.theta, other.theta),
            intercept=combined(self.intercept, other.intercept),
            values=combined(self.values, other.values),
        )

    @property
    def logits(self) -> Tensor:
        return self.values + self.intercept


def newton_path(space: _Space, targets: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """Fit `targets` 0 and 1 (batch, m) at every penalty: θ (batch, penalty, k) and b (batch, penalty)."""
    zero = _Fit(theta=space.start, intercept=targets.new_zeros(len(targets), 1), values=torch.zeros_like(targets))
    order = penalties.argsort(descending=True).tolist()
    passed: list[_Fit] = []
    for i in order:
        objective = _Objective(space=space, targets=targets, penalty=penalties[i])
        passed.append(objective.least_from(_starts(passed, penalties[order]) or [zero]))
    fits = [fit for _, fit in sorted(zip(order, passed, strict=True), key=lambda pair: pair[0])]
    return torch.stack([fit.theta for fit in fits], dim=1), torch.cat([fit.intercept for fit in fits], dim=1)


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
    """The losses to minimise: Σ log-loss + penalty/2 ‖w‖²."""

    space: _Space
    targets: Tensor
    penalty: Tensor

    def at(self, fit: _Fit) -> Tensor:
        """The loss of each member, (batch, 1)."""
        logits = fit.logits
        loss = _inner(self.space.weight, -logsigmoid(-logits) - self.targets * logits)
        return loss + self.penalty / 2 * self.space.square(fit.theta, fit.values)

    def least_from(self, starts: list[_Fit]) -> _Fit:
        """Newton's method from the best of `starts` until the error left in any logit is below LOGIT_TOLERANCE."""
        weight, factors = self.space.weight, Factors()
        loss, fit = self._best(starts)
        curvature = torch.zeros_like(weight)
        before = torch.zeros_like(loss)
        going = old = torch.ones_like(loss, dtype=torch.bool)
        for _ in range(MAX_STEPS):
            probabilities = fit.logits.sigmoid()
            fresh = old
            if fresh.any():
                curvature = torch.where(fresh, probabilities * (1 - probabilities) * weight, curvature)
                newton = self.space.newton(curvature, self.penalty, factors, _members(fresh))
            theta, intercept = newton(fit.theta, (self.targets - probabilities) * weight)
            step = _Fit(theta=theta, intercept=intercept, values=self.space.values(theta))
            size, fit, loss = self._lower(fit, step, loss, going)
            largest = (step.logits * weight).abs().amax(-1, keepdim=True)
            # The error after a Newton step is of the order of the step squared; with an old factor, steps shrink at a steady rate.
            rate = torch.where(fresh, largest, largest / before)
            going = going & ~((size == 1) & (rate < 1) & (rate * largest < _LOGIT_TOLERANCE))
            if not going.any():
                return fit
            old = going & ((size < 1) | (~fresh & (rate > _SLOWEST_RATE)))
            before = largest
        raise InputError(
            f"a logistic fit did not converge in {MAX_STEPS} steps at penalty {float(self.penalty):g}; "
            "use a stronger penalty or standardise the features"
        )

    def _best(self, starts: list[_Fit]) -> tuple[Tensor, _Fit]:
        """The lowest loss of each member among `starts`, and the start that has it."""
        loss, fit = self.at(starts[0]), starts[0]
        for start in starts[1:]:
            other = self.at(start)
            fit, loss = fit.or_else(start, loss <= other), torch.minimum(loss, other)
        return loss, fit

    def _lower(self, fit: _Fit, step: _Fit, loss: Tensor, going: Tensor) -> tuple[Tensor, _Fit, Tensor]:
        """The largest of 1, 1/2, 1/4, … times the step that does not raise the loss, with the fit and the loss after it.

        It is 0 times the step for members that are not `going` any more.
        """
        bound = loss + 1e-12 * (1 + loss.abs())  # close to the minimum the loss changes only by rounding
        size = going.to(loss.dtype)
        while (higher := ((lower := self.at(ahead := fit.plus(size, step))) > bound) & (size > 1e-9)).any():
            size = torch.where(higher, size / 2, size)
        return size, ahead, lower


def _members(chosen: Tensor) -> Tensor | slice:
    """The indices of the `chosen` (batch, 1), or a slice of all, which copies nothing."""
    return slice(None) if chosen.all() else chosen[:, 0].nonzero()[:, 0]
