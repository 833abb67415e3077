"""Where a model was unsure: token entropies, forking tokens (arXiv 2506.01939), phases (2510.08026) and windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import mean_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.text.align import token_strings
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Trace
from reasonscope.data.variants import Variant, is_published

METHOD = "entropy"
FIXED_THRESHOLD = 0.672  # nats: the paper's fixed threshold, the 80th percentile of Qwen3-8B's thinking on AIME

Per = Literal["corpus", "batch", "sequence"]
TokenMask = NDArray[np.bool_]


def entropy_of(logits: Tensor, *, temperature: float, chunk: int = 16_384) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), exact over the whole vocabulary: (…, vocab) to (…,) float64.

    Works through the vocabulary in chunks: H = log Z − Σ p x with x the scaled logits, so that no second (…, vocab)
    array is made.
    """
    log_z = _log_partition(logits, temperature, chunk)
    weighted = torch.zeros_like(log_z)
    for part in logits.split(chunk, dim=-1):
        scaled = part.to(log_z) / temperature
        weighted += (torch.exp(scaled - log_z[..., None]) * scaled.clamp(min=-1e30)).sum(dim=-1)
    return log_z - weighted


def _log_partition(logits: Tensor, temperature: float, chunk: int) -> Tensor:
    if temperature <= 0:
        raise InputError(f"temperature {temperature}; it has to be above 0 (greedy decoding has no entropy)")
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    total = logits.new_full(logits.shape[:-1], -torch.inf, dtype=precise)
    for part in logits.split(chunk, dim=-1):
        total = torch.logaddexp(total, (part.to(precise) / temperature).logsumexp(dim=-1))
    return total


def forking_thresholds(
    entropies: Sequence[Values], *, percentile: float = 80.0, per: Per = "corpus", batch: int = 1
) -> Values:
    """The entropy that a forking token reaches, one per sequence: a percentile over the corpus, each batch, or each
    sequence.

    The paper's analysis uses the corpus, its training each batch, several ports each sequence.
    """
    if not entropies or any(not len(line) for line in entropies):
        raise InputError("a sequence has no entropies; leave it out")
    size = {"corpus": len(entropies), "batch": batch, "sequence": 1}[per]
    parts = [entropies[start : start + size] for start in range(0, len(entropies), size)]
    return np.concatenate([np.full(len(part), np.percentile(np.concatenate(part), percentile)) for part in parts])


