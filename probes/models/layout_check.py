"""Proof that a live model matches its layout: a pass over a few tokens, before anything is read from the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonscope.data.errors import ArchitectureError, ReasonscopeError
from reasonscope.probes.architecture.layout import (
    BlockLayout,
    Layout,
    check_layout,
    input_device,
    projected,
    rounding,
    unreadable,
)
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.backends.base import Backend, Edit, Positions
from reasonscope.probes.backends.hooks import HooksBackend
from reasonscope.probes.models.determinism import at_least_float32
from reasonscope.probes.models.packing import packing

# Written in this order, each in a row of its own; `attn_probs` cannot be written.
_WRITTEN: tuple[Point, ...] = (
    "resid_pre", "q", "k", "v", "z", "attn_out", "mixer_out", "resid_mid", "router", "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip
_STREAM: tuple[Point, ...] = ("resid_pre", "attn_out", "mixer_out", "mlp_out", "resid_post")
# A point that fails its proof is left out of a derived layout; if another point fails, the model is refused.
_OPTIONAL: tuple[Point, ...] = ("q", "k", "v", "z", "attn_probs", "resid_mid", "router", "mlp_post")
_TOKENS = 4
_EDITED = 1  # the token whose queries, keys and values are edited


def prove_layout(hf: PreTrainedModel, layout: Layout, backend: Backend | None = None) -> None:
    """Check names and shapes, then run a pass that checks every block, and writes at every point of a block of each kind.

    The pass checks that what blocks add sums to what they leave, that the heads sum to what attention adds and the neurons to what
    the MLP adds, that attention rows sum to 1, and that writes do what their point says. All rows of the batch hold the same
    tokens, and each is written at a different point (the first at none). With `backend` the pass runs on another machine, which
    chooses the attention kernel, so attention rows are not checked.

    Raises ArchitectureError with what does not hold.
    """
    check_layout(hf, layout)
    if faults := [text for found in _faults(hf, layout, backend).values() for text in found]:
        raise ArchitectureError(
            f"the {layout.model_type} model does not behave as its layout says: {'; '.join(faults[:6])}"
        )


def proved(hf: PreTrainedModel, layout: Layout) -> Layout:
    """A derived `layout` without the points that fail their proof; each says why. Raises ArchitectureError if the stream itself fails."""
    for _ in range(len(_OPTIONAL)):
        faults = _faults(hf, layout, None)
        bad = {place: texts for place, texts in faults.items() if texts and place.point in _OPTIONAL}
        if not bad:
            break
        layout = _without(layout, bad)
    prove_layout(hf, layout)
    return layout


Faults = Mapping[Site, list[str]]


def _without(layout: Layout, bad: Faults) -> Layout:
    """The layout without points that failed, in every block like the one in which they failed."""
    blocks = list(layout.of_block)
    for site, texts in bad.items():
        failed = layout.of_block[site.layer]
        for i, block in enumerate(blocks):
            if _kind(layout.of_block[i]) == _kind(failed):
                blocks[i] = _lacking(block, site.point, texts[0])
    return replace(layout, of_block=tuple(blocks))


def _lacking(block: BlockLayout, point: Point, reason: str) -> BlockLayout:
    gone: dict[Point, dict[str, object]] = {
        "z": {"o_proj": None}, "attn_probs": {"probs_item": None}, "resid_mid": {"sequential": False},
        "router": {"router": None}, "mlp_post": {"down_proj": None},
        "q": {"q": None}, "k": {"k": None}, "v": {"v": None},
    }  # fmt: skip
    return replace(block, lacks={**block.lacks, point: reason}, **gone[point])  # type: ignore[arg-type]  # fields by name


def _kind(block: BlockLayout) -> tuple[object, ...]:
    """What blocks of the same kind share: everything but the numbers that scale the stream."""
    terms = (tuple(term.path for term in some) for some in (block.attn_out, block.mixer_out, block.mlp_out))
    return (*terms, block.points, block.n_heads, block.o_proj, block.router, block.down_proj)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What one pass showed: activations (row, token, …) by site, and logits by row."""

    hf: PreTrainedModel
    layout: Layout
    activations: Mapping[Site, Tensor]
    logits: Tensor
    rows: Mapping[Site, int]

    def at(self, point: Point, layer: int, row: int = 0) -> Tensor:
        return at_least_float32(self.activations[Site(point, layer)][row]).cpu()  # blocks may be on several devices

    def has(self, point: Point, layer: int) -> bool:
        return Site(point, layer) in self.activations

    @property
    def tolerance(self) -> float:
        return 16 * torch.finfo(self.dtype).eps

    @property
    def dtype(self) -> torch.dtype:
        """That of the stream: the weights may be packed, or be widened while they are used."""
        return self.activations[Site("resid_post", 0)].dtype


