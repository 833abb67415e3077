"""Attention stored for display: sentence by sentence for every head, and for every token the few tokens that it
attends to most."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.rows.block import AttentionBlock
from reasonscope.analysis.attention.rows.functionals import SentenceMeans
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import mean_band
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Span, Trace
from reasonscope.probes.models.model import Model

REGIONS = ("prompt", "earlier sentences", "own sentence")


class _Strongest:
    """A reader for `read_attention` that keeps, for the rows `rows`, the `keys` tokens that each attends to most, and
    its shares by region.

    `shares` (region, layer, head, row): attention on the prompt, on earlier sentences and on the row's own.
    """

    def __init__(self, rows: Span, owner: NDArray[np.int64], n_layers: int, n_heads: int, keys: int) -> None:
        shape = n_layers, n_heads, len(rows), keys
        self._rows = rows
        self.key = np.zeros(shape, dtype=np.uint16 if rows.stop <= 2**16 else np.int32)
        self.weight = np.zeros(shape, dtype=np.float16)
        self._owner = torch.from_numpy(owner)  # the sentence of each token, −1 in the prompt
        self.shares = np.zeros((len(REGIONS), *shape[:3]))

    def __call__(self, block: AttentionBlock) -> None:
        rows = Span(max(block.rows.start, self._rows.start), min(block.rows.stop, self._rows.stop))
        if rows.stop <= rows.start:
            return
        shown = block.probabilities[:, rows.start - block.rows.start : rows.stop - block.rows.start]
        n = min(self.key.shape[-1], shown.shape[-1])
        best = shown.topk(n, dim=-1)
        at = slice(rows.start - self._rows.start, rows.stop - self._rows.start)
        self.key[block.layer, :, at, :n] = (best.indices + block.keys.start).cpu().numpy()
        self.weight[block.layer, :, at, :n] = best.values.float().cpu().numpy()
        own, seen = self._owner[rows.slice, None], self._owner[None, block.keys.slice]
        for i, inside in enumerate((seen < 0, (seen >= 0) & (seen < own), seen == own)):
            self.shares[i, block.layer, :, at] = (shown.cpu() * inside).sum(dim=2).double().numpy()


def attention_map(model: Model, trace: Trace, sentences: Sequence[Sentence], *, keys: int = 8, seed: int = 0) -> Result:
    """Which tokens and regions the tokens of a trace's sentences attend to.

    Args:
        model: A native model.
        trace: The trace, with tokens.
        sentences: Its sentences.
        keys: How many tokens to keep for each token.
        seed: Random seed.

    Returns:
        Axes (region, layer, head): mean shares of attention, with intervals over sentences. The null is a head that
        attends equally to all tokens up to its own. `arrays`: `matrix` (layer, head, target, source), mean attention
        between sentences; `key` and `weight` (layer, head, token, rank), for each token from `first` on, the `keys`
        tokens that it attends to most and how much (every other token gets less than the last of them). `numbers`:
        `first`. Undefined, with the reason, for fewer than two sentences with tokens.

    Raises:
        InputError: If the trace cannot be fed.
        ContextError: If it exceeds the model's context.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        result = rs.analysis.attention_map(model, trace, rs.sentences(trace))
        result.arrays["matrix"].mean(axis=(0, 1))  # (target, source)
    """
    common: dict[str, Any] = {"method": "attention_map", "quantity": "share of attention", "unit": "1"}
    provenance = {"trace": trace.id, "keys": keys, **cut_provenance(sentences)}
    spans = [sentence.tokens for sentence in sentences]
    if len(spans) < 2 or not all(map(len, spans)):
        reason = f"{len(spans)} sentences ({trace.state} thinking), or one without tokens: nothing to attend to"
        return undefined(**common, reason=reason, provenance=provenance)
    rows = Span(spans[0].start, spans[-1].stop)
    begins = np.array([span.start for span in spans])
    owner = sentence_of_each(sentences, rows.stop)  # white space after a sentence belongs to it
    owner[
        np.setdiff1d(np.arange(rows.stop), trace.thinking_positions)
    ] = -1  # as what comes between two blocks does not
    strongest = _Strongest(rows, owner, model.n_layers, model.n_heads, min(keys, rows.stop))
    means = SentenceMeans(spans, rows.stop, model.n_layers, model.n_heads)

    def read(block: AttentionBlock) -> None:
        means(block)
        strongest(block)

    read_attention(model, trace.token_ids[: rows.stop].tolist(), read)
    row = np.flatnonzero(owner >= 0)
    outside, own = np.cumsum(owner < 0)[row], row + 1 - begins[owner[row]]
    chance = (np.stack([outside, row + 1 - outside - own, own]) / (row + 1)).mean(axis=1)[:, None, None]
    shares = strongest.shares[..., row - rows.start]
    values = shares.mean(axis=-1)
    return Result(
        **common,
        axes=(Axis.of("region", REGIONS), Axis.of("layer", model.n_layers), Axis.of("head", model.n_heads)),
        values=values,
        reason=model.layout.without_heads,
        null=Band.of(chance, chance, values.shape, "a head that attends equally to all tokens up to its own"),
        interval=mean_band(shares, owner[row], seed=seed),
        arrays={
            "matrix": means.result().matrix.astype(np.float16),
            "key": strongest.key,
            "weight": strongest.weight,
        },
        numbers={"first": rows.start},
        provenance=provenance,
    )
