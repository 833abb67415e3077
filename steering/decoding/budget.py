"""Budget guidance (arXiv 2506.13752): each next token is weighted by the probability that the thinking then fits into the budget."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.generation.recording import as_tensor
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.thinking import WrittenThinking


def negative_log_density(shape: Tensor, rate: Tensor, tokens_left: Tensor) -> Tensor:
    """−[α log λ − lnΓ(α) + (α − 1) log y − λy] with y = log(tokens left + 1) ~ Gamma(shape α, rate λ); nats, elementwise."""
    y = torch.log(tokens_left + 1)
    density: Tensor = -(shape * rate.log() - torch.lgamma(shape) + (shape - 1) * y.log() - rate * y)
    return density


def _fits_in(shape: Tensor, rate: Tensor, budget: Tensor) -> Tensor:
    """P(tokens left ≤ budget) = GammaCDF(log(budget + 1)), elementwise."""
    share: Tensor = torch.special.gammainc(shape, rate * torch.log(budget + 1))
    return share


@dataclass(frozen=True, kw_only=True)
class Trust:
    """When a prediction is trusted, as released: λ at least `rate`, α above 1, and the mode exp((α − 1)/λ) − 1 at least `mode` tokens."""

    rate: float = 10.0
    mode: float = 0.9

    def kept(self, shape: Tensor, rate: Tensor) -> Tensor:
        return (rate >= self.rate) & (shape > 1) & (torch.expm1((shape - 1) / rate) >= self.mode)


TRUST = Trust()


def _guidance_weights(logits: Tensor, shape: Tensor, rate: Tensor, budget: Tensor, *, trust: Trust = TRUST) -> Tensor:
    """w_v (…, vocab), summing to 1: the probability to fit if the prediction for v is trusted, else 0. `budget` (…) is in tokens.

    If no prediction is trusted, the likeliest token gets all the weight.
    """
    weights = torch.where(trust.kept(shape, rate), _fits_in(shape, rate, budget[..., None].to(shape)), 0.0)
    total = weights.sum(-1, keepdim=True)
    likeliest = torch.zeros_like(weights).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(weights.dtype).tiny), likeliest)


def _guided_distribution(logits: Tensor, weights: Tensor) -> Tensor:
    """p ∝ softmax(logits)·w; (…, vocab)."""
    product = logits.softmax(-1) * weights
    return product / product.sum(-1, keepdim=True)


def _remaining_budget(budget: int, written: Tensor) -> Tensor:
    """`budget` minus the thinking tokens written so far, at least 1."""
    return (budget - written).clamp(min=1)


class LengthPredictor(nn.Module):
    """Predicts from all layers' states of one token how much thinking is left if v is the next token, as α_v and λ_v.

    states (row, layer, d_model) → Linear → a learned summary token (initially 0) next to them → Transformer encoder over the layers
    (without positions) → two linear heads over the vocabulary, softplus. The paper uses BERT-base (width 768, depth 12, 12 heads).
    """

    def __init__(self, d_model: int, vocabulary: int, *, width: int = 128, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(d_model, width)
        self.summary = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.shape = nn.Linear(width, vocabulary, bias=False)
        self.rate = nn.Linear(width, vocabulary, bias=False)

    @classmethod
    def of_weights(cls, weights: Mapping[str, NDArray[np.float32]], *, heads: int) -> "LengthPredictor":
        """The predictor with these weights, whose sizes they tell. Raises InputError if they are not those of one."""
        try:
            width, d_model = weights["project.weight"].shape
            depth = sum(name.endswith("norm1.weight") for name in weights)
            made = cls(d_model, len(weights["shape.weight"]), width=width, depth=depth, heads=heads)
            made.load_state_dict({name: torch.from_numpy(one.copy()) for name, one in weights.items()})
        except (KeyError, ValueError, RuntimeError, AssertionError) as error:
            raise InputError(
                f"these weights are not those of a predictor of budget guidance: {error!s:.200}"
            ) from error
        return made.eval().requires_grad_(False)

    @property
    def reads(self) -> tuple[int, int]:
        """The width of the states that it reads, and the size of the vocabulary."""
        return self.project.in_features, self.shape.out_features

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(α, λ), each (row, vocab), above 0."""
        layers = self.project(states)
        summary = self.summary.expand(len(layers), -1, -1)
        encoded = self.encoder(torch.cat([summary, layers], dim=1))[:, 0]
        tiny = torch.finfo(encoded.dtype).tiny
        return softplus(self.shape(encoded)) + tiny, softplus(self.rate(encoded)) + tiny

    def with_tokens_exchanged(self, seed: int) -> "LengthPredictor":
        """A copy that gives each token the prediction of another one: a control that is as confident and knows nothing."""
        other = copy.deepcopy(self)
        order = torch.randperm(len(self.shape.weight), generator=torch.Generator().manual_seed(seed))
        for head in (other.shape, other.rate):
            head.weight.data = head.weight.data[order]
        return other


