"""Who writes what a probe reads: its logit as an exact sum over heads, MLPs, biases and the embedding, and the total
effect of heads.

A probe of the residual stream is linear, and the stream is a sum, so each part's share is its product with the probe's
coefficients. That is the DIRECT effect. The TOTAL effect of a head includes what later layers make of it: ablate the
head and read again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from reasonscope.analysis.causal.head_edits import head_states, without_heads
from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.analysis.statistics import bootstrap_band, null_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import ArchitectureError, InputError, SiteError
from reasonscope.data.progress import tracked
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.heads import Head, all_heads
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.backends.base import Edit
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import Position, has_position, row_at
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.targets import How


@dataclass(frozen=True, kw_only=True, eq=False)
class _ProbeWrites:
    """Shares of a probe's logit at one token of each trace, in its unit (logits for a binary probe).

    `heads` (trace, layer, head), `mlps` and `biases` (trace, layer; of the output projections), `embedding` and `logit`
    (trace,). Layers after the probe's site write 0 to it. `intercept` is the probe's own.
    """

    heads: Values
    mlps: Values
    biases: Values
    embedding: Values
    intercept: float
    logit: Values

    @property
    def total(self) -> Values:
        """The sum of all shares (trace,), equal to `logit` up to rounding."""
        layers = self.heads.sum(axis=(1, 2)) + self.mlps.sum(axis=1) + self.biases.sum(axis=1)
        return np.asarray(layers + self.embedding + self.intercept)


def probe_writes(
    model: Model, probe: LinearProbe, traces: Sequence[Trace], *, position: Position = "window"
) -> _ProbeWrites:
    """The direct effects on `probe` at `position` of each trace (by default the last token of the close window).

    After a post-norm (Gemma, OLMo 2) a head's share is taken at the scale that the norm had for the whole. Departures
    from the code of arXiv 2510.06036: MLPs, biases and the embedding are counted, so that the sum can be checked, and
    is; nothing is called a cosine. Raises SiteError for a probe that does not read the residual stream, InputError for
    no traces, for a trace in which `position` was not read (a run that stopped right after its closing tag), or for a
    probe of another model.
    """
    last = _blocks_before(probe)
    if not traces:
        raise InputError("no traces on which to decompose the probe's logit; give at least one")
    probe.check(probe.site, model.fingerprint)
    found = [_of_trace(model, probe, trace, _row(trace, position), last) for trace in traces]
    return _ProbeWrites(
        intercept=probe.intercept,
        **{name: np.stack([one[name] for one in found]) for name in ("heads", "mlps", "biases", "embedding", "logit")},
    )


def _total_effects(
    model: Model,
    probe: LinearProbe,
    traces: Sequence[Trace],
    *,
    position: Position = "window",
    how: How = "zero",
    heads: Sequence[Head] | None = None,
    batch: int = 16,
    seed: int = 0,
) -> Values:
    """The effect of each head on `probe`'s logit, including later layers: untouched minus ablated (trace, head), `how`
    at `z.L` on all tokens.

    `heads` in the given order; by default every head of the blocks before the probe's site. One pass per head.
    """
    last = _blocks_before(probe)
    chosen = heads or [head for head in all_heads(model.layout) if head.layer < last]
    bank = head_states(model, traces) if how != "zero" else None
    sequences = [trace.token_ids[: _row(trace, position) + 1].tolist() for trace in traces]
    untouched = _logits(model, probe, sequences, {}, batch)
    ablated = [without_heads(model, [head], how=how, bank=bank, seed=seed) for head in chosen]
    each = tracked(ablated, "reading without each head", "heads")
    return np.stack([untouched - _logits(model, probe, sequences, one.edits, batch) for one in each], axis=1)


def probe_write_result(
    model: Model,
    probe: LinearProbe,
    traces: Sequence[Trace],
    *,
    position: Position = "window",
    how: How | None = "zero",
    n_controls: int = 100,
    seed: int = 0,
) -> Result:
    """Which heads write what a probe reads: the direct effect of each head on its logit, exact, and the total effect by
    ablation.

    Args:
        model: A native model.
        probe: A linear probe of the residual stream of this model.
        traces: The traces.
        position: Position at which the probe is read; by default the last token of the close window.
        how: How heads are ablated for the total effect; None skips it.
        n_controls: Random directions for the null.
        seed: Random seed.

    Returns:
        Axes (layer, head): mean over traces in the probe's unit, with a bootstrap interval over traces. The null is the
        same along random directions of the probe's length. `arrays`: `total` (layer, head) by ablation, `mlps` and
        `biases` (layer,). `numbers`: the rank correlation of direct and total, and the largest gap of the sum.

    Raises:
        SiteError: For a probe that does not read the residual stream.
        InputError: For no traces, a trace without the position, or a probe of another model.

    Departures: from the code of arXiv 2510.06036, MLPs, biases and the embedding are counted, so that the sum is exact
    and checked.

    Example:
        probe = rs.LinearProbe.load("runs/mine/probes/refusal.safetensors")
        result = rs.analysis.probe_write_result(model, probe, list(rs.open_run("runs/mine").store))
        result.values.min()  # the head that writes most against refusal
    """
    writes = probe_writes(model, probe, traces, position=position)
    shape = model.n_layers, model.n_heads
    total = np.zeros(shape)
    rho = float("nan")
    if how is not None:
        effects = _total_effects(model, probe, traces, position=position, how=how, seed=seed).mean(axis=0)
        heads = [head for head in all_heads(model.layout) if head.layer < _blocks_before(probe)]
        at = [head.layer for head in heads], [head.index for head in heads]
        total[at] = effects
        rho = float(spearmanr(writes.heads.mean(axis=0)[at], effects).statistic)
    return Result(
        method="probe_write",
        quantity=f"direct effect of a head on the probe at {probe.site}",
        unit="logits" if probe.task == "binary" else "the probe's target",
        axes=(Axis.of("layer", shape[0]), Axis.of("head", shape[1])),
        values=writes.heads.mean(axis=0),
        null=_random_directions(model, probe, traces, position, n_controls, seed),
        interval=bootstrap_band(lambda rows: writes.heads[rows].mean(axis=0), len(traces), seed=seed),
        arrays={"total": total, "mlps": writes.mlps.mean(axis=0), "biases": writes.biases.mean(axis=0)},
        numbers={
            "rank_correlation_direct_total": rho,
            "largest_gap": float(np.abs(writes.total - writes.logit).max()),
            "embedding": float(writes.embedding.mean()),
            "logit": float(writes.logit.mean()),
        },
        provenance={"traces": [trace.id for trace in traces], "position": str(position), "how": how, "seed": seed},
    )


def _random_directions(
    model: Model, probe: LinearProbe, traces: Sequence[Trace], position: Position, n: int, seed: int
) -> Band:
    units = np.random.default_rng(seed).standard_normal((n, len(probe.coef)))
    units *= np.linalg.norm(probe.coef) / np.linalg.norm(units, axis=1, keepdims=True)
    last = _blocks_before(probe)
    sums = np.zeros((model.n_layers, model.n_heads, n))
    for trace in tracked(traces, "writing along random directions", "traces"):
        seen = _states(model, trace, _row(trace, position), last, probe.site)
        for layer in _with_heads(model, last):
            heads = model.layout.of_block[layer].n_heads
            sums[layer, :heads] += (_head_writes(model, seen, layer) @ torch.from_numpy(units.T)).numpy()
    return null_band(np.moveaxis(sums / len(traces), -1, 0), "random directions of the probe's length")


def _row(trace: Trace, position: Position) -> int:
    if not has_position(trace, position):
        raise InputError(f"trace {trace.id!r} ({trace.state} thinking) has no position {position}; leave it out")
    return row_at(trace, position)


def _blocks_before(probe: LinearProbe) -> int:
    """How many blocks have written to the stream at the probe's site."""
    if probe.site.point not in ("resid_pre", "resid_post"):
        raise SiteError(f"the probe reads {probe.site}; only resid_pre and resid_post are sums over heads and MLPs")
    return probe.site.layer + (probe.site.point == "resid_post")