def forking_masks(entropies: Sequence[Values], thresholds: Values) -> list[TokenMask]:
    """Which tokens fork: those with at least the sequence's threshold of entropy."""
    return [np.asarray(line >= threshold) for line, threshold in zip(entropies, thresholds, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Mean entropy of the thinking and of the answer in nats; `penalty` = max(0, thinking − α · answer), PEAR's
    reward term."""

    thinking: float
    answer: float
    penalty: float


def phase_entropy(thinking: Values, answer: Values, *, alpha: float = 1.0) -> Phases:
    """The phases from the entropies of their tokens (token,), without the tags; NaN for a phase without tokens."""
    before, behind = _mean(thinking), _mean(answer)
    penalty = max(0.0, before - alpha * behind) if np.isfinite([before, behind]).all() else float("nan")
    return Phases(thinking=before, answer=behind, penalty=penalty)


def window_entropy(entropies: Values, window: int, *, variant: Variant = "corrected") -> Values:
    """Mean entropy of the `window` tokens that follow each token; NaN if fewer are left (ARES, shawn0728/ARES).

    `variant="published"` fills these in like the published code: with the mean of all values before them, the first
    with its own entropy.
    """
    if window < 1:
        raise InputError(f"a window of {window} tokens; at least 1 is needed")
    means = np.full(len(entropies), np.nan)
    if len(entropies) > window:
        means[: len(entropies) - window] = np.lib.stride_tricks.sliding_window_view(entropies[1:], window).mean(axis=1)
    for token in np.flatnonzero(np.isnan(means)) if is_published(variant) else ():
        means[token] = means[:token].mean() if token else entropies[0]
    return means


def listed_entropy(logprobs: Sequence[float], *, tail: bool = True) -> float:
    """Entropy in nats from the listed log-probabilities of a token's best candidates; `tail` counts the rest as one
    candidate."""
    listed = np.asarray(logprobs, dtype=np.float64)
    rest = max(0.0, 1.0 - float(np.exp(listed).sum()))
    return float(-(np.exp(listed) * listed).sum() - (rest * np.log(rest) if tail and rest > 0 else 0.0))


@dataclass(frozen=True, kw_only=True)
class WindowCounts:
    """Crucial words that open a stretch of high entropy (`valid`) or do not (`invalid`); `soft_cost` in nats above
    `threshold`."""

    threshold: float
    valid: int
    invalid: int
    soft_cost: float


def high_window_counts(
    words: Sequence[str],
    window_means: Values,
    crucial: Sequence[str],
    *,
    percentile: float = 95.0,
    reference: Values | None = None,
) -> WindowCounts:
    """How many of the `crucial` words open a window above the percentile of the trace's windows (ARES).

    `words` (token,): the most probable token at each position. Departure: only complete windows count towards the
    percentile; the published code includes the windows that it fills in, which `reference` (token,) provides:
    `window_entropy(…, variant="published")`.
    """
    known = np.isfinite(window_means)
    judged = window_means[known] if reference is None else reference
    threshold = float(np.percentile(judged, percentile)) if len(judged) else float("nan")
    wanted = {word.lower() for word in crucial}
    named = np.array([word.lstrip("Ġ▁ ").strip().lower() in wanted for word in words], dtype=bool)
    chosen = window_means[known & named]
    return WindowCounts(
        threshold=threshold,
        valid=int((chosen >= threshold).sum()),
        invalid=int((chosen < threshold).sum()),
        soft_cost=float(np.maximum(chosen - threshold, 0.0).sum()),
    )


def entropy_of_trace(
    trace: Trace,
    *,
    sentences: Sequence[Sentence] = (),
    percentile: float = 80.0,
    window: int = 8,
    n_resamples: int = 500,
    seed: int = 0,
) -> Result:
    """The entropy of each generated token of a trace, as recorded at its sampling temperature (arXiv 2506.01939).

    Args:
        trace: A trace that was generated here, with entropies.
        sentences: Its sentences, over which intervals are resampled (at least two).
        percentile: Of the trace's entropies; tokens above it fork.
        window: Tokens per window.
        n_resamples: Resamples for the intervals.
        seed: Random seed.

    Returns:
        Axis (token,): nats. The null is the middle 95 % of the trace's own entropies, in which a token's place says
        nothing. `arrays`: `forking` by the trace's own percentile, `forking_fixed` by .672 nats, and `window` means.
        `numbers`: the phases (thinking and answer, as far as the model wrote them), with the 95 % interval of the
        thinking's mean, and the words that fork most. Undefined, with the reason, for a trace without entropies.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        result = rs.analysis.entropy_of_trace(trace, sentences=rs.sentences(trace))
        result.arrays["forking"].mean()
    """
    values = None if trace.entropies is None else np.asarray(trace.entropies, dtype=np.float64)
    if values is None or not np.isfinite(values).any():
        reason = "no entropies were recorded with this trace; replay it through its model, or record it"
        return undefined(method=METHOD, quantity="entropy", unit="nats", reason=reason, provenance={"trace": trace.id})
    known = np.isfinite(values)
    threshold = float(np.percentile(values[known], percentile))
    first = trace.n_prompt_tokens
    tokens = np.arange(first, len(trace.token_ids))
    inside, behind = (
        known & (tokens >= part.start) & (tokens < part.stop) for part in (trace.tokens.thinking, trace.tokens.answer)
    )
    phases = phase_entropy(values[inside], values[behind])
    units = sentence_of_each(sentences, len(trace.token_ids))[first:][inside]
    low, high = np.quantile(values[known], [0.025, 0.975])
    interval = mean_band(values[inside], units, n_resamples=n_resamples, seed=seed)
    return Result(
        method=METHOD,
        quantity="entropy of the next-token distribution",
        unit="nats",
        axes=(Axis.of("token", [str(first + i) for i in range(len(values))]),),
        values=values,
        null=Band.of(low, high, values.shape, "the trace's own entropies, 95%"),
        reason="" if known.all() else f"{int((~known).sum())} tokens were not generated by the model",
        arrays={
            "forking": known & (values >= threshold),
            "forking_fixed": known & (values > FIXED_THRESHOLD),
            "window": window_entropy(values, window),
        },
        numbers={
            "threshold": threshold,
            "thinking": {"value": phases.thinking, "ci": [float(interval.low), float(interval.high)]},
            "answer": phases.answer,
            "penalty": phases.penalty,
            "forking_words": _forking_words(trace, values, known & (values >= threshold)),
        },
        provenance={"trace": trace.id, "percentile": percentile, "window": window},
    )


def mean_entropy_by_word(
    words: Sequence[Sequence[str]], entropies: Sequence[Values], *, least: int = 100
) -> dict[str, float]:
    """Mean entropy of each token type that occurs at least `least` times, highest first (the paper's figure 2)."""
    sums: dict[str, list[float]] = {}
    for line, values in zip(words, entropies, strict=True):
        for word, value in zip(line, values, strict=True):
            if np.isfinite(value):
                sums.setdefault(word, []).append(float(value))
    means = {word: float(np.mean(values)) for word, values in sums.items() if len(values) >= least}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def _forking_words(trace: Trace, values: Values, mask: TokenMask, most: int = 10) -> dict[str, float]:
    pieces = token_strings(trace.text, trace.offsets)[trace.n_prompt_tokens :]
    chosen = [piece.strip() for piece, fork in zip(pieces, mask, strict=True) if fork]
    means = mean_entropy_by_word([chosen], [values[mask]], least=1)
    return dict(list(means.items())[:most])


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else float("nan")
