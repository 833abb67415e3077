"""When the model knew its answer: confidence along the thinking, and whether it was there from the start (arXiv
2605.24396)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import wilson_interval
from reasonscope.data.text.answers import equivalent
from reasonscope.data.trace import Sampling, Trace
from reasonscope.probes.generation.branches import Writer
from reasonscope.probes.generation.forced_answers import Decoder, forced_answers

METHOD = "confidence"


@dataclass(frozen=True, kw_only=True)
class _ConfidenceClass:
    """`spearman` correlation of confidence with the position of the cut; `kind` stays None if the curve is constant."""

    spearman: float
    kind: Literal["progressive", "premature"] | None


def _cut_points(length: int, parts: int) -> list[int]:
    """Where to cut `length` tokens into `parts` equal ones: 0 … length, to the nearest token, halves to even; parts
    + 1 cuts."""
    if parts < 1:
        raise InputError(f"{parts} parts; at least 1 is needed")
    return [round(length * k / parts) for k in range(parts + 1)]


def classify_confidence(confidence: ArrayLike, *, threshold: float = 0.4) -> _ConfidenceClass:
    """Progressive if confidence (cut,) rises with the cut, Spearman above `threshold`; else premature."""
    values = np.asarray(confidence, dtype=np.float64)
    if len(values) < 2 or np.isnan(values).any() or np.ptp(values) == 0:
        return _ConfidenceClass(spearman=float("nan"), kind=None)
    rho = float(np.corrcoef(rankdata(values), np.arange(len(values)))[0, 1])
    return _ConfidenceClass(spearman=rho, kind="progressive" if rho > threshold else "premature")


def _overconfidence(pass_rate: ArrayLike) -> float:
    """Σ_k w_k · pass_rate_k with weights from .5 at the first cut evenly down to −.5 at the last: high if the model
    knew early."""
    rates = np.asarray(pass_rate, dtype=np.float64)
    return float(np.linspace(0.5, -0.5, len(rates)) @ rates)


def confidence_of_trace(
    writer: Writer,
    trace: Trace,
    stub: Sequence[int],
    decode: Decoder,
    *,
    parts: int = 10,
    samples: int = 8,
    sampling: Sampling | None = None,
    threshold: float = 0.4,
    foreign: str | None = None,
    seed: int = 0,
) -> Result:
    """Cut the thinking at several points, force an answer, and see how often it is the final one (arXiv 2605.24396).

    Args:
        writer: Writes the continuations: a `PrefixWriter` of the model, or a server of it.
        trace: The trace, with tokens.
        stub: Tokens that close the thinking and open the answer's box (see `closing_stub`).
        decode: Token ids to text.
        parts: The thinking is cut into so many equal parts.
        samples: Forced answers per cut.
        sampling: How to sample them; greedy if not given.
        threshold: Spearman above which confidence counts as progressive.
        foreign: An answer of another problem, for the null.
        seed: Random seed.

    Returns:
        Axis (cut,), parts + 1 long: share of forced answers that equal the model's OWN final answer. The null is the
        share that equals `foreign`; the interval is Wilson's, over the samples of each cut. `numbers`: spearman, kind,
        overconfidence against the gold answer, and the first two for the gold answer. Undefined, with the reason, for a
        trace without thinking or without a final answer.

    Raises:
        InputError: For a trace without tokens.

    Departures: a constant curve has no class (its correlation is undefined); cuts are in tokens of the thinking alone.

    Example:
        results = rs.analyse("confidence", "runs/mine", samples=16)
        results[0].values  # confidence at 0 %, 10 %, … of the thinking
        results[0].numbers["kind"]
    """
    if reason := _unfit(trace):
        return undefined(method=METHOD, quantity="confidence", unit="1", reason=reason, provenance={"trace": trace.id})
    places = [
        int(trace.thinking_positions[0]),
        *(trace.thinking_positions + 1).tolist(),
    ]  # after 0, 1, … tokens of thinking
    cuts = [places[cut] for cut in _cut_points(trace.n_thinking_tokens, parts)]
    sampling = sampling or Sampling(temperature=1.0, max_new_tokens=32, seed=seed)
    forced = forced_answers(writer, trace, cuts, stub, decode, samples=samples, sampling=sampling)
    own = classify_confidence(forced.own, threshold=threshold)
    gold = classify_confidence(forced.correct, threshold=threshold)
    lucky = np.array([np.mean([equivalent(answer, foreign or "") for answer in row]) for row in forced.answers])
    ends = np.transpose([wilson_interval(round(share * samples), samples) for share in forced.own])
    return Result(
        method=METHOD,
        quantity="share of forced answers that are the final one",
        unit="1",
        axes=(Axis.of("cut", [f"{k / parts:.0%}" for k in range(parts + 1)]),),
        values=forced.own,
        null=Band.of(0.0, lucky, lucky.shape, f"answer of another problem ({foreign})") if foreign else None,
        null_missing="" if foreign else "no answer of another problem to compare with",
        interval=Band.of(ends[0], ends[1], forced.own.shape, f"Wilson's, of {samples} samples per cut, 95%"),
        arrays={"cuts": np.array(cuts), "correct": forced.correct},
        numbers={
            "spearman": own.spearman,
            "kind": own.kind,
            "spearman_gold": gold.spearman,
            "overconfidence": _overconfidence(forced.correct),
            "unanswered": float(np.mean([answer is None for row in forced.answers for answer in row])),
            "answers": [list(row) for row in forced.answers],
        },
        provenance={"trace": trace.id, "samples": samples, "temperature": sampling.temperature, "seed": sampling.seed},
    )


def _unfit(trace: Trace) -> str:
    if trace.state not in ("closed", "truncated") or not trace.n_thinking_tokens:
        return f"the trace has no thinking ({trace.state})"
    if trace.final_answer is None:
        return "the trace has no final answer to compare with"
    return ""
