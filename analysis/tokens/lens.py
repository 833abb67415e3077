"""Logit lens: which token the residual stream would predict after each block, through the model's own last norm and
unembedding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.padding import check_sequence
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.unembedding import Unembedding


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitLens:
    """The predictions after each block, all (layer, token); the last layer is the model itself.

    Attributes:
        token: The likeliest token.
        logprob: Its log-probability in nats.
        final: Log-probability in nats of the token that the last layer prefers.
        entropy: Entropy in nats.
    """

    token: NDArray[np.int64]
    logprob: NDArray[np.float32]
    final: NDArray[np.float32]
    entropy: NDArray[np.float32]


def logit_lens(model: Model, ids: Sequence[int], *, rows: int = 256) -> LogitLens:
    """Read the residual stream after each block through the last norm and the unembedding (nostalgebraist 2020).

    Args:
        model: A native model.
        ids: (token,) ids to read, at temperature 1.
        rows: Tokens per pass through the unembedding.

    Returns:
        The likeliest token of each layer, its log-probability, that of the model's final choice, and the entropy, all
        (layer, token).

    Raises:
        InputError: If ids cannot be fed.
        ContextError: If they exceed the model's context.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        lens = rs.analysis.logit_lens(model, trace.token_ids)
        model.tokenizer.decode(lens.token[:, -1])
    """
    check_sequence(model, ids)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    fed = torch.tensor([list(ids)], device=model.device)
    seen = model.backend.forward(fed, mask=torch.ones_like(fed), last_logits_only=True, read=sites).activations
    norm, unembedding = model.final_norm, Unembedding.of(model)
    shape = len(sites), len(ids)
    tokens = np.zeros(shape, dtype=np.int64)
    logprobs, finals, entropies = (np.zeros(shape, dtype=np.float32) for _ in range(3))
    for start in range(0, len(ids), rows):
        at = slice(start, start + rows)
        with torch.no_grad():
            says = [unembedding.logits(norm(seen[site][0, at])).log_softmax(dim=-1) for site in sites]
        last = says[-1].argmax(dim=-1, keepdim=True)
        for layer, one in enumerate(says):
            best = one.max(dim=-1)
            tokens[layer, at], logprobs[layer, at] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            finals[layer, at] = one.gather(1, last)[:, 0].cpu().numpy()
            entropies[layer, at] = -(one.exp() * one).sum(dim=-1).cpu().numpy()
    return LogitLens(token=tokens, logprob=logprobs, final=finals, entropy=entropies)
