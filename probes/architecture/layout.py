"""Where a model keeps the modules that we read and write: one entry per block, because blocks may differ from one another.

`load_model` derives the layout from a short pass of the live model (probes/models/layout_derivation.py) and proves it
(probes/models/layout_check.py). Nothing here depends on the name of an architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from reasonscope.data.errors import ArchitectureError, SiteError
from reasonscope.probes.architecture.sites import Point, Site


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of what a block adds to the residual stream.

    Attributes:
        path: The module whose output it is, from the block.
        scale: The number that the block multiplies it by (Granite's residual multiplier).
        entering: Whether it is the input of the module instead.
    """

    path: str
    scale: float = 1.0
    entering: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """The modules of one block, as dotted paths from the block. `stream_scale` · resid_pre + attn_out + mixer_out + mlp_out == resid_post.

    Attributes:
        attn_out: What attention adds to the stream: the attention itself, or the norm after it.
        mixer_out: The same for a mixer without attention weights: linear attention, state space, convolution, recurrence.
        mlp_out: The same for MLP, experts, and whatever else the block adds.
        attention: The attention; its output is a tuple that holds the weights at `probs_item`.
        probs_item: See `attention`; None if the weights cannot be read.
        n_heads: Query heads of the attention.
        n_kv_heads: Heads of keys and values.
        o_proj: The output projection of the attention; it takes the heads side by side.
        q: The projection that writes the queries.
        k: The projection that writes the keys.
        v: The projection that writes the values.
        down_proj: The projection that takes the neurons of a dense MLP.
        router: The router of a mixture of experts.
        sequential: Whether the MLP reads the stream after attention, so that there is a `resid_mid`.
        stream_scale: The number that the block multiplies the stream by that enters it (Gemma 4); 1 in nearly all families.
        sinks: Whether attention rows may sum to less than 1.
        lacks: Why a point is missing that other blocks of its kind have.
    """

    attn_out: tuple[Term, ...] = ()
    mixer_out: tuple[Term, ...] = ()
    mlp_out: tuple[Term, ...] = ()
    attention: str | None = None
    probs_item: int | None = None
    n_heads: int = 0
    n_kv_heads: int = 0
    o_proj: str | None = None
    q: str | None = None
    k: str | None = None
    v: str | None = None
    down_proj: str | None = None
    router: str | None = None
    sequential: bool = False
    stream_scale: float = 1.0
    sinks: bool = False
    lacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_post_norm(self) -> bool:
        """Whether a norm stands between the attention's output projection and the residual stream."""
        return bool(self.attn_out) and not _within(self.attn_out[-1].path, self.attention)

    def terms(self, point: Point) -> tuple[Term, ...]:
        """What is summed at a point of the stream."""
        if point == "resid_mid":
            mixed = (*self.attn_out, *self.mixer_out)
            inside = tuple(Term(path=term.path, scale=term.scale / self.stream_scale) for term in mixed)
            return (Term(path="", entering=True), *inside) if self.sequential else ()
        return {"attn_out": self.attn_out, "mixer_out": self.mixer_out, "mlp_out": self.mlp_out}.get(point, ())

    def _leaf(self, point: Point) -> "Place | None":
        """The place of a point that is the input or the output of one module."""
        path, place = {
            "resid_pre": ("", Place(value="input")),
            "resid_post": ("", Place()),
            "z": (self.o_proj, Place(value="input", heads=self.n_heads)),
            "q": (self.q, Place(heads=self.n_heads)),
            "k": (self.k, Place(heads=self.n_kv_heads)),
            "v": (self.v, Place(heads=self.n_kv_heads)),
            "mlp_post": (self.down_proj, Place(value="input")),
            "router": (self.router, Place(router=True)),
            "attn_probs": (self.attention, Place(item=self.probs_item or 0)),
        }[point]
        if path is None or (point == "attn_probs" and self.probs_item is None):
            return None
        return replace(place, path=path)

    def place(self, point: Point) -> "Place | None":
        """The place of a point in this block, with paths from the block; None if the block lacks it."""
        if point not in ("attn_out", "mixer_out", "mlp_out", "resid_mid"):
            return self._leaf(point)
        *earlier, last = self.terms(point) or (None,)
        return None if last is None else Place(path=last.path, scale=last.scale, earlier=tuple(filter(None, earlier)))

    @property
    def points(self) -> tuple[Point, ...]:
        """The points that this block has."""
        return tuple(point for point in _OF_BLOCK if self.place(point) is not None)


