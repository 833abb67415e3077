"""Where a model was unsure: token entropies, forking tokens (arXiv 2506.01939), phases (2510.08026) and windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import mean_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.align import token_strings
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Trace
from reasonscope.data.variants import Variant, is_published

METHOD = "entropy"
_FIXED_THRESHOLD = 0.672  # nats: the paper's fixed threshold, the 80th percentile of Qwen3-8B's thinking on AIME

TokenMask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Phases:
    """Mean entropy of the thinking and of the answer in nats; `penalty` = max(0, thinking − α · answer), PEAR's
    reward term."""

    thinking: float
    answer: float
    penalty: float


def _phase_entropy(thinking: Values, answer: Values, *, alpha: float = 1.0) -> _Phases:
    """The phases from the entropies of their tokens (token,), without the tags; NaN for a phase without tokens."""
    before, behind = _mean(thinking), _mean(answer)
    penalty = max(0.0, before - alpha * behind) if np.isfinite([before, behind]).all() else float("nan")
    return _Phases(thinking=before, answer=behind, penalty=penalty)


def _window_entropy(entropies: Values, window: int, *, variant: Variant = "corrected") -> Values:
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
    provenance = {"trace": trace.id, **cut_provenance(sentences)}
    if values is None or not np.isfinite(values).any():
        reason = "no entropies were recorded with this trace; replay it through its model, or record it"
        return undefined(method=METHOD, quantity="entropy", unit="nats", reason=reason, provenance=provenance)
    known = np.isfinite(values)
    threshold = float(np.percentile(values[known], percentile))
    first = trace.n_prompt_tokens
    tokens = np.arange(first, len(trace.token_ids))
    inside = known & np.isin(tokens, trace.thinking_positions)
    behind = known & (tokens >= trace.tokens.answer.start) & (tokens < trace.tokens.answer.stop)
    phases = _phase_entropy(values[inside], values[behind])
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
            "forking_fixed": known & (values > _FIXED_THRESHOLD),
            "window": _window_entropy(values, window),
        },
        numbers={
            "threshold": threshold,
            "thinking": {"value": phases.thinking, "ci": [float(interval.low), float(interval.high)]},
            "answer": phases.answer,
            "penalty": phases.penalty,
            "forking_words": _forking_words(trace, values, known & (values >= threshold)),
        },
        provenance={**provenance, "percentile": percentile, "window": window},
    )


def _mean_entropy_by_word(
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
    means = _mean_entropy_by_word([chosen], [values[mask]], least=1)
    return dict(list(means.items())[:most])


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else float("nan")
