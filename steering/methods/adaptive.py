"""Adaptive thinking speed (arXiv 2507.03704, section 5): faster while the layers agree, slow again where they part."""

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean, stdev

import torch
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.data.variants import is_published
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.vector import SteeringVector


def layer_difference(early: Tensor, final: Tensor, *, variant: str = "corrected") -> Tensor:
    """How much early layers' next-token distributions differ from the last one's: mean over layers of JS(p‖q), nats.

    `early` (layer, …, vocab) and `final` (…, vocab) are logits: (…). JS = ½[KL(p‖m) + KL(q‖m)], m = (p + q)/2. The released code
    (`variant="published"`) swaps the arguments, ½[KL(m‖p) + KL(m‖q)], and takes the mean over the vocabulary instead of the sum.
    """
    p, q = early.log_softmax(-1), final.log_softmax(-1).expand_as(early)
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
    banned = q.isneginf()  # by a processor that forbids tokens: probability 0, and 0 · log 0 is 0
    if is_published(variant):
        return torch.where(banned, 0.0, m.exp() * (2 * m - p - q) / 2).mean(-1).mean(0)
    return ((p.exp() * (p - m) + torch.where(banned, 0.0, q.exp() * (q - m))).sum(-1) / 2).mean(0)


class AdaptiveStrength:
    """The strength α of one sequence from the difficulties of its tokens so far.

    It starts at `lowest`. Each difficulty d is compared with μ + `width`·σ of the last `window` ones before it (σ with n − 1): below, α
    grows by `step` up to `highest`; else it falls back to `lowest`. The first `window` difficulties are only kept.
    """

    def __init__(
        self,
        *,
        lowest: float = -4.0,
        highest: float = 8.0,
        step: float = 2.0,
        window: int = 8,
        width: float = 2.0,
    ) -> None:
        if window < 2 or not lowest <= highest or step < 0:
            raise InputError(
                f"window {window}, strengths {lowest} to {highest} by {step}: 2 difficulties or more, from low to high"
            )
        self._lowest, self._highest, self._step, self._width = lowest, highest, step, width
        self._seen: deque[float] = deque(maxlen=window)
        self.value = lowest

    def update(self, difficulty: float) -> float:
        if len(self._seen) == self._seen.maxlen:
            easy = difficulty < fmean(self._seen) + self._width * stdev(self._seen)
            self.value = min(self.value + self._step, self._highest) if easy else self._lowest
        self._seen.append(difficulty)
        return self.value


class AdaptiveSteering(LogitsProcessor):
    """`h + α · direction` on the newest token of each sequence, α by its own `AdaptiveStrength`; resets with every generation.

    Give `edits` to `write=`, `on_step` and the object itself, last of `processors`; `n_edited` counts the tokens steered. The layers
    watched are resid_post of
    `monitored`; their logits are unembedding(final norm(h)), and the last layer's are those of the model as steered. As
    published the strength found at a token acts from the next one on. Departures: every sequence has a state of its own, and
    finished ones are dropped (the released code holds for one prompt and one stop token); true Jensen–Shannon unless `variant`.
    """

    def __init__(
        self,
        model: Model,
        vector: SteeringVector,
        *,
        monitored: Sequence[int],
        lowest: float = -4.0,
        highest: float = 8.0,
        step: float = 2.0,
        window: int = 8,
        width: float = 2.0,
        variant: str = "corrected",
    ) -> None:
        if not monitored or not all(0 <= layer < model.n_layers - 1 for layer in monitored):
            raise InputError(f"monitored layers {list(monitored)}; at least one, from 0 to {model.n_layers - 2}")
        self._model, self._vector, self._variant = model, vector, variant
        self._monitored = [Site("resid_post", layer) for layer in dict.fromkeys(monitored)]
        self._new = partial(AdaptiveStrength, lowest=lowest, highest=highest, step=step, window=window, width=width)
        self._strengths: dict[int, AdaptiveStrength] = {}
        self._rows: list[int] = []
        self._early: dict[Site, Tensor] = {}
        self.history: dict[int, list[float]] = {}
        self.n_edited = 0

    @property
    def edits(self) -> Mapping[Site, Edit]:
        sites = {*self._vector.directions, *self._monitored}
        return {site: self._edit(site) for site in sites}

    def begin(self, n_prompt: Sequence[int]) -> None:
        """Raises InputError: how fast it thinks follows from what it has just written."""
        raise InputError("adaptive steering follows a generation; it cannot read finished text")

    def on_step(self, step: DecodingStep) -> None:
        self._rows = [int(row) for row in step.rows.cpu().numpy()]
        self.n_edited += len(self._rows)
        if step.index == 0:
            self._strengths = {row: self._new() for row in self._rows}
            self.history = {row: [] for row in self._rows}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        norm = self._model.hf.get_submodule(self._model.layout.final_norm)
        unembedding = self._model.hf.get_submodule(self._model.layout.unembedding)
        early = torch.stack([unembedding(norm(self._early[site])) for site in self._monitored]).float()
        difficulties = layer_difference(early.to(scores.device), scores.float(), variant=self._variant)
        for row, difficulty in zip(self._rows, difficulties.tolist(), strict=True):
            self.history[row].append(self._strengths[row].update(difficulty))
        return scores

    def _edit(self, site: Site) -> Edit:
        direction = self._vector.directions.get(site)

        def edit(activation: Tensor, _: Positions) -> Tensor:
            if direction is not None:
                if len(self._rows) != len(activation):
                    raise InputError("adaptive steering follows each sequence; give its on_step to generate, too")
                strengths = activation.new_tensor([self._strengths[row].value for row in self._rows])
                shift = strengths[:, None] * torch.from_numpy(direction).to(activation)
                activation = torch.cat([activation[:, :-1], (activation[:, -1] + shift)[:, None]], dim=1)
            if site in self._monitored:
                self._early[site] = activation[:, -1].detach()
            return activation

        return edit