def train_predictor(
    store: TraceStore,
    sites: Sequence[Site],
    *,
    vocabulary: int,
    ids: Iterable[str] | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    width: int = 128,
    depth: int = 2,
) -> tuple[LengthPredictor, float]:
    """Fit the predictor on the thinking of stored traces, with the model frozen; returns it with the mean loss of the last epoch (nats).

    For each token v of the thinking, and the token that closes it, the states of the token before are the features, and the target is the
    number of tokens from v to the closing tag, which counts as 1. The published `sites` are all L + 1 hidden states,
    `[resid_pre.0, resid_post.0, …]`. Departures: the encoder is small by default, and truncated traces are left out, since their length
    is unknown. Raises InputError if no trace is left, or for NaN.
    """
    states, following, left = _training_rows(store, sites, store.ids if ids is None else ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = LengthPredictor(states.shape[-1], vocabulary, width=width, depth=depth)
        optimiser = torch.optim.AdamW(predictor.parameters(), lr=learning_rate)
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(states)).split(batch_size):
                shape, rate = predictor(states[batch].float())
                pick = following[batch][:, None]
                loss = negative_log_density(shape.gather(1, pick)[:, 0], rate.gather(1, pick)[:, 0], left[batch]).mean()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
                optimiser.step()
                total += float(loss.detach()) * len(batch)
    return predictor.eval().requires_grad_(False), total / len(states)


def _training_rows(store: TraceStore, sites: Sequence[Site], ids: Iterable[str]) -> tuple[Tensor, Tensor, Tensor]:
    """States (row, site, d_model) in their stored type, which may be half as large as float32; tokens that follow, tokens left (row,)."""
    states, following, left = [], [], []
    for trace in (store.trace(id) for id in ids):
        if trace.state != "closed":
            continue
        # With the first token of the closing tag; the text between two blocks of thinking is not learned from.
        places = np.append(trace.thinking_positions, trace.tokens.thinking.stop)
        rows = np.stack([store.activations(trace.id, str(site))[places - 1] for site in sites], axis=1)
        states.append(as_tensor(rows))
        following.append(torch.from_numpy(trace.token_ids[places]))
        left.append(torch.arange(len(places), 0, -1, dtype=torch.float32))
    if not states:
        raise InputError("no trace closed its thinking, so no length is known; record with more tokens")
    if not all(torch.isfinite(rows).all() for rows in states):
        raise InputError("an activation is NaN or infinite; record the traces again in float32 or bfloat16")
    return torch.cat(states), torch.cat(following), torch.cat(left)


