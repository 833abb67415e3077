"""How far one next-token distribution is from another."""

import torch
from torch import Tensor


def kl_divergence(logprobs: Tensor, other: Tensor) -> Tensor:
    """KL(P ‖ Q) in nats along the last axis, of log-probabilities P and Q (…, vocab): (…,), in their dtype.

    A token that P excludes adds nothing; the result is infinite if Q excludes one that P allows. Rounding may take a KL of 0 a little
    below it: it is not cut there, so that gradients through Q stay true.
    """
    mass = logprobs.exp()
    return torch.where(mass > 0, mass * (logprobs - other), 0.0).sum(dim=-1)
