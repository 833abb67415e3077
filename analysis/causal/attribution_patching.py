"""What would be predicted without each head, for all heads at once: attribution patching, checked on the heads that matter most.

Taking out every head in a pass of its own costs one pass per head and control: a thousand passes for a model of half a billion
parameters. To first order, the change is the product of the head's output and a gradient, and one backward pass gives all of them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import mean_band
from reasonscope.analysis.tokens.token_alternatives import nothing_written
from reasonscope.data.arrays import Values
from reasonscope.data.progress import tracked
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, gradients
from reasonscope.probes.generation.padding import check_sequence
from reasonscope.probes.models.model import Model

_MOST_OPERATIONS = 1e13  # of all passes together: some minutes on two processor cores


def head_attribution(model: Model, trace: Trace, sentences: Sequence[Sentence] = (), *, n_checked: int = 3) -> Result:
    """How much log-probability the written tokens would lose without each attention head, to first order.

    Args:
        model: The model.
        trace: The trace, with tokens.
        sentences: Its sentences, over which intervals are resampled (at least two).
        n_checked: The heads of largest effect that are also taken out for real, in a pass each.

    Returns:
        Axes (layer, head): nats per generated token, with the 95 % interval; above 0, the head supports the text. "Without" sets the
        head's `z` to 0 from the last prompt token on. `arrays["by_token"]` (layer, head, token) holds the shares of the tokens at which
        the head writes. The null moves `attn_out` in a random direction at each token, as far as the head's absence does; its 95 % band is
        exact up to the normal distribution of a sum over tokens. `numbers["checked"]` has estimate and exact loss of the strongest
        heads. Undefined, with the reason, for a trace without generated tokens.

    Raises:
        InputError: If the trace cannot be fed.
        ContextError: If it exceeds the model's context.
        SiteError: If the model lacks a site.

    Paper: attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348, eq. 1), with zero for the corrupted activation.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        result = rs.analysis.head_attribution(model, trace, rs.sentences(trace))
        result.values > result.null.high  # (layer, head)
    """
    common: dict[str, Any] = {
        "method": "head_attribution",
        "quantity": "log-probability lost without the head, to first order",
        "unit": "nats per token",
    }
    provenance = {"trace": trace.id, "checked": n_checked, **cut_provenance(sentences)}
    if reason := nothing_written(trace):
        return undefined(**common, reason=reason, provenance=provenance)
    passes = _Passes(model, trace)
    lost, spread = passes.first_order()  # (layer, head, token), (layer, head)
    values = lost.sum(axis=-1)
    strongest = np.argsort(-np.abs(values), axis=None)[:n_checked]
    heads = [(int(i) // model.n_heads, int(i) % model.n_heads) for i in strongest]
    ends = norm.ppf(0.975) * spread
    return Result(
        **common,
        axes=(Axis.of("layer", model.n_layers), Axis.of("head", model.n_heads)),
        values=values,
        reason=model.layout.without_heads,
        null=Band.of(-ends, ends, values.shape, "central 95 % of random directions, each token moved as far"),
        interval=mean_band(
            lost * lost.shape[-1], sentence_of_each(sentences, len(trace.token_ids))[trace.n_prompt_tokens :]
        ),
        arrays={"by_token": lost.astype(np.float32)},
        numbers={
            "tokens": lost.shape[-1],
            "checked": [
                {"head": f"{layer}.{head}", "estimate": float(values[layer, head]), "exact": passes.exact(layer, head)}
                for layer, head in tracked(heads, "taking out the strongest heads", "heads")
            ],
        },
        provenance=provenance,
    )


def heads_are_few(model: Model, trace: Trace) -> bool:
    """Whether `head_effects`, with a pass for each head and control, takes minutes rather than hours."""
    return (
        2.0 * model.hf.num_parameters() * len(trace.token_ids) * model.n_layers * model.n_heads * 6 < _MOST_OPERATIONS
    )


class _Passes:
    """Passes over the text of a trace, whose outcome is the mean log-probability of the written tokens."""

    def __init__(self, model: Model, trace: Trace) -> None:
        fed = trace.token_ids[:-1].tolist()
        check_sequence(model, fed)
        self.model, self.start = model, trace.n_prompt_tokens - 1
        self.ids = torch.tensor([fed], device=model.device)
        self.written = torch.as_tensor(trace.token_ids[trace.n_prompt_tokens :], device=model.device)[:, None]

    def first_order(self) -> tuple[Values, Values]:
        """What each head's output at each written token adds (layer, head, token), and the standard deviation of what a random output
        of the same length would add (layer, head)."""
        layers = self.model.layers_with_heads
        heads = [Site("z", layer) for layer in layers]
        sums = [Site("attn_out", layer) for layer in layers]
        shifts: dict[Site, Tensor] = {}
        writes = {site: _shifted(site, shifts) for site in (*heads, *sums)}
        with gradients(), _frozen(self.model):
            logits, seen = self._run(writes, heads)
            slopes = torch.autograd.grad(self._log_probability(logits), [shifts[site] for site in (*heads, *sums)])
        shape = self.model.n_layers, self.model.n_heads  # NaN for heads that a block has not
        lost = torch.full((*shape, len(self.written)), torch.nan, dtype=torch.float64)
        spread = torch.full(shape, torch.nan, dtype=torch.float64)
        for i, layer in enumerate(layers):
            z, slope = seen[heads[i]][0, self.start :].detach(), slopes[i][0, self.start :]
            lost[layer, : z.shape[1]] = (z * slope).sum(-1).T.double().cpu()
            across = slopes[len(layers) + i][0, self.start :]
            length = self._lengths(layer, z)  # (token, head)
            moved = (length * across.norm(dim=-1, keepdim=True)).square().sum(0).div(across.shape[-1]).sqrt()
            spread[layer, : z.shape[1]] = moved.double().cpu()
        return _array(lost), _array(spread)

    def exact(self, layer: int, head: int) -> float:
        """The loss when the head is taken out for real."""

        def without(z: Tensor, _: object) -> Tensor:
            changed = z.clone()
            changed[:, self.start :, head] = 0
            return changed

        plain, removed = self._run({}, ())[0], self._run({Site("z", layer): without}, ())[0]
        return float(self._log_probability(plain) - self._log_probability(removed))

    def _run(self, writes: Mapping[Site, Edit], read: Sequence[Site]) -> tuple[Tensor, Mapping[Site, Tensor]]:
        out = self.model.backend.forward(self.ids, mask=None, read=read, write=writes)
        return out.logits, out.activations

    def _log_probability(self, logits: Tensor) -> Tensor:
        """Mean over the written tokens, ()."""
        return logits[0, self.start :].float().log_softmax(dim=-1).gather(1, self.written).mean()

    def _lengths(self, layer: int, z: Tensor) -> Tensor:
        """How far `attn_out` moves at each token without each head, after the post-norm of a block that has one: (token, head)."""
        heads = torch.arange(z.shape[1], device=z.device)
        states = z.repeat(len(heads) + 1, 1, 1, 1)  # the last is whole
        states[heads, :, heads] = 0
        with torch.no_grad():
            *without, whole = self.model.layout.attention_of_heads(self.model.hf, layer, states)
        return torch.stack([(whole - one).norm(dim=-1) for one in without], dim=1)


def _shifted(site: Site, shifts: dict[Site, Tensor]) -> Edit:
    """An edit that adds a zero, by which the outcome can be differentiated."""

    def edit(activation: Tensor, _: object) -> Tensor:
        shifts[site] = torch.zeros_like(activation, requires_grad=True)
        return activation + shifts[site]

    return edit


class _frozen(ExitStack):
    """A context in which the weights of a model need no gradient, which saves their half of a backward pass."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        for weight in model.hf.parameters():
            if weight.requires_grad:
                self.callback(weight.requires_grad_, True)
                weight.requires_grad_(False)


def _array(values: Tensor) -> Values:
    return np.asarray(values.detach().double().cpu().numpy())
