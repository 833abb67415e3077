"""Next-token distributions from hidden states, a chunk of the vocabulary at a time: a token × vocabulary array is
never complete."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.probes.models.model import Model

_CHUNK = 8192  # entries of the vocabulary at a time
ROWS = 256  # tokens at a time


@dataclass(frozen=True, kw_only=True)
class Unembedding:
    """From the final hidden state, after the last norm, to logits: `weight` (vocab, d_model), `bias` (vocab,), Gemma
    2's `softcap`."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: Model) -> "Unembedding":
        """That of `model`. Raises InputError if accelerate has offloaded it."""
        module = model.hf.get_submodule(model.layout.unembedding)
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise InputError("the unembedding is offloaded, so its rows cannot be read; load the model onto one device")
        softcap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
        return cls(weight=weight, bias=bias, softcap=softcap)

    def logits(self, hidden: Tensor, entries: slice = slice(None)) -> Tensor:
        """Float32 logits (…, entry) of `hidden` (…, d_model)."""
        logits = hidden.to(self.weight) @ self.weight[entries].T
        logits = (logits if self.bias is None else logits + self.bias[entries]).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chunks(self, size: int = _CHUNK) -> Iterator[slice]:
        """Slices of the vocabulary with `size` entries."""
        return (slice(start, start + size) for start in range(0, len(self.weight), size))


def kl_from_hidden(
    unembedding: Unembedding,
    hidden: Tensor,
    other: Tensor,
    *,
    temperature: float,
    chunk: int = _CHUNK,
    rows: int = ROWS,
) -> Tensor:
    """KL(P‖Q) in nats of next-token distributions at `temperature`: P from `hidden` (token, d_model), Q from `other`
    (…, token, d_model).

    Returns (…, token), the same as `kl_divergence` of the whole arrays. One pass over the vocabulary: with running
    maxima m, Σ exp(p − m)(p − q) / Σ exp(p − m) − log Z_P + log Z_Q. Raises InputError for a temperature that is not
    above 0.
    """
    if not temperature > 0:
        raise InputError(f"temperature {temperature} must be above 0: greedy decoding has no distribution to compare")
    parts = []
    for start in range(0, hidden.shape[0], rows):
        p, q = hidden[start : start + rows], other[..., start : start + rows, :]
        greatest = torch.full(p.shape[:-1], -torch.inf, device=p.device)
        mass, weighted = torch.zeros_like(greatest), torch.zeros(q.shape[:-1], device=p.device)
        log_q = torch.full_like(weighted, -torch.inf)
        for entries in unembedding.chunks(chunk):
            own, their = (unembedding.logits(x, entries).div_(temperature) for x in (p, q))
            before, greatest = greatest, torch.maximum(greatest, own.amax(dim=-1))
            kept, weights = (before - greatest).exp(), (own - greatest[..., None]).exp()
            mass = mass * kept + weights.sum(dim=-1)
            log_q = torch.logaddexp(log_q, their.logsumexp(dim=-1))
            weighted = weighted * kept + (own - their).mul_(weights).sum(dim=-1)
        parts.append(weighted / mass - greatest - mass.log() + log_q)
    return torch.cat(parts, dim=-1).clamp(min=0)  # rounding can make a KL of 0 negative


def token_scores(
    unembedding: Unembedding, hidden: Tensor, ids: Tensor, *, temperature: float, chunk: int = _CHUNK, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    """Log-probability of the tokens `ids` (token,) and entropy (token,), in nats, after the states `hidden` (token, d_model).

    Both are of softmax(logits / temperature), at temperature 1 if it is 0, as `generate` keeps them: with logits l, log Z = log Σ exp l,
    log-probability l − log Z, entropy log Z − Σ l exp(l − log Z). One pass over the vocabulary.
    """
    logprobs, entropies = [], []
    for start in range(0, len(ids), rows):
        states, wanted = hidden[start : start + rows], ids[start : start + rows]
        log_z = torch.full(wanted.shape, -torch.inf, device=states.device)
        mean, chosen = torch.zeros_like(log_z), torch.zeros_like(log_z)
        for entries in unembedding.chunks(chunk):
            logits = unembedding.logits(states, entries).div_(temperature or 1.0)
            before, log_z = log_z, torch.logaddexp(log_z, logits.logsumexp(dim=-1))
            mean = mean * (before - log_z).exp() + ((logits - log_z[:, None]).exp() * logits).sum(dim=-1)
            inside = (wanted >= entries.start) & (wanted < entries.start + logits.shape[-1])
            column = (wanted - entries.start).clamp(0, logits.shape[-1] - 1)
            chosen = torch.where(inside, logits.gather(-1, column[:, None])[:, 0], chosen)
        logprobs.append(chosen - log_z)
        entropies.append((log_z - mean).clamp(min=0))  # rounding can make an entropy of 0 negative
    return torch.cat(logprobs), torch.cat(entropies)
