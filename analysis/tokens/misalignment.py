"""Where a base model would have written another token than the reasoner did: token misalignment (FoReaL, arXiv
2506.06998)."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.data.arrays import Values
from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.intervals import wilson_interval
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Trace
from reasonscope.probes.models.model import Model

METHOD = "misalignment"


def _greedy_misses(model: Model, trace: Trace) -> Values:
    """1 for each generated token that `model` would not have written greedily, else 0: (token,)."""
    ids = torch.as_tensor(trace.token_ids[:-1], device=model.device)[None]
    if ids.shape[1] > model.context_length:
        raise ContextError(f"trace {trace.id!r} has {ids.shape[1]} tokens; {model.name} holds {model.context_length}")
    logits = model.backend.forward(ids, mask=torch.ones_like(ids)).logits[0, trace.n_prompt_tokens - 1 :]
    return np.asarray(logits.argmax(dim=-1).cpu().numpy() != trace.token_ids[trace.n_prompt_tokens :], dtype=np.float64)


def misalignment_of_trace(
    base: Model, reasoner: Model, trace: Trace, sentences: Sequence[Sentence], *, bins: int = 10
) -> Result:
    """Share of the thinking's tokens that the base model would not have written (FoReaL, arXiv 2506.06998).

    Args:
        base: The base model.
        reasoner: The model that wrote the trace; must share the tokenizer.
        trace: The trace.
        sentences: Its sentences.
        bins: The thinking is divided into so many equal parts.

    Returns:
        Axis (bin,). A prefill is not judged. The null is the reasoner on its own text: sampling another token than its
        own first choice is not misalignment. Intervals are Wilson's, with a bin's tokens reduced to independent tries
        by `_worth`. `arrays`: `by_index` (position in the sentence, 0 to 9), which the paper finds to fall within a few
        tokens, and `misses` (token,).

    Raises:
        InputError: If the models have different tokenizers, or the thinking has too few tokens for the bins.

    Example:
        results = rs.analyse("misalignment", "runs/mine", base="Qwen/Qwen3-1.7B-Base")
        results[0].values  # share of misses by tenth of the thinking
        results[0].arrays["by_index"]
    """
    if base.fingerprint["tokenizer"] != reasoner.fingerprint["tokenizer"]:
        raise InputError(
            f"{base.name} and {reasoner.name} have different tokenizers, so their tokens cannot be compared"
        )
    provenance = {"trace": trace.id, "base": base.name, "reasoner": reasoner.name, **cut_provenance(sentences)}
    places = trace.written_thinking
    n = len(places)
    if not trace.n_prompt_tokens or n < 2 * bins:
        reason = f"{n} tokens of thinking written after a prompt of {trace.n_prompt_tokens}; {bins} bins need 2 each, and a prompt"
        return undefined(method=METHOD, quantity="misaligned tokens", unit="1", reason=reason, provenance=provenance)
    found, own = (_greedy_misses(model, trace)[places - trace.n_prompt_tokens] for model in (base, reasoner))
    parts, mine = (np.array_split(misses, bins) for misses in (found, own))
    units = sentence_of_each(sentences, int(places[-1]) + 1)[places]
    values = np.array([part.mean() for part in parts])
    ends = [_ends(side, _worth(misses, units)) for side, misses in ((mine, own), (parts, found))]
    return Result(
        method=METHOD,
        quantity="share of tokens that the base model would not have written",
        unit="1",
        axes=(Axis.of("bin", bins),),
        values=values,
        null=Band.of(ends[0][0], ends[0][1], values.shape, "the reasoner on its own text, 95%"),
        interval=Band.of(
            ends[1][0],
            ends[1][1],
            values.shape,
            "over the effective number of tokens, which are alike within a sentence, 95%",
        ),
        arrays={"misses": found, "by_index": _by_index(sentences, found, places)},
        numbers={"rate": float(found.mean()), "rate_of_reasoner": float(own.mean())},
        provenance=provenance,
    )


def _worth(misses: Values, units: NDArray[np.int64]) -> float:
    """How many independent tries one of `misses` (token,) is worth, up to 1, because tokens of a sentence (`units`) are
    alike.

    p (1 − p) / n over the variance that the sentences show (Kish's design effect, Survey Sampling, 1965). 1 if all
    misses are equal, or belong to one sentence.
    """
    n, mean = len(np.unique(units)), misses.mean()
    left = np.bincount(np.unique(units, return_inverse=True)[1], weights=misses - mean)
    seen = float(left @ left) * n / max(n - 1, 1) / len(misses) ** 2
    return min(1.0, float(mean * (1 - mean) / len(misses) / seen)) if seen else 1.0


def _ends(parts: Sequence[Values], each: float) -> Values:
    """The ends (2, bin) of Wilson's interval of each part's mean; each value counts as `each` of a try."""
    return np.transpose([wilson_interval(part.sum() * each, len(part) * each) for part in parts])


def _by_index(sentences: Sequence[Sentence], misses: Values, places: NDArray[np.int64], most: int = 10) -> Values:
    """Mean over sentences of the misses, of the tokens at `places`, at their first, second … token; NaN if none was
    judged."""
    judged = np.full(int(places[-1]) + 1, np.nan)
    judged[places] = misses
    rows = np.full((len(sentences), most), np.nan)
    for row, sentence in enumerate(sentences):
        inside = judged[sentence.tokens.slice][:most]
        rows[row, : len(inside)] = inside
    known = np.isfinite(rows).any(axis=0)
    means = np.full(most, np.nan)
    means[known] = np.nanmean(rows[:, known], axis=0)
    return means
