"""Newton's method for many logistic regressions at once, between the rows or between the features, whichever are fewer."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from reasonscope.data.errors import InputError

MAX_NEWTON_STEPS = 200
# Newton's error behind a step that moves no logit by more than this is of the order of its square.
LOGIT_TOLERANCE = 1e-5


class Space(Protocol):
    """Where Newton's steps are solved. Logits are `values(θ) + b`, the penalty is λ/2 θ·`metric(θ, values(θ))`."""

    def values(self, theta: Tensor) -> Tensor: ...
    def metric(self, theta: Tensor, values: Tensor) -> Tensor: ...
    def step(self, theta: Tensor, errors: Tensor, curvature: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's change of θ (problem, k) and b (problem,): `errors` are target − probability, both weighted (problem, m)."""

    def only(self, problems: Tensor) -> "Space": ...

    @property
    def start(self) -> Tensor:
        """θ = 0 for every problem."""


@dataclass(frozen=True)
class RowSpace:
    """w = Σ θ_i x_i over the training rows; `gram` (problem, m, m)."""

    gram: Tensor

    def values(self, theta: Tensor) -> Tensor:
        return (self.gram @ theta[..., None])[..., 0]

    def metric(self, theta: Tensor, values: Tensor) -> Tensor:
        return values

    def step(self, theta: Tensor, errors: Tensor, curvature: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        # (λ + W K) Δθ + W Δb = errors − λθ with Σ(θ + Δθ) = 0, symmetrised as in Rasmussen & Williams (2006), algorithm 3.1.
        root = curvature.sqrt()
        factor = torch.linalg.cholesky(_ridged(root[..., None] * self.gram * root[:, None], penalty))
        right = torch.stack([errors - penalty * theta, curvature], dim=-1)
        inner = torch.cholesky_solve(root[..., None] * (self.gram @ right), factor)
        moved, slid = ((right - root[..., None] * inner) / penalty).unbind(-1)
        change = (theta + moved).sum(-1) / slid.sum(-1)
        return moved - change[:, None] * slid, change

    def only(self, problems: Tensor) -> "RowSpace":
        return self if len(problems) == len(self.gram) else RowSpace(self.gram[problems])

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.gram[..., 0])


@dataclass(frozen=True)
class ColumnSpace:
    """w = θ; `features` (problem, m, d)."""

    features: Tensor

    def values(self, theta: Tensor) -> Tensor:
        return (self.features @ theta[..., None])[..., 0]

    def metric(self, theta: Tensor, values: Tensor) -> Tensor:
        return theta

    def step(self, theta: Tensor, errors: Tensor, curvature: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        weighted = curvature[..., None] * self.features
        hessian = _ridged(self.features.mT @ weighted, penalty)
        right = torch.stack([(errors[:, None] @ self.features)[:, 0] - penalty * theta, weighted.sum(1)], dim=-1)
        moved, slid = torch.cholesky_solve(right, torch.linalg.cholesky(hessian)).unbind(-1)
        across = weighted.sum(1)
        change = (errors.sum(-1) - (across * moved).sum(-1)) / (curvature.sum(-1) - (across * slid).sum(-1))
        return moved - change[:, None] * slid, change

    def only(self, problems: Tensor) -> "ColumnSpace":
        return self if len(problems) == len(self.features) else ColumnSpace(self.features[problems])

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.features[:, 0])


def _ridged(matrices: Tensor, penalty: Tensor) -> Tensor:
    matrices.diagonal(dim1=-2, dim2=-1).add_(penalty)
    return matrices


def newton_path(space: Space, targets: Tensor, weight: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """θ (problem, penalty, k) and b (problem, penalty) of `targets` 0 and 1 (problem, m); rows of `weight` 0 do not count."""
    theta = space.start
    intercept = targets.new_zeros(len(targets))
    thetas, intercepts = [theta] * len(penalties), [intercept] * len(penalties)
    for i in penalties.argsort(descending=True).tolist():
        theta, intercept = _newton(space, targets, weight, penalties[i], theta, intercept)
        thetas[i], intercepts[i] = theta, intercept
    return torch.stack(thetas, dim=1), torch.stack(intercepts, dim=1)


def _newton(
    space: Space, targets: Tensor, weight: Tensor, penalty: Tensor, theta: Tensor, intercept: Tensor
) -> tuple[Tensor, Tensor]:
    """Newton's method from (θ, b) until no problem's logits move; a problem that has converged is left alone."""
    theta, intercept = theta.clone(), intercept.clone()
    active = torch.arange(len(theta), device=theta.device)
    for _ in range(MAX_NEWTON_STEPS):
        here, y, w = space.only(active), targets[active], weight[active]
        values = here.values(theta[active])
        logits = values + intercept[active, None]
        probabilities = torch.sigmoid(logits)
        errors = w * (y - probabilities)
        moved, change = here.step(theta[active], errors, w * probabilities * (1 - probabilities), penalty)
        moved_values = here.values(moved)
        quadratic = _Quadratic.of(here, penalty, theta[active], values, moved, moved_values)
        size = _step_size(logits, moved_values + change[:, None], y, w, quadratic)
        theta[active] += size[:, None] * moved
        intercept[active] += size * change
        largest = (w * (moved_values + change[:, None]).abs()).amax(-1)
        active = active[(largest > LOGIT_TOLERANCE) | (size < 1)]
        if not len(active):
            return theta, intercept
    raise InputError(
        f"{len(active)} logistic fits did not converge in {MAX_NEWTON_STEPS} Newton steps at penalty {float(penalty):g}; "
        "use a stronger penalty or standardise the features"
    )


@dataclass(frozen=True, kw_only=True)
class _Quadratic:
    """The penalty term along a step: linear · t + square · t² (problem,)."""

    linear: Tensor
    square: Tensor

    @classmethod
    def of(
        cls, space: Space, penalty: Tensor, theta: Tensor, values: Tensor, moved: Tensor, moved_values: Tensor
    ) -> "_Quadratic":
        metric = space.metric(moved, moved_values)
        return cls(
            linear=penalty * (theta * metric).sum(-1),
            square=penalty / 2 * (moved * metric).sum(-1),
        )


def _step_size(logits: Tensor, moved: Tensor, targets: Tensor, weight: Tensor, quadratic: _Quadratic) -> Tensor:
    """The longest of 1, 1/2, 1/4, … that lowers the loss as Armijo asks (problem,); all are tried at once."""
    sizes = 0.5 ** torch.arange(30, dtype=torch.float64, device=logits.device)
    along = logits[:, None] + sizes[:, None] * moved[:, None]
    start = (weight * (softplus(logits) - targets * logits)).sum(-1)
    losses = (weight[:, None] * (softplus(along) - targets[:, None] * along)).sum(-1)
    losses = losses + sizes * quadratic.linear[:, None] + sizes**2 * quadratic.square[:, None]
    slope = quadratic.linear - (weight * (targets - torch.sigmoid(logits)) * moved).sum(-1)
    noise = 1e-12 * (1 + start.abs())  # close to the minimum the loss differs by rounding only
    good = losses <= (start + noise)[:, None] + 1e-4 * sizes * slope[:, None]
    return sizes[good.to(torch.int8).argmax(-1)]
