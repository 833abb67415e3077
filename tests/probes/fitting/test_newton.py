"""Newton's path of penalties ends where the loss is least, in both spaces, and factors few matrices on its way."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from reasonscope.data.errors import InputError
from reasonscope.probes.fitting import newton
from reasonscope.probes.fitting.newton import ColumnSpace, RowSpace, newton_path

PENALTIES = (0.03, 100.0, 0.3, 3.0)  # in no order


def drawn(rows=(30, 22), width=8, noise=1.0):
    """Training sets of different sizes, filled up with rows of 0: features, targets and weights."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((len(rows), max(rows), width)))
    weight = (torch.arange(max(rows))[None] < torch.tensor(rows)[:, None]).double()
    features = features * weight[..., None]
    score = features.sum(-1) + 0.7 + noise * torch.from_numpy(rng.standard_normal(features.shape[:2]))
    return features, (score > 0).double() * weight, weight


def space_of(kind, features, weight):
    return ColumnSpace(features, weight) if kind == "columns" else RowSpace(features @ features.mT, weight)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_every_penalty_has_the_coefficients_of_scikit_learn(kind):
    features, targets, weight = drawn()
    theta, intercept = newton_path(space_of(kind, features, weight), targets, torch.tensor(PENALTIES))
    assert intercept.shape == (2, len(PENALTIES))
    coef = theta if kind == "columns" else theta @ features
    for member, rows in enumerate(weight.sum(-1).int().tolist()):
        states, labels = features[member, :rows].numpy(), targets[member, :rows].numpy()
        for i, penalty in enumerate(PENALTIES):
            known = LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-13).fit(states, labels)
            np.testing.assert_allclose(coef[member, i], known.coef_[0], rtol=1e-6, atol=1e-8)
            assert intercept[member, i].item() == pytest.approx(known.intercept_[0], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_factor_is_used_again_and_penalties_start_where_the_last_led(kind, monkeypatch):
    factored, steps = [], []
    for cls in (RowSpace, ColumnSpace):
        monkeypatch.setattr(cls, "newton", counted(cls.newton, factored, steps))
    features, targets, weight = drawn((60, 50))
    ten = torch.logspace(2, -1, 10)
    newton_path(space_of(kind, features, weight), targets, ten)
    assert 10 <= len(factored) <= 12 and len(steps) <= 80


def counted(solve, factored, steps):
    def newton(self, *given):
        factored.append(1)
        step = solve(self, *given)

        def one(*at):
            steps.append(1)
            return step(*at)

        return one

    return newton


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_separable_classes_end_where_the_gradient_is_zero(kind):
    """Full steps overshoot here, so that steps are halved."""
    features, targets, weight = drawn(noise=0.0)
    penalties = torch.tensor([1e-6, 1e-2])
    theta, intercept = newton_path(space_of(kind, 30 * features, weight), targets, penalties)
    coef = theta if kind == "columns" else theta @ (30 * features)
    for i, penalty in enumerate(penalties):
        logits = (coef[:, i, None] @ (30 * features).mT)[:, 0] + intercept[:, i, None]
        errors = (targets - logits.sigmoid()) * weight
        np.testing.assert_allclose(errors.sum(-1), 0, atol=1e-8)
        np.testing.assert_allclose(penalty * coef[:, i], (errors[:, None] @ (30 * features))[:, 0], atol=1e-6)


def test_a_fit_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(newton, "MAX_STEPS", 2)
    features, targets, weight = drawn()
    with pytest.raises(InputError, match="did not converge in 2 steps at penalty 100"):
        newton_path(space_of("columns", features, weight), targets, torch.tensor(PENALTIES))


def fit(value):
    """A point of a path of one member, all of whose numbers are `value`."""
    one = torch.full((1, 1), value, dtype=torch.float64)
    return newton._Fit(theta=one, intercept=one, values=one)


def test_a_penalty_starts_from_the_last_fit_and_where_a_line_through_the_last_two_leads():
    penalties = torch.tensor([100.0, 10.0, 1.0, 0.001])
    first, second, third = fit(1.0), fit(3.0), fit(4.0)
    assert newton._starts([], penalties) == []
    assert newton._starts([first], penalties) == [first]
    last, ahead = newton._starts([first, second], penalties)
    assert last is second and ahead.theta.item() == pytest.approx(5.0)  # 1, 3, 5 for 100, 10, 1
    _, farther = newton._starts([first, second, third], penalties)
    assert farther.theta.item() == pytest.approx(7.0)  # three decades further by one a decade


def test_a_step_that_raises_the_loss_is_halved_until_it_does_not():
    features, targets, weight = drawn()
    objective = newton._Objective(
        space=space_of("columns", features, weight), targets=targets, penalty=torch.tensor(1.0)
    )
    zero = newton._Fit(theta=features.new_zeros(2, 8), intercept=features.new_zeros(2, 1), values=weight * 0)
    theta = ((targets - weight / 2)[:, None] @ features)[:, 0] * 20
    step = newton._Fit(theta=theta, intercept=zero.intercept, values=objective.space.values(theta))
    loss, going = objective.at(zero), torch.tensor([[True], [False]])
    size, ahead, lower = objective._lower(zero, step, loss, going)
    assert 0 < size[0] < 1 and size[1] == 0 and torch.equal(ahead.theta[1], zero.theta[1])
    assert lower[0] <= loss[0] < objective.at(zero.plus(2 * size, step))[0]
