"""One trace, every signal: how each ranks the sentences, and how far the signals agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr

from reasonscope.analysis.attention.reading import mean_effect
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import holm, serial_correlation
from reasonscope.data.arrays import Values
from reasonscope.data.sentence_cut import cut_hash, cut_provenance
from reasonscope.data.trace import Sentence, Trace

METHOD = "agreement"
# The signals: a method, and which of its lines or arrays. Higher means more critical in all of them.
_LINES = (
    ("mi", ""),
    ("entropy", ""),
    ("anchors", "resampling_kl"),
    ("anchors", "counterfactual_kl"),
    ("anchors", "forced_kl"),
    ("receiver_scores", ""),
    ("suppression", ""),
    ("replacement", ""),
    ("close_attention", ""),
    ("recurrence", ""),
)
METHODS = tuple(dict.fromkeys(method for method, _ in _LINES))


@dataclass(frozen=True, kw_only=True)
class _TraceSignals:
    """The signals of one trace.

    Attributes:
        lines: By name, one number per sentence (sentence,).
        left_out: By method, why its result is not among them.
    """

    lines: Mapping[str, Values]
    left_out: Mapping[str, str] = field(default_factory=dict)


def signals_of(results: Mapping[str, Result], sentences: Sequence[Sentence]) -> _TraceSignals:
    """Every known signal of one trace, one number per sentence.

    Results over sentences have to be over these very sentences: the hash of the cut in their provenance says so, and their number says
    nothing. Effects of sentences on sentences (suppression, replacement) count as the mean effect that a sentence has on all later ones.

    Args:
        results: Results of the trace by method; those of unknown methods are ignored.
        sentences: The sentences of the trace (`cut_trace`).
    """
    found, left_out = dict[str, Values](), dict[str, str]()
    for method, name in _LINES:
        result = results.get(method)
        if result is None:
            continue
        if why := _not_joined(result, sentences):
            left_out[method] = why
        elif result.axes[-1].name == "source":
            found[method] = mean_effect(result.values)
        elif not name or name in result.axes[0].labels:
            found[f"{method}: {name}" if name else method] = _per_sentence(result, sentences, name or None)
    return _TraceSignals(lines=found, left_out=left_out)


def _not_joined(result: Result, sentences: Sequence[Sentence]) -> str:
    """Why a result cannot be laid beside these sentences; empty if it can."""
    if not result.measured:
        return f"not measured: {result.reason}"
    if result.axes[-1].name not in ("sentence", "source"):
        return ""  # tokens need no cut
    cut = result.provenance.get("cut")
    if cut is None:
        return "it does not say which sentences it is over (a result of an earlier version); run the analysis again"
    if cut != cut_hash(sentences) or len(result.axes[-1]) != len(sentences):
        return "it is over another cut of the trace into sentences; run the analysis again"
    return ""


def _per_sentence(result: Result, sentences: Sequence[Sentence], name: str | None = None) -> Values:
    """One number per sentence (sentence,), from a result over sentences, or over tokens by their mean within the
    sentence.

    Of a further axis, the label `name` or else the last one is read. NaN for a sentence without a measured token.
    """
    axis = result.axes[-1]
    line = result.values.reshape(-1, len(axis))
    labels = result.axes[0].labels if result.values.ndim > 1 else ("",)
    values = line[labels.index(name) if name in labels else -1]
    if axis.name == "sentence":
        return np.asarray(values, dtype=np.float64)
    places = np.array([int(label) for label in axis.labels])
    found = np.full(len(sentences), np.nan)
    for i, sentence in enumerate(sentences):
        inside = values[(places >= sentence.tokens.start) & (places < sentence.tokens.stop)]
        inside = inside[np.isfinite(inside)]
        if len(inside):
            found[i] = inside.mean()
    return found


def signal_agreement(
    trace: Trace,
    sentences: Sequence[Sentence],
    signals: Mapping[str, Values],
    *,
    left_out: Mapping[str, str] | None = None,
    n_permutations: int = 500,
    seed: int = 0,
) -> Result:
    """Rank the sentences of a trace by every signal, and say where the signals agree.

    Args:
        trace: The trace.
        sentences: Its sentences.
        signals: By name, (sentence,) values; higher means more critical (see `signals_of`).
        left_out: By method, why its signal is missing; kept in `numbers`.
        n_permutations: Permutations for the null.
        seed: Random seed.

    Returns:
        Axes (signal, sentence): ranks from 0 to 1 within the trace, NaN if not measured. The null is signals without
        information: the band of each sentence is 95 % of the mean rank over permuted signals. `numbers`: for each pair
        of signals their rank correlation, the part of it `beyond_place` (`serial_correlation`) with its p-value, and
        the same corrected for all pairs (Holm); `top`, the sentences whose mean rank is above the band, highest first.
        Undefined, with the reason, for fewer than 4 sentences or no signals.

    Example:
        rs.analyse("suppression", "runs/mine")
        rs.analyse("agreement", "runs/mine")  # joins every result that the run has
        result = next(rs.open_run("runs/mine").results("agreement"))
    """
    n = len(sentences)
    provenance = {"trace": trace.id, "seed": seed, **cut_provenance(sentences)}
    missing = dict(left_out or {})
    if n < 4 or not signals:
        reason = f"{n} sentences and {len(signals)} signals; at least 4 and 1 are needed"
        reason += "".join(f"; {method}: {why}" for method, why in missing.items())
        return undefined(
            method=METHOD,
            quantity="rank within the trace",
            unit="1",
            reason=reason,
            numbers={"left_out": missing},
            provenance=provenance,
        )
    ranks = np.stack([_ranks(values) for values in signals.values()])
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [np.nanmean([_permuted(line, rng) for line in _filled(ranks)], axis=0) for _ in range(n_permutations)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = np.nanmean(_filled(ranks), axis=0)
    order = np.argsort(-mean, kind="stable")
    return Result(
        method=METHOD,
        quantity="rank within the trace",
        unit="1",
        axes=(Axis.of("signal", signals), Axis.of("sentence", n)),
        values=ranks,
        null=Band.of(low, high, ranks.shape, f"mean rank of permuted signals, 95% of {n_permutations}"),
        reason="a signal is not defined on every sentence" if np.isnan(ranks).any() else "",
        arrays={"mean_rank": mean},
        numbers={
            "top": [int(i) for i in order if mean[i] > high],
            "agreement": _agreement(signals),
            "left_out": missing,
            "texts": [sentence.text for sentence in sentences],
            "tags": [sentence.tag for sentence in sentences],
        },
        provenance=provenance,
    )


def _ranks(values: Values) -> Values:
    """Share of the other measured sentences that are lower: 0 for the lowest, 1 for the highest, ties in between."""
    known = np.isfinite(values)
    ranks = np.full(len(values), np.nan)
    if known.sum() > 1:
        inside = values[known]
        below = (inside[:, None] > inside).sum(axis=1) + 0.5 * ((inside[:, None] == inside).sum(axis=1) - 1)
        ranks[known] = below / (known.sum() - 1)
    return ranks


def _filled(ranks: Values) -> Values:
    """An unmeasured sentence gets the middle rank, so that it counts neither as critical nor as uncritical."""
    return np.where(np.isfinite(ranks), ranks, 0.5)


def _permuted(line: Values, rng: np.random.Generator) -> Values:
    return np.asarray(rng.permutation(line), dtype=np.float64)


def _agreement(signals: Mapping[str, Values]) -> dict[str, dict[str, float]]:
    found = {}
    for one, other in combinations(signals, 2):
        both = np.isfinite(signals[one]) & np.isfinite(signals[other])
        x, y = signals[one][both], signals[other][both]
        if both.sum() < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        beyond, p_value = serial_correlation(x, y)
        found[f"{one} ~ {other}"] = {
            "spearman": float(spearmanr(x, y).statistic),
            "beyond_place": beyond,
            "p_value": p_value,
        }
    corrected = holm([pair["p_value"] for pair in found.values()])
    return {name: {**pair, "holm": float(q)} for (name, pair), q in zip(found.items(), corrected, strict=True)}
