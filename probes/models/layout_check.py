"""Proof that a live model matches its layout: one pass over a few tokens, before anything is read from the model."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonscope.data.errors import ArchitectureError
from reasonscope.probes.architecture.layout import Layout, check_layout, input_device, unreadable
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.backends.base import Backend, Edit, Positions
from reasonscope.probes.backends.hooks import HooksBackend
from reasonscope.probes.models.determinism import at_least_float32

_WRITTEN: tuple[Point, ...] = ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")
_TOKENS = 4


def prove_layout(hf: PreTrainedModel, layout: Layout, backend: Backend | None = None) -> None:
    """Check names and shapes, then run a pass to check the first block.

    The pass checks that attention and MLP add up to what the block adds, that attention rows sum to 1, and that writes change the logits.
    All rows of the batch hold the same tokens, and each is written at a different point (the first at none), so one pass covers every
    point. With `backend` the pass runs on another machine, which chooses the attention kernel, so attention rows are not checked.

    Raises ArchitectureError with what does not hold.
    """
    check_layout(hf, layout)
    device = input_device(hf, layout)
    ids = torch.arange(_TOKENS, device=device).expand(1 + len(_WRITTEN), _TOKENS)
    points: tuple[Point, ...] = _WRITTEN if backend else (*_WRITTEN, "attn_probs")
    sites = {point: Site(point, 0) for point in points}
    write = {sites[point]: _only(row) for row, point in enumerate(_WRITTEN, start=1)}
    out = (backend or HooksBackend(hf, layout)).forward(
        ids, mask=torch.ones_like(ids), read=tuple(sites.values()), write=write
    )
    seen = {point: at_least_float32(out.activations[site][0]) for point, site in sites.items()}
    faults = [
        f"writing {point}.0 leaves the logits as they were"
        for row, point in enumerate(_WRITTEN, start=1)
        if torch.equal(out.logits[row], out.logits[0])
    ]
    tolerance = 16 * torch.finfo(hf.dtype).eps
    gap = seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"] - seen["resid_post"]
    if gap.abs().max() > tolerance * max(1.0, float(seen["resid_post"].abs().max())):
        faults.append(
            f"resid_pre + attn_out + mlp_out differs from resid_post by {float(gap.abs().max()):.2g} in block 0"
        )
    if not unreadable(hf, layout):
        with torch.no_grad():
            heads = at_least_float32(layout.attention_of_heads(hf, 0, out.activations[sites["z"]][:1])[0])
        if (heads - seen["attn_out"]).abs().max() > tolerance * max(1.0, float(seen["attn_out"].abs().max())):
            faults.append("what the heads of block 0 write does not sum to attn_out")
    rows = seen["attn_probs"].sum(dim=-1) if "attn_probs" in seen else torch.ones(1)
    summed = max(tolerance, 16 * torch.finfo(torch.float32).eps)  # some families always take the softmax in float32
    if rows.max() > 1 + summed or (not layout.sinks and rows.min() < 1 - summed):
        faults.append(f"attention rows of block 0 sum to {float(rows.min()):.4g} … {float(rows.max()):.4g}, not to 1")
    if faults:
        raise ArchitectureError(
            f"the {layout.model_type} model does not behave as its layout says: {'; '.join(faults)}"
        )


def _only(row: int) -> Edit:
    """An edit of one row of the batch. It adds a slope, because norms remove a constant and a change of scale."""

    def edit(activation: Tensor, _: Positions) -> Tensor:
        slope = torch.linspace(-1, 1, activation.shape[-1], device=activation.device)
        after = activation.clone()
        after[row] += (slope * (1 + activation[row].abs().max())).to(activation.dtype)
        return after

    return edit