def _faults(hf: PreTrainedModel, layout: Layout, backend: Backend | None) -> dict[Site, list[str]]:
    """What does not hold, by the site that it speaks against."""
    seen = _run(hf, layout, backend)
    found: dict[Site, list[str]] = {}
    for layer in range(len(layout.of_block)):
        for point, check in _CHECKS.items():
            if seen.has(point, layer) and (fault := check(seen, layer)):
                found.setdefault(Site(point, layer), []).append(fault)
    for site, row in seen.rows.items():
        if fault := _write_fault(seen, site, row):
            found.setdefault(site, []).append(fault)
    return found


def _run(hf: PreTrainedModel, layout: Layout, backend: Backend | None) -> _Seen:
    read = [
        Site(p, i) for i, block in enumerate(layout.of_block) for p in block.points if not backend or _travels(block, p)
    ]
    written = [site for site in _first_of_each_kind(layout) if site in read or site.point == "embed"]
    rows = {site: row for row, site in enumerate(written, start=1)}
    edits = {site: _only(row, _EDITED if site.point in ("q", "k", "v") else None) for site, row in rows.items()}
    device = input_device(hf, layout)
    ids = torch.arange(_TOKENS, device=device).expand(1 + len(rows), _TOKENS)
    out = (backend or HooksBackend(hf, layout)).forward(ids, mask=torch.ones_like(ids), read=read, write=edits)
    return _Seen(hf=hf, layout=layout, activations=out.activations, logits=out.logits, rows=rows)


def _travels(block: BlockLayout, point: Point) -> bool:
    """Whether an engine on another machine reads a point: it chooses the attention kernel, and reads one module at a time."""
    place = block.place(point)
    return point != "attn_probs" and place is not None and place.simple


def _first_of_each_kind(layout: Layout) -> list[Site]:
    seen: set[tuple[object, ...]] = set()
    sites = [Site("embed", 0)]
    for layer, block in enumerate(layout.of_block):
        if (one := _kind(block)) not in seen:
            seen.add(one)
            sites += [Site(point, layer) for point in _WRITTEN if point in block.points]
    return sites


# ---- each check takes what was seen and a layer, and says what does not hold


def _stream_fault(seen: _Seen, layer: int) -> str | None:
    block = seen.layout.of_block[layer]
    parts = [seen.at("resid_pre", layer) * block.stream_scale]
    parts += [seen.at(point, layer) for point in ("attn_out", "mixer_out", "mlp_out") if seen.has(point, layer)]
    after = seen.at("resid_post", layer)
    gap = (sum(parts[1:], start=parts[0]) - after).abs()
    if bool((gap > rounding(seen.dtype) * torch.stack([*parts, after]).abs().sum(dim=0)).any()):
        return f"{_written_sum(seen, layer)} differs from resid_post by {float(gap.max()):.2g} in block {layer}"
    if layer and not torch.equal(seen.at("resid_pre", layer), seen.at("resid_post", layer - 1)):
        return f"block {layer} does not take what block {layer - 1} leaves"
    return None


def _written_sum(seen: _Seen, layer: int) -> str:
    return " + ".join(point for point in _STREAM[:-1] if seen.has(point, layer))


def _packed(seen: _Seen, layer: int) -> bool:
    """Whether the products of a block cannot be repeated to rounding, so that `verify` alone compares them, by its wider limits."""
    packed = packing(seen.hf.config)
    return (packed is not None and packed.rounds_activations) or unreadable(seen.hf, seen.layout, layer) is not None


def _heads_fault(seen: _Seen, layer: int) -> str | None:
    if _packed(seen, layer):
        return None
    with torch.no_grad():
        heads = at_least_float32(
            seen.layout.attention_of_heads(seen.hf, layer, seen.activations[Site("z", layer)][:1])[0]
        )
    return _gap_fault(
        seen, heads, seen.at("attn_out", layer), f"what the heads of block {layer} write does not sum to attn_out"
    )


def _gap_fault(seen: _Seen, ours: Tensor, theirs: Tensor, fault: str) -> str | None:
    ours, allowed = ours.cpu(), seen.tolerance * max(1.0, float(theirs.abs().max()))
    return fault if ours.shape != theirs.shape or bool((ours - theirs).abs().max() > allowed) else None