def _with_heads(model: Model, last: int) -> list[int]:
    """The blocks before `last` that have heads. Raises ArchitectureError if blocks scale what earlier ones wrote."""
    if model.layout.scales_stream:
        raise ArchitectureError(
            f"{model.layout.model_type} scales its whole stream in each block, so a probe's logit is not a sum over heads; "
            "use the total effect (total_effects) instead"
        )
    return [layer for layer in model.layout.layers_with("z") if layer < last]


def _states(model: Model, trace: Trace, row: int, last: int, read: Site) -> Mapping[Site, Tensor]:
    """The activations at `row` of a trace at every part of the blocks before `last`, in float64."""
    points: tuple[Point, ...] = ("z", "attn_out", "mixer_out", "mlp_out")
    parts = (Site(p, i) for p in points for i in model.layout.layers_with(p) if i < last)
    sites = [read, Site("resid_pre", 0), *parts]
    seen = replay(model, [trace.token_ids[: row + 2].tolist()], list(dict.fromkeys(sites)))[0]
    return {site: state[row].double().cpu() for site, state in seen.items()}


def _head_writes(model: Model, seen: Mapping[Site, Tensor], layer: int) -> Tensor:
    """What each head adds to the stream (head, d_model), float64."""
    weight, bias = model.layout.output_weights(model.hf, layer)
    written = torch.einsum("hd,hdm->hm", seen[Site("z", layer)], weight.detach().double().cpu())
    return written * _post_norm(model, seen, layer, written, bias)


