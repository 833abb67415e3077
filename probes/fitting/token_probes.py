"""Probes that read every token of a span and weigh them: attention (a softmax over the tokens) and multi-max (the highest token).

A mean hides one telling token among hundreds. Both kinds are fitted by gradient descent, from seeded weights; the layer and the number
of steps are chosen on a part of the training problems, and the same search is run on shuffled labels at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import permutation_p
from reasonscope.data.progress import working
from reasonscope.data.ranks import auroc, spearman
from reasonscope.data.storage.safetensors_file import SafetensorsFormat
from reasonscope.data.storage.untrusted import wrap_errors
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.grouped_folds import Task, check_finite, grouped_folds
from reasonscope.probes.evaluation.permutation_null import Null, shuffled_targets
from reasonscope.probes.fitting.linear_probes import FittedProbe, LinearProbe

TokenKind = Literal["attention", "multi-max"]
N_TOKEN_PERMUTATIONS = 19  # the smallest p-value is 1 in 20; each shuffle is as dear as the fit itself
_FORMAT = SafetensorsFormat(
    key="reasonscope.token_probe",
    noun="token probe",
    version=1,
    fields={"site": str, "task": str, "method": str, "model": dict, "provenance": dict},
)
_HEADS, _STEPS, _EVERY, _PENALTY = 4, 120, 10, 1e-3
# A step of Adam moves every weight by about the rate, and so a score by as much for each dimension: wide states need smaller steps.
_RATE, _RATE_OF_ALL = 0.05, 0.8
_LEAST_WEIGHT = 1e-300


@dataclass(frozen=True, kw_only=True)
class TokenProbe(FittedProbe):
    """Weighs the tokens of a span: for each head Σ softmax(query · h) value · h, or max (value · h); summed over heads, plus an intercept.

    Attributes:
        values: (head, d_model) float64, in the units of the raw activations.
        queries: The same for the weights of "attention"; (0, d_model) for "multi-max".
        intercept: What is added.
    """

    values: Values
    queries: Values
    intercept: float

    def __post_init__(self) -> None:
        if self.method not in get_args(TokenKind):
            raise InputError(f"unknown kind {self.method!r}; choose one of {', '.join(get_args(TokenKind))}")
        if self.values.ndim != 2 or self.queries.shape != (len(self.values) * self._attends, self.values.shape[1]):
            raise InputError(
                f"values of shape {self.values.shape} and queries of shape {self.queries.shape} do not fit"
            )
        if not (np.isfinite(self.values).all() and np.isfinite(self.queries).all() and np.isfinite(self.intercept)):
            raise InputError("a weight is NaN or infinite; check the activations that the probe was fitted on")

    @property
    def _attends(self) -> bool:
        return self.method == "attention"

    def scores(self, activations: NDArray[np.floating[Any]]) -> Values:
        """The score after each token of a span (token, d_model): (token,); the last is that of the whole span.

        Raises InputError for another width, an empty span, NaN or infinity.
        """
        states = np.asarray(activations, dtype=np.float64)
        if states.ndim != 2 or not len(states) or states.shape[1] != self.values.shape[1]:
            raise InputError(f"activations of shape {states.shape}; this probe reads (token, {self.values.shape[1]})")
        check_finite(states)
        read = states @ self.values.T  # (token, head)
        if not self._attends:
            return np.asarray(np.maximum.accumulate(read, axis=0).sum(axis=1) + self.intercept)
        logits = states @ self.queries.T
        weights = np.maximum(np.exp(logits - logits.max(axis=0)), _LEAST_WEIGHT)
        pooled = np.cumsum(weights * read, axis=0) / np.cumsum(weights, axis=0)
        return np.asarray(pooled.sum(axis=1) + self.intercept)

    def probabilities(self, activations: NDArray[np.floating[Any]]) -> Values:
        """Probabilities of the positive class after each token, which are not calibrated. Raises InputError for a regression."""
        if self.task != "binary":
            raise InputError("a regression has no probabilities; use its scores")
        return np.asarray(expit(self.scores(activations)))

    def weights(self, activations: NDArray[np.floating[Any]]) -> Values:
        """How much each token of a span counts for the last score, (token,), summing to 1."""
        states = np.asarray(activations, dtype=np.float64)
        if not self._attends:
            highest = (states @ self.values.T).argmax(axis=0)
            return np.bincount(highest, minlength=len(states)) / len(self.values)
        logits = states @ self.queries.T
        shares = np.exp(logits - logits.max(axis=0))
        return np.asarray((shares / shares.sum(axis=0)).mean(axis=1))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, as `LinearProbe.save` does. Raises StoreError."""
        tensors = {"values": self.values, "queries": self.queries, "intercept": np.array([self.intercept])}
        _FORMAT.write(Path(path), self._header(), tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote. Raises InputError for any other file, a newer version, or NaN."""
        header, tensors = _FORMAT.read(Path(path))
        with wrap_errors(path):
            return cls(
                values=tensors["values"],
                queries=tensors["queries"],
                intercept=float(tensors["intercept"][0]),
                site=Site.parse(header["site"]),
                **{name: header[name] for name in ("task", "method", "model", "provenance")},
            )


class _Pooled(nn.Module):
    """Probes of many targets at once: logits (target, row) from states (row, token, d) with a mask (row, token)."""

    def __init__(self, kind: TokenKind, width: int, n_targets: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # Heads begin by attending to what they value. From queries of 0, a probe could not leave a mean that tells nothing.
        start = torch.randn(width, 1, _HEADS, generator=generator) / width**0.5 / _HEADS
        self.kind = kind
        # All targets begin alike, true and shuffled ones.
        self.values = nn.Parameter(start.repeat(1, n_targets, 1))
        self.queries = nn.Parameter(start.repeat(1, n_targets, 1)) if kind == "attention" else None
        self.intercept = nn.Parameter(torch.zeros(n_targets))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        read = torch.einsum("ntd,dkh->ntkh", states, self.values)
        hidden = ~mask[:, :, None, None]
        if self.queries is None:
            pooled = read.masked_fill(hidden, -torch.inf).amax(dim=1)
        else:
            logits = torch.einsum("ntd,dkh->ntkh", states, self.queries).masked_fill(hidden, -torch.inf)
            pooled = (logits.softmax(dim=1) * read).sum(dim=1)
        logits_of_rows: Tensor = pooled.sum(dim=-1).T + self.intercept[:, None]
        return logits_of_rows

    def centre(self, states: Tensor, mask: Tensor, truth: Tensor, *, binary: bool) -> None:
        """Begin at the mean of the targets: the highest of many tokens is far above 0, and the intercept would be long on its way."""
        with torch.no_grad():
            mean = truth.mean(dim=1)
            base = torch.logit(mean.clamp(0.01, 0.99)) if binary else mean
            self.intercept.add_(base - self(states, mask).mean(dim=1))

    def penalty(self) -> Tensor:
        """Squared length of the weights of each target, summed over targets."""
        return sum(
            (weights.square().sum() for weights in (self.values, self.queries) if weights is not None),
            torch.tensor(0.0),
        )


@dataclass(frozen=True, kw_only=True)
class _TokenHeldOut:
    """Token probes in folds, and what each says of the rows that it was not fitted on.

    Attributes:
        final: The probe that was fitted on all rows.
        scores: The score of each row by a probe that was fitted on no row of its group, (row,).
        by_layer: Score of each layer on the rows that chose among the layers, the mean over folds, (layer,). It is biased upwards.
        shuffled: The held-out score among those of the same search on labels that whole groups exchanged.
    """

    final: TokenProbe
    scores: Values
    by_layer: Values
    shuffled: Null


@dataclass(frozen=True, kw_only=True)
class _Spans:
    """States (row, token, d), padded, with the mask of real tokens, standardised by some of the rows."""

    states: Tensor
    mask: Tensor
    centre: Tensor
    scale: Tensor

    @classmethod
    def of(cls, spans: Sequence[NDArray[np.floating[Any]]], fitted_on: Rows) -> "_Spans":
        lengths = torch.tensor([len(span) for span in spans])
        seen = torch.from_numpy(np.concatenate([spans[row] for row in fitted_on]).astype(np.float32))
        centre, scale = seen.mean(dim=0), seen.std(dim=0, correction=0)
        scale = torch.where(scale > 1e-6 * (1 + centre.abs()), scale, 1.0)
        padded = nn.utils.rnn.pad_sequence(
            [(torch.from_numpy(np.asarray(span, dtype=np.float32)) - centre) / scale for span in spans],
            batch_first=True,
        )
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return cls(states=padded, mask=mask, centre=centre, scale=scale)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One search for all targets (row, target): the true ones first, then the shuffled ones."""

    kind: TokenKind
    task: Task
    layers: Sequence[Sequence[NDArray[np.floating[Any]]]]
    targets: Tensor
    groups: Sequence[str]
    seed: int

    def fit(self, layer: int, train: Rows, steps: Sequence[int], of: Sequence[int]) -> tuple[list[_Pooled], _Spans]:
        """Fit the targets `of` on `train`; the probes after each number of `steps`."""
        spans = _Spans.of(self.layers[layer], train)
        y, rows = self.targets[:, list(of)], torch.from_numpy(train)
        torch.manual_seed(self.seed)
        probes = _Pooled(self.kind, spans.states.shape[2], len(of), self.seed)
        probes.centre(spans.states[rows], spans.mask[rows], y[rows].T, binary=self.task == "binary")
        optimiser = torch.optim.Adam(probes.parameters(), lr=min(_RATE, _RATE_OF_ALL / spans.states.shape[2]))
        states, mask, truth = spans.states[rows], spans.mask[rows], y[rows].T
        kept: list[_Pooled] = []
        for step in range(max(steps) + 1):
            if step in steps:
                kept.append(_copied(probes))
            optimiser.zero_grad()
            loss = self._losses(probes(states, mask), truth).mean(dim=1).sum() + _PENALTY * probes.penalty()
            loss.backward()
            optimiser.step()
        return kept, spans

    def chosen(self, train: Rows) -> tuple[NDArray[np.intp], NDArray[np.intp], Values]:
        """Layer and steps of each target, chosen on a quarter of the training groups, and the true score of each layer there."""
        labels = np.asarray(self.groups)[train].tolist()
        n = min(4, len(set(labels)))
        split = grouped_folds(np.arange(len(train), dtype=np.float64), labels, folds=n, seed=self.seed)[0]
        inner, held = train[split.train], train[split.test]
        checkpoints = list(range(_EVERY, _STEPS + 1, _EVERY))
        losses, scores = [], []
        for layer in range(len(self.layers)):
            fits, spans = self.fit(layer, inner, checkpoints, range(self.targets.shape[1]))
            predicted = [self._predicted(fit, spans, held) for fit in fits]
            truth = self.targets[torch.from_numpy(held)].T
            losses.append(torch.stack([self._losses(one, truth).mean(dim=1) for one in predicted]))  # (step, target)
            best = int(losses[-1][:, 0].argmin())
            scores.append(self.score(truth[0].numpy(), predicted[best][0].numpy()))
        found = torch.stack(losses).flatten(0, 1).argmin(dim=0).numpy()
        return found // len(checkpoints), np.asarray(checkpoints)[found % len(checkpoints)], np.array(scores)

    def predictions(self, train: Rows, test: Rows) -> tuple[Tensor, Values]:
        """Scores (target, row of `test`) of the probes that `train` chose and fitted, and `chosen`'s scores of the layers."""
        layers, steps, scores = self.chosen(train)
        found = torch.empty(self.targets.shape[1], len(test))
        for layer in np.unique(layers):
            of = np.flatnonzero(layers == layer)
            wanted = sorted(set(steps[of].tolist()))
            fits, spans = self.fit(int(layer), train, wanted, of.tolist())
            for place, target in enumerate(of):
                found[target] = self._predicted(fits[wanted.index(int(steps[target]))], spans, test)[place]
        return found, scores

    def score(self, truth: Values, predicted: Values) -> float:
        return spearman(truth, predicted) if self.task == "regression" else auroc(truth, predicted)

    def _losses(self, predicted: Tensor, truth: Tensor) -> Tensor:
        if self.task == "regression":
            return (predicted - truth).square()
        return log_loss(predicted, truth, reduction="none")

    def _predicted(self, probes: _Pooled, spans: _Spans, rows: Rows) -> Tensor:
        at = torch.from_numpy(rows)
        with torch.no_grad():
            found: Tensor = probes(spans.states[at], spans.mask[at])
        return found


def held_out_token_probes(
    layers: Sequence[Sequence[NDArray[np.floating[Any]]]],
    targets: Values,
    groups: Sequence[str],
    sites: Sequence[Site],
    *,
    kind: TokenKind,
    task: Task,
    model: Any,
    provenance: dict[str, Any],
    n_permutations: int = N_TOKEN_PERMUTATIONS,
    folds: int = 5,
    seed: int = 0,
) -> _TokenHeldOut:
    """Fit token probes in folds that keep groups whole, on the true labels and on shuffled ones at once.

    Args:
        layers: For each site the states of each row's tokens, (token, d_model) each.
        targets: (row,) quantities, or labels 0 and 1.
        groups: The group of each row.
        sites: The site of each of `layers`.
        kind: "attention" or "multi-max".
        task: "regression" or "binary".
        model: The fingerprint of the model that was read.
        provenance: What the probe should say of itself.
        n_permutations: Shuffles of the labels.
        folds: Number of folds; they do not look at the targets, so that true and shuffled ones are exchangeable.
        seed: Seed of the weights, the folds and the shuffles.

    Raises:
        InputError: No shuffle changes a target, a state is not finite, or there are fewer groups than folds.
    """
    for states in layers:
        check_finite(*states)
    shuffled = shuffled_targets(targets, groups, within=False, n_permutations=n_permutations, seed=seed)
    centre, scale = (targets.mean(), targets.std()) if task == "regression" else (0.0, 1.0)
    every = torch.from_numpy(((np.stack([targets, *shuffled], axis=1) - centre) / scale).astype(np.float32))
    search = _Search(kind=kind, task=task, layers=layers, targets=every, groups=groups, seed=seed)
    plan = grouped_folds(np.arange(len(targets), dtype=np.float64), groups, folds=folds, seed=seed)
    predicted, by_layer = torch.empty(every.shape[1], len(targets)), []
    with working("fitting token probes", total=len(plan) + 1, unit="folds") as work:
        for fold in plan:
            predicted[:, torch.from_numpy(fold.test)], scores = search.predictions(fold.train, fold.test)
            by_layer.append(scores)
            work.advance(1)
        everything = np.arange(len(targets))
        alone = _Search(kind=kind, task=task, layers=layers, targets=every[:, :1], groups=groups, seed=seed)
        (layer,), (steps,), _ = alone.chosen(everything)
        (fitted,), spans = alone.fit(int(layer), everything, [int(steps)], [0])
        work.advance(1)
    found = [search.score(every[:, k].numpy().astype(np.float64), predicted[k].numpy()) for k in range(len(predicted))]
    about = {**provenance, "steps": int(steps), "rows": len(targets), "learned_from": sorted(set(groups)), "seed": seed}
    return _TokenHeldOut(
        final=_folded(
            fitted, spans, site=sites[int(layer)], task=task, scale=scale, centre=centre, model=model, about=about
        ),
        scores=predicted[0].numpy().astype(np.float64) * scale + centre,
        by_layer=np.nanmean(by_layer, axis=0),
        shuffled=Null(observed=found[0], null=np.array(found[1:]), p_value=float(permutation_p(found[0], found[1:]))),
    )


def _copied(probes: _Pooled) -> _Pooled:
    copy = _Pooled(probes.kind, probes.values.shape[0], len(probes.intercept), 0)
    copy.load_state_dict(probes.state_dict())
    return copy


def _folded(
    fitted: _Pooled,
    spans: _Spans,
    *,
    site: Site,
    task: Task,
    scale: float,
    centre: float,
    model: Any,
    about: dict[str, Any],
) -> TokenProbe:
    """A probe of raw activations: the standardisation goes into the weights, and its constants into the intercept."""

    def raw(weights: Tensor | None) -> Values:
        own = torch.zeros(len(spans.scale), 0) if weights is None else weights.detach()[:, 0]
        return (own.double() / spans.scale.double()[:, None]).T.numpy()

    values = raw(fitted.values) * scale
    shift = float((values @ spans.centre.double().numpy()).sum())
    return TokenProbe(
        values=values,
        queries=raw(fitted.queries),
        intercept=float(fitted.intercept.detach()[0]) * scale + centre - shift,
        site=site,
        task=task,
        method=fitted.kind,
        model=model,
        provenance=about,
    )


def load_probe(path: str | Path) -> LinearProbe | TokenProbe:
    """A saved probe of either kind. Raises InputError for any other file."""
    try:
        return TokenProbe.load(path)
    except InputError:
        return LinearProbe.load(path)
