"""The divergence of next-token distributions, by hand, in torch's own form and at its edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonscope.probes.evaluation.divergence import kl_divergence


@given(st.integers(0, 10**6), st.floats(0.3, 2))
@settings(max_examples=15, deadline=None)
def test_it_is_the_plain_sum_and_excluded_tokens_are_infinite(seed, temperature):
    torch.manual_seed(seed)
    p, q = torch.randn(2, 3, 11, dtype=torch.float64) * 3
    left, right = ((x / temperature).log_softmax(-1) for x in (p, q))
    plain = (left.exp() * (left - right)).sum(-1)
    np.testing.assert_allclose(kl_divergence(left, right), plain, atol=1e-10)
    torchs = torch.nn.functional.kl_div(right, left, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(kl_divergence(left, right), torchs, atol=1e-10)
    q[0, 3] = p[1, 2] = -torch.inf
    found = kl_divergence(*((x / temperature).log_softmax(-1) for x in (p, q)))
    assert torch.isinf(found[0]) and torch.isfinite(found[1:]).all()


def test_by_hand_in_the_dtype_given():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    found = kl_divergence(p.log(), q.log())
    assert found.dtype == torch.float32 and float(found) == pytest.approx(0.5 * np.log(2))


def test_the_gradient_is_that_of_cross_entropy():
    torch.manual_seed(0)
    target, logits = torch.randn(7).log_softmax(-1), torch.randn(7, requires_grad=True)
    kl_divergence(target, logits.log_softmax(-1)).backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target.exp())
