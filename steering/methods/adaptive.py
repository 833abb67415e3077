"""Adaptive thinking speed (arXiv 2507.03704, section 5): faster while the layers agree, slow again when they disagree."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.data.variants import is_published
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.application import VectorUse
from reasonscope.steering.vectors.intervention import MeasuredMoves
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

WINDOW, WIDTH = 8, 2.0  # of the paper: difficulties to compare with, and standard deviations above their mean


def layer_difference(early: Tensor, final: Tensor, *, variant: str = "corrected") -> Tensor:
    """How much early layers' next-token distributions differ from the last one's: mean over layers of JS(p‖q), (…), in nats.

    `early` (layer, …, vocab) and `final` (…, vocab) are logits. JS = ½[KL(p‖m) + KL(q‖m)], m = (p + q)/2. The released code
    (`variant="published"`) swaps the arguments, ½[KL(m‖p) + KL(m‖q)], and averages over the vocabulary instead of summing.
    """
    p, q = early.log_softmax(-1), final.log_softmax(-1).expand_as(early)
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
    banned = q.isneginf()  # a processor forbids these tokens: their probability is 0, and 0 · log 0 is 0
    if is_published(variant):
        return torch.where(banned, 0.0, m.exp() * (2 * m - p - q) / 2).mean(-1).mean(0)
    return ((p.exp() * (p - m) + torch.where(banned, 0.0, q.exp() * (q - m))).sum(-1) / 2).mean(0)


class _AdaptiveStrength:
    """The strength α of one sequence, from the difficulties of its tokens so far.

    It starts at `lowest`. Each difficulty is compared with μ + `width`·σ of the `window` difficulties before it (σ with n − 1). If it is
    smaller, α grows by `step` up to `highest`; otherwise it falls back to `lowest`. The first `window` difficulties are only collected.
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
                f"window {window}, strengths {lowest} to {highest} by {step}: give a window of at least 2, "
                "a lowest strength that is not above the highest, and a step that is not negative"
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


