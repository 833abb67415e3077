"""The layout of a decoder, derived from one short pass of the live model: no table of architectures, and no names where numbers decide.

What a block adds to the residual stream is found by search: the smallest set of module outputs that sums to the change of the stream.
Attention is what returns attention weights. Only what a summand is called for (attention, mixer or MLP) is read from the names of modules.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reasonscope.data.errors import ArchitectureError
from reasonscope.probes.architecture.layout import BlockLayout, Layout, Term, projected, rounding
from reasonscope.probes.architecture.shrinking import with_same_heads
from reasonscope.probes.models.block_trace import BlockTrace, Call, Outside, find_blocks, watch_blocks

_MIXERS = re.compile(
    r"mamba|(^|_)ssm|conv|delta|rglru|recurrent|lightning|linearattention|rwkv|lstm|retention", re.IGNORECASE
)
_MLPS = re.compile(r"mlp|moe|feed_?forward|ffn|expert|(^|_)fc\d?$|dense|per_layer|ff_", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_QUERIES, _KEYS, _VALUES = (
    {f"{x}_proj", x, f"w{x}", f"{name}", f"{x}_lin"} for x, name in (("q", "query"), ("k", "key"), ("v", "value"))
)
_MOST_TERMS = 4
_COUNTS_EXPERTS = re.compile(r"experts?$|num_local_experts|n_routed_experts|moe_num_experts")


def derive_layout(hf: PreTrainedModel) -> Layout:
    """Where the modules of a live model are.

    Raises ArchitectureError if it is not a decoder whose blocks add to one residual stream.
    """
    blocks = find_blocks(hf)
    found: dict[int, BlockLayout] = {}
    known: list[BlockLayout] = []  # most blocks are like one before

    def visit(layer: int, trace: BlockTrace) -> None:
        block = hf.get_submodule(f"{blocks}.{layer}")
        found[layer] = _block_layout(hf, block, trace, known, layer)
        known.append(found[layer])

    outside = watch_blocks(hf, blocks, visit)
    unembedding = _path_of(hf, hf.get_output_embeddings())
    return Layout(
        model_type=hf.config.model_type,
        blocks=blocks,
        embedding=_path_of(hf, hf.get_input_embeddings()),
        final_norm=_final_norm(hf, outside, unembedding),
        unembedding=unembedding,
        of_block=tuple(found[layer] for layer in range(len(found))),
    )


def layout_of_structure(hf: PreTrainedModel) -> Layout:
    """The layout of a model without weights (on the "meta" device): that of a small random one with as many heads.

    Raises ArchitectureError as `derive_layout` does, or if a block has no counterpart in the small model.
    """
    small = type(hf)(with_same_heads(hf.config)).eval()
    layout = derive_layout(small)
    of_kind = {_structure(layout.block(small, i)): block for i, block in enumerate(layout.of_block)}
    try:
        blocks = tuple(of_kind[_structure(block)] for block in hf.get_submodule(layout.blocks).children())
    except KeyError:
        raise ArchitectureError(
            f"{type(hf).__name__} has blocks that a small model of its kind lacks; describe it with load_model(…, layout=…)"
        ) from None
    return replace(layout, of_block=blocks)


def _structure(block: nn.Module) -> tuple[tuple[str, str], ...]:
    """The names and classes of the modules of a block."""
    return tuple((path, type(module).__name__) for path, module in block.named_modules())


def _path_of(hf: PreTrainedModel, module: nn.Module | None) -> str:
    path = next((path for path, one in hf.named_modules() if one is module), None)
    if path is None:
        raise ArchitectureError(
            f"{type(hf).__name__} has no output layer or no token embedding, so it is not a language model"
        )
    return str(path)


def _final_norm(hf: PreTrainedModel, outside: Outside, unembedding: str) -> str | None:
    """The module that takes what the last block leaves and gives what the output layer takes."""
    head = next((call for call in outside.calls if call.path == unembedding), None)
    for call in outside.calls:
        if head is not None and _same(call.given, outside.last) and _same(call.out, head.given):
            return call.path
    return None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """stream_scale · entered + the terms == left."""

    terms: tuple[Term, ...]
    stream_scale: float


def _block_layout(
    hf: PreTrainedModel, block: nn.Module, trace: BlockTrace, known: Sequence[BlockLayout], layer: int
) -> BlockLayout:
    if trace.entered.shape != trace.left.shape or trace.entered.dim() != 3:
        raise ArchitectureError(
            f"block {layer} of {type(hf).__name__} takes {tuple(trace.entered.shape)} and gives {tuple(trace.left.shape)}, "
            "which is not one residual stream of batch, token and d_model"
        )
    attention = _attention(trace)
    added = _summands(hf, block, trace, known)
    if added is None:
        raise ArchitectureError(
            f"what block {layer} of {type(hf).__name__} does to the residual stream is not a sum of what its modules give; "
            "such a stream (normalised between the parts, or of several streams) cannot be read part by part"
        )
    roles = _roles(block, trace, added.terms, attention)
    base = BlockLayout(
        stream_scale=added.stream_scale,
        attn_out=roles["attn_out"],
        mixer_out=roles["mixer_out"],
        mlp_out=roles["mlp_out"],
    )
    return _with_inner_points(hf, block, trace, base, attention)


# ---- what is added to the stream


def _candidates(trace: BlockTrace) -> list[Call]:
    """Calls whose output has the shape of the stream, each value once: the outermost module that gives it."""
    kept: list[Call] = []
    for call in sorted(trace.calls, key=lambda call: call.path.count(".")):
        if call.out is None or call.out.shape != trace.left.shape or not call.out.dtype.is_floating_point:
            continue
        if any(_same(call.out, other) for other in (trace.entered, trace.left, *(one.out for one in kept))):
            continue
        kept.append(call)
    return kept


def _summands(hf: PreTrainedModel, block: nn.Module, trace: BlockTrace, known: Sequence[BlockLayout]) -> _Sum | None:
    """The smallest set of outputs that sums to the change of the stream, with scales that the block or the config names."""
    calls = _candidates(trace)
    scales = _named_scales(hf, block)
    for paths in _known_paths(calls, known):
        if found := _fitted(trace, [call for path in paths for call in calls if call.path == path], scales):
            return found
    for size in range(_MOST_TERMS + 1):
        for chosen in combinations(calls, size):
            if found := _fitted(trace, chosen, scales):
                return found
    return None


def _known_paths(calls: Sequence[Call], known: Sequence[BlockLayout]) -> Iterator[tuple[str, ...]]:
    """The sums of earlier blocks of which this one has all modules, the latest first."""
    here, seen = {call.path for call in calls}, set()
    for block in reversed(known):
        paths = tuple(term.path for term in (*block.attn_out, *block.mixer_out, *block.mlp_out))
        if paths not in seen and here.issuperset(paths):
            seen.add(paths)
            yield paths


def _fitted(trace: BlockTrace, calls: Sequence[Call], scales: Sequence[float]) -> _Sum | None:
    """The scales with which the outputs sum to the change of the stream; None if they do not, or with a scale that nothing names."""
    parts = (
        torch.stack([trace.entered, *(call.out for call in calls if call.out is not None)])
        .double()
        .cpu()
        .flatten(1, -2)
    )
    left = trace.left.double().cpu().flatten(0, -2)
    # Every value counts by its own size, as it was rounded: some tokens and dimensions are a thousand times as large as others.
    size = (parts.abs().sum(dim=0) + left.abs()).clamp(min=1e-30)
    allowed = rounding(trace.left.dtype) * size
    ones = torch.ones(len(parts), dtype=parts.dtype)
    if _holds(parts, left, ones, allowed):
        return _Sum(terms=tuple(Term(path=call.path) for call in calls), stream_scale=1.0)
    if len(scales) == 0:
        return None
    columns = (parts / size).flatten(1)
    fit = torch.linalg.lstsq(columns.T, (left / size).flatten()[:, None]).solution[:, 0]
    named = torch.tensor([_nearest(float(one), scales) for one in fit], dtype=parts.dtype)
    if not bool(named.isfinite().all()) or not _holds(parts, left, named, allowed):
        return None
    first, *rest = named.tolist()
    terms = (Term(path=call.path, scale=scale) for call, scale in zip(calls, rest, strict=True))
    return _Sum(terms=tuple(terms), stream_scale=first)


def _holds(parts: Tensor, left: Tensor, scales: Tensor, allowed: Tensor) -> bool:
    gap = (torch.einsum("p,ptd->td", scales, parts) - left).abs()
    return bool((gap <= allowed).all())


def _nearest(value: float, scales: Sequence[float]) -> float:
    """The named scale next to a fitted one; NaN if none is within 2 %."""
    best = min((1.0, *scales), key=lambda scale: abs(scale - value))
    return best if abs(best - value) <= 0.02 * abs(best) else float("nan")


def _named_scales(hf: PreTrainedModel, block: nn.Module) -> list[float]:
    """Numbers that a block may multiply by: those that it or the config names, and their products."""
    config = hf.config.get_text_config()
    own = [value for value in (*vars(block).values(), *vars(config).values()) if isinstance(value, float)]
    own += [
        float(one)
        for one in (*block._buffers.values(), *block._parameters.values())
        if one is not None and one.numel() == 1
    ]
    depth = getattr(config, "num_hidden_layers", 1)
    own += [value / depth**0.5 for value in own]  # MiniCPM: depth scale over the root of the number of blocks
    return sorted({value for value in own if value not in (0.0, 1.0)})


# ---- what a summand is


def _attention(trace: BlockTrace) -> Call | None:
    """The call that returns attention weights (1, head, token, token)."""
    return next((call for call in trace.calls if _weights_item(call) is not None), None)


def _weights_item(call: Call) -> int | None:
    for item, value in enumerate(call.made):
        if item and isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == value.shape[3] > 1:
            rows = value.float().sum(dim=-1)
            if (
                bool((value >= 0).all())
                and float(rows.max()) < 1.05
                and float(value.float().triu(1).abs().max()) < 1e-3
            ):
                return item
    return None


def _roles(
    block: nn.Module, trace: BlockTrace, terms: Sequence[Term], attention: Call | None
) -> Mapping[str, tuple[Term, ...]]:
    found: dict[str, tuple[Term, ...]] = {"attn_out": (), "mixer_out": (), "mlp_out": ()}
    order = {call.path: i for i, call in enumerate(trace.calls)}
    for term in sorted(terms, key=lambda term: order[term.path]):
        role = _role(block, trace, term.path, attention)
        found[role] = (*found[role], term)
    return found


def _role(block: nn.Module, trace: BlockTrace, path: str, attention: Call | None) -> str:
    for one in _sources(trace, path):
        if attention is not None and _holds_path(one, attention.path):
            return "attn_out"
        names = [*one.split("."), type(block.get_submodule(one)).__name__]
        for pattern, role in ((_MIXERS, "mixer_out"), (_MLPS, "mlp_out"), (_ATTENTION, "attn_out")):
            if "norm" not in names[-1].lower() and any(pattern.search(name) for name in names):
                return role
    return "mlp_out" if attention is not None else "mixer_out"


def _holds_path(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


def _sources(trace: BlockTrace, path: str) -> Iterator[str]:
    """The module itself, then where its input comes from: the call that gave it, and all calls before it, the latest first."""
    yield path
    at = next(i for i, call in enumerate(trace.calls) if call.path == path)
    before = [call for call in reversed(trace.calls[:at]) if not call.path.startswith(f"{path}.")]
    given = trace.calls[at].given
    yield from (call.path for call in before if _same(call.out, given))
    yield from (call.path for call in before)


# ---- points inside attention and MLP


def _with_inner_points(
    hf: PreTrainedModel, block: nn.Module, trace: BlockTrace, base: BlockLayout, attention: Call | None
) -> BlockLayout:
    found = replace(base, router=_router(hf, block, trace), down_proj=_down_proj(block, trace, base))
    mixed = (*base.attn_out, *base.mixer_out)
    if mixed and base.mlp_out and _is_sequential(trace, base):
        found = replace(found, sequential=True)
    if attention is None or not base.attn_out:
        return found
    return _with_heads(block, trace, found, attention)


def _is_sequential(trace: BlockTrace, base: BlockLayout) -> bool:
    """Whether a module takes the sum of the stream and what attention adds."""
    mid, size = trace.entered.double(), trace.entered.double().abs()
    for term in (*base.attn_out, *base.mixer_out):
        call = trace.of(term.path)
        assert call is not None and call.out is not None
        added = call.out.double() * (term.scale / base.stream_scale)
        mid, size = mid + added, size + added.abs()
    allowed = rounding(trace.left.dtype) * (size + mid.abs())
    return any(
        call.given is not None
        and call.given.shape == mid.shape
        and bool(((call.given.double() - mid).abs() <= allowed).all())
        for call in trace.calls
    )


def _with_heads(block: nn.Module, trace: BlockTrace, base: BlockLayout, attention: Call) -> BlockLayout:
    item = _weights_item(attention)
    assert item is not None
    n_heads = int(attention.made[item].shape[1])
    found = replace(
        base, attention=attention.path, probs_item=item, n_heads=n_heads, sinks=_has_sinks(block, attention)
    )
    others = [call for call in trace.calls if call.path != attention.path and _weights_item(call) is not None]
    if any(not _holds_path(call.path, attention.path) for call in others):
        return replace(
            base, lacks=dict.fromkeys(("z", "attn_probs", "q", "k", "v"), "the block has several attentions")
        )
    output = _projection(block, trace, attention.path, attention.out)
    if output is None or output.given is None or output.given.shape[-1] % n_heads:
        return replace(found, lacks={"z": "its attention does not end in a projection of the heads side by side"})
    return _with_projections(block, trace, replace(found, o_proj=output.path), output.given.shape[-1] // n_heads)


def _has_sinks(block: nn.Module, attention: Call) -> bool:
    return any("sink" in name for name, _ in block.get_submodule(attention.path).named_parameters())


def _with_projections(block: nn.Module, trace: BlockTrace, base: BlockLayout, width: int) -> BlockLayout:
    """Queries, keys and values, if each has a projection of its own: heads of values are as wide as `width`, those of queries as keys."""
    assert base.attention is not None
    q, k, v = (_named(trace, base.attention, names) for names in (_QUERIES, _KEYS, _VALUES))
    n_kv, rest = divmod(v.out.shape[-1], width) if v is not None and v.out is not None else (0, 0)
    if not n_kv or rest or base.n_heads % n_kv:
        return base
    found = replace(base, v=v.path if v else None, n_kv_heads=n_kv)
    if k is None or k.out is None or k.out.shape[-1] % n_kv:
        return found
    found = replace(found, k=k.path)
    if q is not None and q.out is not None and q.out.shape[-1] == base.n_heads * (k.out.shape[-1] // n_kv):
        return replace(found, q=q.path)
    return replace(found, lacks={"q": "its query projection gives more than queries"})


def _named(trace: BlockTrace, attention: str, names: set[str]) -> Call | None:
    """The one call directly inside the attention that has one of these names."""
    inside = [
        call for call in trace.calls if call.path.rpartition(".")[2] in names and call.path.startswith(f"{attention}.")
    ]
    return inside[0] if len(inside) == 1 else None


def _projection(block: nn.Module, trace: BlockTrace, path: str, made: Tensor | None) -> Call | None:
    """The call at or under `path` of a projection that gives exactly `made`."""
    for call in reversed(trace.calls):
        if not (call.path == path or call.path.startswith(f"{path}.") or not path):
            continue
        if _is_projection(block.get_submodule(call.path)) and _same(call.out, made):
            return call
    return None


def _is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies by weights, which may be packed."""
    return _has_weights(module) or (hasattr(module, "in_features") and not hasattr(module, "weight"))