def _rows_fault(seen: _Seen, layer: int) -> str | None:
    block, rows = seen.layout.of_block[layer], seen.at("attn_probs", layer).sum(dim=-1)
    summed = max(
        seen.tolerance, 16 * torch.finfo(torch.float32).eps
    )  # some families always take the softmax in float32
    if rows.max() > 1 + summed or (not block.sinks and rows.min() < 1 - summed):
        return f"attention rows of block {layer} sum to {float(rows.min()):.4g} … {float(rows.max()):.4g}, not to 1"
    return None


def _neurons_fault(seen: _Seen, layer: int) -> str | None:
    if _packed(seen, layer):
        return None
    block, (term,) = seen.layout.block(seen.hf, layer), seen.layout.of_block[layer].mlp_out
    path = seen.layout.of_block[layer].down_proj
    assert path is not None
    with torch.no_grad():
        made = projected(block.get_submodule(path), seen.activations[Site("mlp_post", layer)][:1])
        if not (path == term.path or path.startswith(f"{term.path}.")):
            made = at_least_float32(
                block.get_submodule(term.path)(made.to(seen.activations[Site("mlp_out", layer)].dtype))
            )
    fault = f"what the neurons of block {layer} write does not sum to mlp_out"
    return _gap_fault(seen, made[0] * term.scale, seen.at("mlp_out", layer), fault)


_CHECKS: Mapping[Point, Callable[[_Seen, int], str | None]] = {
    "resid_post": _stream_fault,
    "z": _heads_fault,
    "attn_probs": _rows_fault,
    "mlp_post": _neurons_fault,
}


def _write_fault(seen: _Seen, site: Site, row: int) -> str | None:
    if torch.equal(seen.logits[row], seen.logits[0]):
        return f"writing {site} leaves the logits as they were"
    changed = _CHANGES.get(site.point)
    if changed is None or not (seen.has("attn_probs", site.layer) and seen.has("z", site.layer)):
        return None
    change = (seen.at("attn_probs", site.layer, row) - seen.at("attn_probs", site.layer)).abs().amax(dim=(0, 2))
    rows = (change > max(1e-4, 4 * torch.finfo(seen.dtype).eps)).tolist()
    return None if rows == changed else f"writing {site} at one token does not change the attention that it should"


# Which rows of attention change when one token is edited: its own by its query, its own and later ones by its key, none by its value.
_CHANGES: Mapping[Point, list[bool]] = {
    "q": [i == _EDITED for i in range(_TOKENS)],
    "k": [i >= _EDITED for i in range(_TOKENS)],
    "v": [False] * _TOKENS,
}


def _only(row: int, token: int | None) -> Edit:
    """An edit of one row of the batch, at one token or at all. It adds a slope, because norms remove a constant and a change of scale."""

    def edit(activation: Tensor, _: Positions) -> Tensor:
        slope = torch.linspace(-1, 1, activation.shape[-1], device=activation.device)
        after, at = activation.clone(), slice(None) if token is None else slice(token, token + 1)
        after[row, at] += (slope * (1 + activation[row].abs().max())).to(activation.dtype)
        return after

    return edit


def check_engine(backend: Backend, hf: PreTrainedModel, layout: Layout) -> None:
    """Compare an engine with the native hooks at every point of a block of each kind that it reads.

    Raises ArchitectureError if it reads something else.
    """
    ids = torch.arange(_TOKENS, device=input_device(hf, layout))[None]
    native, seen = HooksBackend(hf, layout), []
    for site in _first_of_each_kind(layout):
        try:
            ours = backend.forward(ids, mask=torch.ones_like(ids), read=[site]).activations[site]
        except ReasonscopeError:
            continue  # the engine lacks the point, and says so to whoever asks for it
        seen.append((site, ours, native.forward(ids, mask=torch.ones_like(ids), read=[site]).activations[site]))
    for site, ours, theirs in seen:
        gap = (
            float((at_least_float32(ours) - at_least_float32(theirs)).abs().max())
            if ours.shape == theirs.shape
            else float("inf")
        )
        if gap > 64 * torch.finfo(hf.dtype).eps * max(1.0, float(theirs.abs().max())):
            raise ArchitectureError(
                f"backend={backend.name!r} reads {site} of {layout.model_type} otherwise than the model computes it (by {gap:.2g}); "
                "use backend='hooks'"
            )