class AdaptiveSteering(LogitsProcessor, MeasuredMoves):
    """Adds α · direction to the newest token of each sequence; α grows while the layers agree and falls back when they disagree.

    Pass `edits` as `write=`, `on_step`, and the object itself as the last of `processors`. It resets with every generation, but
    `n_edited` counts all tokens steered, and `distances` says how far each was moved. Run it beside random directions of `steady()`,
    which move a token as far. The logits of a monitored layer are unembedding(final norm(resid_post)); those of the last layer
    are the steered model's own. As published, the strength found at a token acts from the next one on.

    Args:
        model: The model that writes.
        vector: The directions, such as those of `extract_speed`.
        monitored: Layers whose next-token distribution is compared with the last one's; the last layer itself is not allowed.
        lowest: α to begin with and to fall back to, in units of the vector.
        highest: α at most.
        step: By how much α grows.
        window: How many difficulties the next one is compared with, at least 2.
        width: How many standard deviations above their mean still count as easy.
        variant: `"published"` for the divergence of the released code (see `layer_difference`).

    Raises:
        InputError: No layer is monitored, or one that does not exist.

    Controlling Thinking Speed (arXiv 2507.03704), section 5.

    Departures: Each sequence has its own α, and finished ones are dropped (the released code assumes one prompt and one stop token).

    Example:
        adaptive = AdaptiveSteering(model, vector, monitored=range(model.n_layers - 1))
        how = {"write": adaptive.edits, "on_step": adaptive.on_step, "processors": [adaptive]}
        completions = generate(model, prompts, sampling, seeds=[0], **how)
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
        window: int = WINDOW,
        width: float = WIDTH,
        variant: str = "corrected",
    ) -> None:
        if not monitored or not all(0 <= layer < model.n_layers - 1 for layer in monitored):
            raise InputError(
                f"monitored layers {list(monitored)}: give at least one, each from 0 to {model.n_layers - 2}"
            )
        super().__init__()
        self._model, self._vector, self._variant = model, vector, variant
        self._monitored = [Site("resid_post", layer) for layer in dict.fromkeys(monitored)]
        self._new = partial(_AdaptiveStrength, lowest=lowest, highest=highest, step=step, window=window, width=width)
        self._lowest = lowest
        self._n_decided = self._n_above = 0
        self._total = 0.0
        self._strengths: dict[int, _AdaptiveStrength] = {}
        self._known: dict[bytes, NDArray[np.float32]] = {}  # of each finished text, the strength at each token
        self._reads = False
        self._n_prompt: Tensor | None = None
        self._rows: list[int] = []
        self._early: dict[Site, Tensor] = {}
        self.history: dict[int, list[float]] = {}
        self.n_edited = 0

    @property
    def edits(self) -> Mapping[Site, Edit]:
        sites = {*self._vector.directions, *self._monitored}
        return {site: self._edit(site) for site in sites}

    def begin(self, n_prompt: Sequence[int]) -> None:
        """Read finished text next, each token with the strength that it had: texts that this object followed, after `finish`."""
        self._reads = True

    def on_step(self, step: DecodingStep) -> None:
        """Follow a step; give this as `on_step` to `generate`."""
        self._rows = [int(row) for row in step.rows.cpu().numpy()]
        self.n_edited += len(self._rows)
        if step.index == 0:
            self._reads, self._n_prompt = False, step.n_prompt
            self._strengths = {row: self._new() for row in self._rows}
            self.history = {row: [] for row in self._rows}

    @property
    def about(self) -> Mapping[str, Any]:
        """What its decisions are: the strength at each token."""
        site = ", ".join(map(str, self._vector.directions))
        return {"name": "adaptive-speed", "site": site, "unit": "strength", "provenance": {}}

    def finish(self, sequences: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """A batch is written; the strength at each token of its sequences but the last, (token,), NaN before the last of the prompt."""
        assert self._n_prompt is not None
        lines = []
        for row, (ids, n_prompt) in enumerate(zip(sequences, self._n_prompt.tolist(), strict=True)):
            line = np.full(len(ids) - 1, np.nan, dtype=np.float32)
            line[n_prompt - 1 :] = [self._lowest, *self.history[row]][: len(line) - n_prompt + 1]
            self._known[np.asarray(ids[:-1], dtype=np.int64).tobytes()] = line
            lines.append(line)
        return lines

    def told(self) -> str:
        """One line on what it did so far."""
        lowest = f"its lowest strength ({self._lowest:g})"
        if not self._n_above:
            return f"adaptive speed stayed at {lowest}"
        share, mean = self._n_above / self._n_decided, self._total / self._n_decided
        return f"adaptive speed was above {lowest} at {share:.0%} of the tokens, at a mean of {mean:.3g}"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        norm = self._model.final_norm
        unembedding = self._model.hf.get_submodule(self._model.layout.unembedding)
        early = torch.stack([unembedding(norm(self._early[site])) for site in self._monitored]).float()
        difficulties = layer_difference(early.to(scores.device), scores.float(), variant=self._variant)
        for row, difficulty in zip(self._rows, difficulties.tolist(), strict=True):
            strength = self._strengths[row].update(difficulty)
            self.history[row].append(strength)
            self._n_decided, self._total = self._n_decided + 1, self._total + strength
            self._n_above += strength > self._lowest
        return scores

    def steady(self) -> VectorUse:
        """The same vector at a constant strength, which moves a newest token as far as it was moved on average so far, at each site.

        Raises InputError before any token was steered.
        """
        if not (moves := self.moves):
            raise InputError(
                "adaptive steering has not moved any token yet; run it before the controls that move as far"
            )
        lengths = {site: np.linalg.norm(u.astype(np.float64)) for site, u in self._vector.directions.items()}
        scaled = {
            site: (u * (moves[site] / lengths[site])).astype(np.float32) for site, u in self._vector.directions.items()
        }
        newest = Scope(prompt_positions=(-1,), generation_window=(0, None))
        return VectorUse(vector=replace(self._vector, directions=scaled, norm="raw"), scope=newest)

    def _edit(self, site: Site) -> Edit:
        direction = self._vector.directions.get(site)

        def edit(activation: Tensor, where: Positions) -> Tensor:
            if self._reads:
                return activation if direction is None else self._again(activation, where, direction)
            if direction is not None:
                if len(self._rows) != len(activation):
                    raise InputError("adaptive steering follows each sequence; pass its on_step to generate as well")
                strengths = activation.new_tensor([self._strengths[row].value for row in self._rows])
                along, before = torch.from_numpy(direction).to(activation), activation[:, -1]
                after = before + strengths[:, None] * along
                self.note(site, (after.float() - before.float()).detach(), along)
                activation = torch.cat([activation[:, :-1], after[:, None]], dim=1)
            if site in self._monitored:
                self._early[site] = activation[:, -1].detach()
            return activation

        return edit

    def _again(self, activation: Tensor, where: Positions, direction: NDArray[np.float32]) -> Tensor:
        """The activation of finished texts (batch, token, d_model), each token with the strength that it had."""
        strengths = torch.zeros(where.ids.shape, dtype=torch.float32)
        for row, (ids, index) in enumerate(zip(where.ids.cpu().numpy(), where.index.cpu().numpy(), strict=True)):
            line = self._known.get(ids[index >= 0].astype(np.int64).tobytes())
            if line is None:
                raise InputError(
                    "adaptive steering follows a generation and cannot read another text; use a vector of fixed strength"
                )
            strengths[row, torch.from_numpy(index >= 0)] = torch.from_numpy(np.nan_to_num(line))
        return activation + strengths.to(activation)[..., None] * torch.from_numpy(direction).to(activation)
