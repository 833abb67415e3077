"""How the hidden state moves during thinking: net, cumulative and aligned change (Tracing the Traces, arXiv
2510.10494)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.analysis.statistics import null_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import mean_estimate
from reasonscope.data.trace import Span, Trace
from reasonscope.probes.architecture.sites import Site

METHOD, UNIT = "trajectory", "residual norm (net), residual norm (cumulative), cosine (aligned)"
SIGNALS = ("net", "cumulative", "aligned")


@dataclass(frozen=True, kw_only=True, eq=False)
class _TrajectorySignals:
    """`net` and `cumulative` in units of the residual stream, `aligned` a cosine: (layer,), NaN for fewer than two
    segments."""

    net: Values
    cumulative: Values
    aligned: Values


def _blocks(n_tokens: int, block: int) -> list[Span]:
    """Consecutive spans of `block` tokens; the last one may be shorter."""
    if block < 1:
        raise InputError(f"blocks of {block} tokens; at least 1 is needed")
    return [Span(start, min(start + block, n_tokens)) for start in range(0, n_tokens, block)]


def _segment_mean(chunks: Iterable[NDArray[np.generic]] | NDArray[np.generic], spans: Sequence[Span]) -> Values:
    """Mean hidden state of each span of tokens, (span, …) float64, in one pass.

    `chunks` are consecutive pieces (token, …) of the hidden states, so that only one of them and the sums are in
    memory; one array is one chunk. Spans may overlap and leave gaps. Raises InputError for an empty span or one past
    the last token.
    """
    pieces = [chunks] if isinstance(chunks, np.ndarray) else chunks
    if any(not len(span) for span in spans):
        raise InputError("a span has no tokens, so it has no mean; leave it out")
    sums: Values | None = None
    seen = 0
    for piece in pieces:
        values = np.asarray(piece, dtype=np.float64)
        if sums is None:
            sums = np.zeros((len(spans), *values.shape[1:]))
        for row, span in enumerate(spans):
            inside = values[max(span.start - seen, 0) : max(span.stop - seen, 0)]
            sums[row] += inside.sum(axis=0)
        seen += len(values)
    if sums is None or any(span.stop > seen for span in spans):
        raise InputError(f"spans up to {max((s.stop for s in spans), default=0)} of {seen} tokens")
    lengths = np.array([len(span) for span in spans], dtype=np.float64)
    return np.asarray(sums / lengths.reshape(-1, *[1] * (sums.ndim - 1)), dtype=np.float64)


def signals(segment_means: Values) -> _TrajectorySignals:
    """The three signals of `segment_means` (layer, segment, d_model).

    net = ‖h_N − h_1‖ / (N − 1); cumulative = Σ ‖h_n − h_{n−1}‖; aligned = mean_n cos(h_n − h_{n−1}, h_N − h_1), where a
    zero vector counts as cosine 0. Departure: net is divided by the number of steps N − 1, as the released code does;
    the text says N.
    """
    n_layers, n, _ = segment_means.shape
    if n < 2:
        nothing = np.full(n_layers, np.nan)
        return _TrajectorySignals(net=nothing, cumulative=nothing.copy(), aligned=nothing.copy())
    steps = np.diff(segment_means, axis=1)
    drift = segment_means[:, -1] - segment_means[:, 0]
    lengths, reach = np.linalg.norm(steps, axis=2), np.linalg.norm(drift, axis=1)
    products = np.einsum("lnd,ld->ln", steps, drift)
    norms = lengths * reach[:, None]
    cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return _TrajectorySignals(net=reach / (n - 1), cumulative=lengths.sum(axis=1), aligned=cosines.mean(axis=1))


def random_walk(segment_means: Values, *, n_controls: int, seed: int = 0) -> Values:
    """The signals of a walk with the same step lengths in random directions: (draw, signal, layer).

    Directions are uniform on the sphere: aligned is then about 1/√(N − 1), not 0, since the steps sum to the drift.
    """
    n_layers, n, width = segment_means.shape
    lengths = np.linalg.norm(np.diff(segment_means, axis=1), axis=2)
    rng = np.random.default_rng(seed)
    drawn = np.empty((n_controls, len(SIGNALS), n_layers))
    for i in range(n_controls):
        steps = rng.standard_normal((n_layers, n - 1, width))
        steps *= (lengths / np.linalg.norm(steps, axis=2))[:, :, None]
        drawn[i] = _stacked(signals(_walk(steps)))
    return drawn


def _walk(steps: Values) -> Values:
    """The position of a walk from 0 before the first and after each of `steps` (layer, step, d_model)."""
    return np.concatenate([np.zeros_like(steps[:, :1]), np.cumsum(steps, axis=1)], axis=1)


def _stacked(found: _TrajectorySignals) -> Values:
    """(signal, layer)."""
    return np.stack([found.net, found.cumulative, found.aligned])


def segment_length(traces: Iterable[Trace]) -> int:
    """Tokens of a segment for a run: the paper's 500, or an eighth of the median thinking if that is less (at least 10)."""
    lengths = [trace.n_thinking_tokens for trace in traces if trace.n_thinking_tokens]
    return max(10, min(500, int(np.median(lengths)) // 8)) if lengths else 500


def trajectory_of_trace(
    trace: Trace,
    read: Callable[[Site], NDArray[np.generic]],
    sites: Sequence[Site],
    *,
    block: int = 500,
    n_controls: int = 100,
    seed: int = 0,
) -> Result:
    """How far and how straight the hidden state moves during thinking (Tracing the Traces, arXiv 2510.10494).

    Args:
        trace: The trace.
        read: Gives the activations (row, d_model) of the trace at a site; one site is in memory at a time.
        sites: The sites.
        block: Tokens per segment.
        n_controls: Random walks for the null.
        seed: Random seed.

    Returns:
        Axes (signal, site), over the thinking with its closing tag: the net and cumulative change in residual norm, and
        the cosine of the steps with the drift. The null is a random walk with the same step lengths (its cumulative
        change is the same by construction). The cumulative change has an interval over its steps; net and aligned have
        none, because steps drawn twice point the same way and reach further than any walk did. `numbers`: the mean over
        layers, which is the published score, and the number of segments. NaN, with the reason, for thinking of one
        segment.

    Raises:
        InputError: For a block shorter than one token.

    Departures: net is divided by the number of steps N − 1, as the released code does; the text says N.

    Example:
        store = rs.open_run("runs/mine").store
        trace, sites = store.trace("p1/0"), [rs.Site.parse(site) for site in store.sites]
        result = rs.analysis.trajectory_of_trace(trace, lambda site: store.activations(trace.id, str(site)), sites)
    """
    axes = (Axis.of("signal", SIGNALS), Axis.of("site", sites))
    shape = (len(SIGNALS), len(sites))
    places = trace.without_gaps(Span(trace.tokens.open.start, max(trace.tokens.open.start, trace.tokens.close.stop)))
    provenance = {"trace": trace.id, "block": block, "seed": seed}
    reason = ""
    if trace.state not in ("closed", "truncated"):
        reason = f"the trace has no thinking ({trace.state})"
    else:
        places = places[places < len(trace.token_ids) - 1]
        rows = len(places)
        if rows <= block:
            reason = (
                f"the thinking has {rows} tokens, which is one segment of {block}; ask for shorter segments, such as "
                f"--block {max(rows // 8, 1)}"
            )
    if reason:
        values = np.full(shape, np.nan)
        return Result(
            method=METHOD, quantity="change of the segment means", unit=UNIT, axes=axes, values=values,
            reason=reason, provenance=provenance,
        )  # fmt: skip
    cut = _blocks(rows, block)
    means = np.stack([_segment_mean(np.asarray(read(site))[places], cut) for site in sites])
    null = random_walk(means, n_controls=n_controls, seed=seed)
    values = _stacked(signals(means))
    lengths = np.linalg.norm(np.diff(means, axis=1), axis=2)
    ends = np.array([_sum_ends(line) for line in (*lengths, lengths.mean(axis=0))])
    none = np.full(len(sites), np.nan)
    low_end, high_end = (np.stack([none, ends[:-1, side], none]) for side in (0, 1))
    return Result(
        method=METHOD,
        quantity="change of the segment means",
        unit=UNIT,
        axes=axes,
        values=values,
        null=null_band(null, "random walk of the same step lengths", shape=shape),
        interval=Band.of(
            low_end, high_end, shape, "of the cumulative change over its steps, 95%; net and aligned are of one path"
        ),
        numbers={
            "mean_net": {"value": float(values[0].mean())},
            "mean_cumulative": {
                "value": float(values[1].mean()),
                "ci": ends[-1].tolist(),
            },
            "mean_aligned": {"value": float(values[2].mean())},
            "segments": len(cut),
            "aligned_of_random_walk": float(null[:, 2].mean()),
        },
        provenance=provenance,
    )


def _sum_ends(lengths: Values) -> tuple[float, float]:
    """The interval of the sum of `lengths` (step,); NaN for one step."""
    if len(lengths) < 2:
        return np.nan, np.nan
    low, high = mean_estimate(lengths, shares=False).interval
    return max(0.0, len(lengths) * low), len(lengths) * high


def published_scores(results: Sequence[Result]) -> Mapping[str, Values]:
    """The mean over sites of each signal, (trace,) by its name; NaN for a trace without it."""
    return {name: np.array([float(np.mean(r.at(signal=name))) for r in results], dtype=np.float64) for name in SIGNALS}