_OF_BLOCK: tuple[Point, ...] = (
    "resid_pre", "q", "k", "v", "attn_probs", "z", "attn_out", "mixer_out",
    "resid_mid", "router", "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """How an engine finds the activation at a site.

    Attributes:
        path: The module.
        value: Whether the activation is its "input" or its "output".
        item: Which item to take if the output is a tuple.
        heads: The number of heads that the last axis is split into; None leaves it whole.
        scale: The number that the activation is multiplied by.
        earlier: What else is summed at this site; it is computed before the module runs.
        router: Whether the module is a router, which sees batch and token as one axis.
    """

    path: str = ""
    value: str = "output"
    item: int = 0
    heads: int | None = None
    scale: float = 1.0
    earlier: tuple[Term, ...] = ()
    router: bool = False

    @property
    def simple(self) -> bool:
        """Whether the activation is just an input or an output, which every engine can read and write."""
        return self.scale == 1.0 and not self.earlier


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The modules of a model, as dotted paths from the model; `load_model` derives it.

    Attributes:
        model_type: The architecture, as `config.model_type` names it.
        blocks: The list of blocks.
        embedding: The token embedding.
        final_norm: The norm before the output layer; None for a model without one.
        unembedding: The output layer.
        of_block: The layout of each block.

    Example:
        >>> layout = load_model("organism").layout
        >>> layout.blocks, layout.of_block[0].o_proj
        ('model.layers', 'self_attn.o_proj')
    """

    model_type: str
    blocks: str
    embedding: str
    final_norm: str | None
    unembedding: str
    of_block: tuple[BlockLayout, ...]

    @property
    def n_heads(self) -> int:
        """The largest number of query heads in a block; 0 without attention."""
        return max((block.n_heads for block in self.of_block if block.o_proj is not None), default=0)

    @property
    def sinks(self) -> bool:
        """Whether attention rows of a block may sum to less than 1."""
        return any(block.sinks for block in self.of_block)

    @property
    def without_heads(self) -> str:
        """Which blocks have no attention heads, so that analyses of heads skip them, in a line; "" if all blocks have."""
        have = self.layers_with("attn_out")
        layers = tuple(i for i in range(len(self.of_block)) if i not in have)
        if not layers:
            return ""
        return f"{len(layers)} of {len(self.of_block)} blocks have no attention and are skipped: {_listed(layers)}"

    @property
    def scales_stream(self) -> bool:
        """Whether a block scales the stream, so that what earlier blocks wrote is not what later ones read."""
        return any(block.stream_scale != 1.0 for block in self.of_block)

    def layers_with(self, point: Point) -> tuple[int, ...]:
        """The blocks that have a point."""
        return tuple(i for i, block in enumerate(self.of_block) if block.place(point) is not None)

    def block(self, hf: PreTrainedModel, layer: int) -> nn.Module:
        """Block `layer`, counted from 0."""
        return hf.get_submodule(self.blocks_path(layer))

    def blocks_path(self, layer: int) -> str:
        return f"{self.blocks}.{layer}"

    def place(self, site: Site) -> Place:
        """The place of `site`, with paths from the model. Raises SiteError if the model has no such layer, or the layer no such point."""
        if site.layer >= len(self.of_block):
            raise SiteError(
                f"{site}: the model has {len(self.of_block)} layers, so the last is {site.point}.{len(self.of_block) - 1}"
            )
        if site.point == "embed":
            return self._embedded(site)
        found = self.of_block[site.layer].place(site.point)
        if found is None:
            raise SiteError(f"{site}: {self._why_not(site)}")
        prefix = self.blocks_path(site.layer)
        earlier = tuple(replace(term, path=_join(prefix, term.path)) for term in found.earlier)
        return replace(found, path=_join(prefix, found.path), earlier=earlier)

    def _embedded(self, site: Site) -> Place:
        if site.layer:
            raise SiteError(f"{site}: the embedding comes once, before the blocks; write embed.0")
        return Place(path=self.embedding)

    def _why_not(self, site: Site) -> str:
        block, have = self.of_block[site.layer], self.layers_with(site.point)
        if site.point in block.lacks:
            return f"block {site.layer} of this {self.model_type} has no {site.point}: {block.lacks[site.point]}"
        if not have:
            return f"{self.model_type} {_LACKING.get(site.point, f'has no {site.point}')}"
        return f"block {site.layer} of this {self.model_type} has no {site.point}; blocks {_listed(have)} have it"

    def path(self, site: Site) -> str:
        """The path from the model to the module at `site`. Raises SiteError as `place` does."""
        return self.place(site).path

    def module(self, hf: PreTrainedModel, site: Site) -> nn.Module:
        """The module at `path(site)`. Raises SiteError as `place` does."""
        return hf.get_submodule(self.path(site))

    def output_weights(self, hf: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_O (head, d_head, d_model) and the bias (d_model,) of the output projection of block `layer`.

        Both are multiplied by the scale with which the block adds them to the stream, unless a norm comes between.
        Weights that are packed, or that accelerate keeps elsewhere, are read as what the projection makes of each unit vector.
        Raises SiteError if the block has no heads.
        """
        projection = hf.get_submodule(self.path(Site("z", layer)))
        weight, bias = _input_weights(projection, input_device(hf, self), hf.dtype), getattr(projection, "bias", None)
        block = self.of_block[layer]
        scale = 1.0 if block.has_post_norm else block.attn_out[-1].scale
        if scale != 1.0:
            weight, bias = weight * scale, None if bias is None else bias * scale
        return weight.reshape(block.n_heads, -1, weight.shape[-1]), bias

    def attention_of_heads(self, hf: PreTrainedModel, layer: int, z: Tensor) -> Tensor:
        """`attn_out` (batch, token, d_model) of block `layer`, computed from `z` (batch, token, head, d_head) of its heads.

        It is the sum of what the heads write, plus the bias, after the post-norm if the block has one.
        """
        weight, bias = self.output_weights(hf, layer)
        written = torch.einsum("bthd,hdm->btm", z, weight.to(z))
        written = written if bias is None else written + bias.to(z)
        block = self.of_block[layer]
        if not block.has_post_norm:
            return written
        normed: Tensor = self.module(hf, Site("attn_out", layer))(written) * block.attn_out[-1].scale
        return normed


_LACKING: Mapping[str, str] = {
    "router": "is not a mixture of experts, so it has no router",
    "mixer_out": "has no mixer beside attention, so it has no mixer_out; read attn_out",
    "resid_mid": "adds attention and MLP at once, so it has no resid_mid",
    "mlp_post": "has no dense MLP with neurons, so it has no mlp_post",
}


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers[:8])) + (" …" if len(layers) > 8 else "")


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if path else prefix


def _within(path: str, parent: str | None) -> bool:
    """Whether two paths are the same or one holds the other."""
    if parent is None:
        return False
    return path == parent or path.startswith(f"{parent}.") or parent.startswith(f"{path}.")


def _takes_rows(projection: nn.Module) -> bool:
    """Whether the weights of a projection are (out, in); transformers' Conv1D keeps (in, out)."""
    return type(projection).__name__ != "Conv1D"


def _input_weights(projection: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weights of a projection as (in, out), without its bias."""
    weight = getattr(projection, "weight", None)
    if isinstance(weight, Tensor) and _unreadable(weight) is None:
        return weight.T if _takes_rows(projection) else weight
    width = int(getattr(projection, "in_features", 0)) or (weight.shape[-1] if isinstance(weight, Tensor) else 0)
    with torch.no_grad():
        out: Tensor = projection(torch.eye(width, dtype=dtype, device=device))
        return out if getattr(projection, "bias", None) is None else out - projection(out.new_zeros(1, width))


def rounding(dtype: torch.dtype) -> float:
    """How far a sum of a few values may be from what is stored, as a share of the sum of their sizes: each step rounds once."""
    return 2 * torch.finfo(dtype).eps


def projected(projection: nn.Module, values: Tensor) -> Tensor:
    """What a projection makes of `values` (…, in): weights and bias, in at least float32."""
    weight, bias = projection.weight, getattr(projection, "bias", None)
    assert isinstance(weight, Tensor)
    wide = torch.promote_types(values.dtype, torch.float32)
    weight = (weight.T if _takes_rows(projection) else weight).to(values.device, wide)
    out = values.to(wide) @ weight
    return out if bias is None else out + bias.to(out)


class _Replaced(TorchFunctionMode):
    """Inside, the first product of an input with weights gives `logits` instead."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self._logits: Tensor | None = logits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._logits is None or func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        logits, self._logits = self._logits, None  # the weights may be offloaded by now, so they are not multiplied
        return logits


def rerouted(router: nn.Module, logits: Tensor, *given: Any, **named: Any) -> Any:
    """What a router hands on, given its logits (row, expert): it runs again, with `logits` in the place of its own product.

    `given` and `named` are what it was called with; without them it runs on zeros, which do not matter.
    """
    if type(router).forward is nn.Linear.forward:  # it gives logits alone
        return logits
    weight = router.weight
    assert isinstance(weight, Tensor)
    if not given and not named:
        given = (weight.new_zeros(logits.numel() // logits.shape[-1], weight.shape[-1]),)
    with _Replaced(logits):
        # Not `router.forward`, which an engine may have wrapped, as this runs inside of it.
        return type(router).forward(router, *given, **named)


def chosen_experts(router: nn.Module, logits: Tensor) -> Tensor:
    """The experts (row, chosen) that a router picks, given its logits (row, expert). Raises ArchitectureError if it does not say."""
    made = rerouted(router, logits)
    for item in made[1:] if isinstance(made, tuple) else ():
        if isinstance(item, Tensor) and not item.dtype.is_floating_point:
            return item
    raise ArchitectureError(f"{type(router).__name__} does not say which experts it picks; use another family")


_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # other types are packed or need scales


def embedding_rows(hf: PreTrainedModel, layout: Layout) -> Tensor:
    """The weights of the token embedding (vocab, d_model)."""
    weight = hf.get_submodule(layout.embedding).weight
    assert isinstance(weight, Tensor)
    return weight


def input_device(hf: PreTrainedModel, layout: Layout | None = None) -> torch.device:
    """The device that token ids are fed on: that of the embedding, or the CPU if accelerate has offloaded it."""
    rows = hf.get_input_embeddings().weight if layout is None else embedding_rows(hf, layout)
    assert isinstance(rows, Tensor)
    return torch.device("cpu") if rows.is_meta else rows.device


def check_layout(hf: PreTrainedModel, layout: Layout) -> None:
    """Compare names and shapes with the live model. Raises ArchitectureError with those that do not match."""
    faults = [
        f"{name}: the model has no module {path!r}"
        for name in ("embedding", "final_norm", "unembedding", "blocks")
        if (path := getattr(layout, name)) is not None and not _has(hf, path)
    ]
    if not faults:
        faults += _block_faults(hf, layout, hf.config.get_text_config())
    if faults:
        raise ArchitectureError(f"the {layout.model_type} model does not match its layout. {'; '.join(faults)}")


def unreadable(hf: PreTrainedModel, layout: Layout, layer: int = 0) -> str | None:
    """Why the weights of a block cannot be read as numbers, though they can be run; None if they can be read."""
    block = layout.block(hf, layer)
    for parameter in block.parameters():
        if reason := _unreadable(parameter):
            return reason
    packed = any(hasattr(one, "in_features") and not hasattr(one, "weight") for one in block.modules())
    return "quantised" if packed else None


def _unreadable(weight: Tensor) -> str | None:
    if weight.is_meta:
        return "offloaded"
    return None if weight.dtype in _PLAIN else "quantised"


def _block_faults(hf: PreTrainedModel, layout: Layout, config: PretrainedConfig) -> list[str]:
    n_blocks = sum(1 for _ in hf.get_submodule(layout.blocks).children())
    if n_blocks != len(layout.of_block):
        return [f"blocks: the model has {n_blocks}, but its layout says {len(layout.of_block)}"]
    faults = []
    for layer, block in enumerate(layout.of_block):
        module = layout.block(hf, layer)
        for point in block.points:
            place = block.place(point)
            assert place is not None
            paths = (place.path, *(term.path for term in place.earlier))
            faults += [f"{point}: no {path!r} in block {layer}" for path in paths if not _has(module, path)]
        if not faults and block.o_proj and not unreadable(hf, layout, layer):
            width = layout.output_weights(hf, layer)[0].shape[-1]
            if width != config.hidden_size:
                faults.append(f"o_proj: writes {width} values into a residual stream of {config.hidden_size}")
    return faults


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