class BudgetGuidance(LogitsProcessor):
    """Guides the thinking towards a budget of tokens (arXiv 2506.13752).

    Pass `edits` as `write=` (they only read) and the object itself among `processors`. As released, it acts after tokens that contain a
    newline, before the closing tag. There the draw ignores temperature and top-p: give the `temperature` of the sampling, and the returned
    logits undo it (top-p is up to the caller).

    Args:
        model: The model that writes.
        predictor: What `train_predictor` returned.
        sites: The sites that the predictor was trained on, in the same order.
        budget: Thinking tokens to aim for, at least 1.
        temperature: The temperature of the sampling.
        trust: When a prediction counts.

    Raises:
        InputError: The budget is below 1.

    Departures: Works with any batch size.

    Example:
        predictor, _ = train_predictor(store, sites, vocabulary=model.vocabulary)
        guidance = BudgetGuidance(model, predictor, sites, budget=120, temperature=0.7)
        completions = generate(model, prompts, sampling, seeds=[0], write=guidance.edits, processors=[guidance])
    """

    def __init__(
        self,
        model: Model,
        predictor: LengthPredictor,
        sites: Sequence[Site],
        *,
        budget: int,
        temperature: float = 1.0,
        trust: Trust = TRUST,
    ) -> None:
        if budget < 1:
            raise InputError(f"a budget of {budget} tokens: give at least 1")
        self._thinking = WrittenThinking.of(model)
        strings = model.tokenizer.batch_decode([[i] for i in range(model.vocabulary)])
        self._newlines = torch.tensor([i for i, text in enumerate(strings) if "\n" in text])
        self._predictor, self._sites = predictor, tuple(sites)
        self._budget, self._temperature, self._trust = budget, temperature or 1.0, trust
        self._states: dict[Site, Tensor] = {}
        self._notes: dict[
            int, list[tuple[int, float]]
        ] = {}  # of each row, the budget left at the tokens that it acted after
        self._rows: list[int] = []
        self._n_prompt: Tensor | None = None
        self._width = 0
        self.guided = 0  # draws that it has weighted so far, without those for which no prediction was trusted

    @property
    def edits(self) -> Mapping[Site, Edit]:
        return {site: self._reading(site) for site in self._sites}

    @property
    def n_edited(self) -> int:
        """Tokens whose successor it weighted (as an intervention it only reads)."""
        return self.guided

    def on_step(self, step: DecodingStep) -> None:
        """Follow a step, to note its decisions by sequence; the tokens themselves say what was written."""
        self._rows = step.rows.tolist()
        if step.index == 0:
            self._notes, self._n_prompt, self._width = {}, step.n_prompt, step.ids.shape[1]

    def begin(self, n_prompt: Sequence[int]) -> None:
        """Nothing to do: finished text is read and not guided."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What its decisions are: the budget that was left at each token after which it acted."""
        site = f"{self._sites[0]} to {self._sites[-1]}"
        return {"name": "budget-guidance", "site": site, "unit": "tokens left", "provenance": {"budget": self._budget}}

    def finish(self, sequences: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """A batch is written; the budget left at each token of its sequences but the last, (token,), NaN if it did not act."""
        assert self._n_prompt is not None
        lines = []
        for row, (ids, n_prompt) in enumerate(zip(sequences, self._n_prompt.tolist(), strict=True)):
            line = np.full(len(ids) - 1, np.nan, dtype=np.float32)
            for column, left in self._notes.get(row, ()):
                line[column - (self._width - n_prompt)] = left
            lines.append(line)
        return lines

    def told(self) -> str:
        """One line on what it did so far."""
        return f"budget guidance weighted {self.guided} draws towards {self._budget} tokens"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = self._thinking.written(input_ids)
        at = (written >= 0) & torch.isin(input_ids[:, -1], self._newlines.to(input_ids.device))
        if not at.any():
            return scores
        # Layers of a model that is spread over accelerators are on several; the scores come from the last.
        states = torch.stack([self._states[site].to(at.device)[at] for site in self._sites], dim=1)
        predictor = self._predictor.to(at.device)
        with torch.no_grad():
            shape, rate = (part.double() for part in predictor(states.float()))
        logits = scores[at].double()
        budget = _remaining_budget(self._budget, written[at])
        for place, left in zip(at.nonzero()[:, 0].tolist(), budget.tolist(), strict=True) if self._rows else ():
            self._notes.setdefault(self._rows[place], []).append((input_ids.shape[1] - 1, left))
        weights = _guidance_weights(logits, shape, rate, budget, trust=self._trust)
        self.guided += int(self._trust.kept(shape, rate).any(-1).sum())
        guided = scores.clone()
        guided[at] = (_guided_distribution(logits, weights).log() * self._temperature).to(scores)
        return guided

    def _reading(self, site: Site) -> Edit:
        def read(activation: Tensor, _: Positions) -> Tensor:
            self._states[site] = activation[:, -1].detach()
            return activation

        return read