def _has_weights(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _down_proj(block: nn.Module, trace: BlockTrace, base: BlockLayout) -> str | None:
    """The last projection of a dense MLP, which alone writes `mlp_out` (before a post-norm)."""
    if len(base.mlp_out) != 1:
        return None
    path = base.mlp_out[0].path
    sources = (path, *(call.path for call in trace.calls if _same(call.out, _given(trace, path))))
    for source in sources:
        call = trace.of(source)
        found = None if call is None else _projection(block, trace, source, call.out)
        if found is not None and found.given is not None and found.given.dim() == 3:
            return found.path
    return None


def _given(trace: BlockTrace, path: str) -> Tensor | None:
    call = trace.of(path)
    return None if call is None else call.given


def _router(hf: PreTrainedModel, block: nn.Module, trace: BlockTrace) -> str | None:
    """The module that gives a logit for each expert, from the stream or a norm of it: weights times input."""
    config = hf.config.get_text_config()
    counts = {value for name, value in vars(config).items() if _COUNTS_EXPERTS.search(name) and isinstance(value, int)}
    for call in trace.calls:
        module = block.get_submodule(call.path)
        if (
            not isinstance(getattr(module, "weight", None), Tensor)
            or not _is_projection(module)
            or call.out is None
            or call.given is None
            or call.out.shape[-1] not in counts
        ):
            continue
        if _width_in(module) == call.given.shape[-1] and _gives_logits(module, call.given, call.out):
            return call.path
    return None


def _width_in(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[-1]


def _gives_logits(module: nn.Module, given: Tensor, made: Tensor) -> bool:
    expected = projected(module, given).reshape(made.shape)
    rounding = 16 * torch.finfo(given.dtype).eps * float(expected.abs().max())
    return torch.allclose(expected, made.to(expected.dtype), rtol=0.02, atol=rounding)