def _post_norm(model: Model, seen: Mapping[Site, Tensor], layer: int, written: Tensor, bias: Tensor | None) -> Tensor:
    """The factor (d_model,) of the norm after the output projection here; 1 without one."""
    if not model.layout.of_block[layer].has_post_norm:
        return torch.ones(written.shape[-1], dtype=torch.float64)
    norm = model.layout.module(model.hf, Site("attn_out", layer))
    weight = next(norm.parameters())
    with torch.no_grad():  # 1e3: large enough that the norm's epsilon does not matter
        gain = norm(torch.full_like(weight, 1e3)).double().cpu()
    whole = gain * (written.sum(dim=0) if bias is None else written.sum(dim=0) + bias.detach().double().cpu())
    scale: Tensor = gain * (seen[Site("attn_out", layer)] @ whole) / (whole @ whole)
    return scale


def _of_trace(model: Model, probe: LinearProbe, trace: Trace, row: int, last: int) -> dict[str, Values]:
    seen = _states(model, trace, row, last, probe.site)
    coef = torch.from_numpy(probe.coef)
    heads, mlps, biases = np.zeros((model.n_layers, model.n_heads)), np.zeros(model.n_layers), np.zeros(model.n_layers)
    for layer in _with_heads(model, last):
        written = _head_writes(model, seen, layer)
        heads[layer, : len(written)] = (written @ coef).numpy()
        bias = model.layout.output_weights(model.hf, layer)[1]
        if bias is not None:
            kept = bias.detach().double().cpu()
            biases[layer] = float((kept * _post_norm(model, seen, layer, written, bias)) @ coef)
    for site, state in seen.items():
        if site.point in ("mlp_out", "mixer_out"):
            mlps[site.layer] += float(state @ coef)
    return {
        "heads": heads,
        "mlps": mlps,
        "biases": biases,
        "embedding": np.array(float(seen[Site("resid_pre", 0)] @ coef)),
        "logit": np.array(float(seen[probe.site] @ coef) + probe.intercept),
    }


def _logits(
    model: Model, probe: LinearProbe, sequences: Sequence[Sequence[int]], write: Mapping[Site, Edit], batch: int
) -> Values:
    """The probe's logit at the last token of each sequence."""
    found = []
    for start in range(0, len(sequences), batch):
        ids, mask = left_padded(sequences[start : start + batch], model.device)
        seen = model.backend.forward(ids, mask=mask, last_logits_only=True, read=[probe.site], write=write)
        found.append(probe.scores(seen.activations[probe.site][:, -1].float().cpu().numpy()))
    return np.concatenate(found)
