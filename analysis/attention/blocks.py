"""Attention in blocks of queries: anything linear in its rows, for every layer and head, without a token × token
matrix.

Attention over 4,096 tokens is a gigabyte per layer, but every analysis reduces it: a sentence's mean, a head's span and
a future influence are all sums over it. The model runs as usual, through its own projections, norms and rotary
positions, with one difference: its attention is computed here, a block of queries at a time, and each block is passed
to a reader before it is dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from reasonscope.analysis.attention.rows.block import (
    BLOCK,
    AttentionBlock,
    AttentionVisitor,
    ScoreRule,
    attention_blocks,
)
from reasonscope.analysis.attention.rows.served import ServedModel
from reasonscope.data.errors import ArchitectureError
from reasonscope.data.progress import say, working
from reasonscope.data.trace import Span
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.compiled import eagerly_if_compiled
from reasonscope.probes.backends.hooks import HooksBackend
from reasonscope.probes.backends.inference import outside_inference
from reasonscope.probes.generation.padding import check_sequence
from reasonscope.probes.models.model import Model


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The model's input to the attention of `layer`: `query` (batch, head, query, d_head), `key` and `value` (batch,
    kv_head, key, …), after norms and rotary positions. The queries are the last of the keys' tokens."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    rule: ScoreRule


def read_attention(
    model: Model | ServedModel, ids: Sequence[int], read: AttentionVisitor, *, block: int = BLOCK
) -> None:
    """Run `model` over `ids` once and pass the attention of every layer to `read`, block by block, in the order of the
    layers. A model in vLLM does this there, and gives the sums.

    Softmax in float32. Raises InputError for no tokens or a foreign one, ContextError if the context is too short,
    ArchitectureError if the attention of this family cannot be read in this way.
    """
    check_sequence(model, ids)
    if isinstance(model, ServedModel):
        for layer in _without_heads(model, len(ids)):
            read(layer)
        model.read(ids, read)
        return
    if model.hf not in _PROVED:
        _prove_reading(model)
        _PROVED.add(model.hf)
    for layer in _without_heads(model, len(ids)):
        read(layer)
    _read(model, ids, read, block)


def _read(model: Model, ids: Sequence[int], read: AttentionVisitor, block: int) -> None:
    def attend(call: AttentionCall) -> Tensor:
        outputs = []
        value = call.value[0]
        for one in attention_blocks(call.query[0], call.key[0], call.rule, layer=call.layer, block=block):
            read(_with_all_heads(one, model.n_heads))
            outputs.append(_weighted(one.probabilities, value[:, one.keys.slice]))
        work.advance()
        return torch.cat(outputs, dim=1)[None]

    with working("reading attention", total=model.n_layers, unit="layers") as work, attending(model.hf, attend):
        fed = torch.tensor([list(ids)], device=model.device)
        HooksBackend(model.hf, model.layout).forward(fed, mask=torch.ones_like(fed), last_logits_only=True)


def _without_heads(model: Model | ServedModel, n_tokens: int) -> Iterator[AttentionBlock]:
    """NaN in the place of the attention of blocks that have none, so that no analysis counts them."""
    if skipped := model.layout.without_heads:
        say(f"{model.name}: {skipped}")
    parts = [Span(start, min(start + BLOCK, n_tokens)) for start in range(0, n_tokens, BLOCK)]
    for layer in sorted(set(range(model.n_layers)) - set(model.layout.layers_with("attn_out"))):
        for rows in parts:
            nothing = torch.full((1, 1, 1), torch.nan).expand(model.n_heads, len(rows), rows.stop)
            yield AttentionBlock(layer=layer, rows=rows, keys=Span(0, rows.stop), probabilities=nothing)


def _with_all_heads(block: AttentionBlock, n_heads: int) -> AttentionBlock:
    """A block with as many heads as the one with the most; those that it has not are NaN."""
    lacking = n_heads - len(block.probabilities)
    if lacking <= 0:
        return block
    nothing = block.probabilities.new_full((lacking, *block.probabilities.shape[1:]), torch.nan)
    return replace(block, probabilities=torch.cat([block.probabilities, nothing]))


# The models whose attention was found to be what we compute from their queries and keys.
_PROVED: WeakSet[PreTrainedModel] = WeakSet()
_SHORT = 12  # tokens of that proof


def _prove_reading(model: Model) -> None:
    """Compare what is read here with the model's own weights on a few tokens. Raises ArchitectureError if they differ."""
    n = min(_SHORT, model.context_length)
    ids = [i % model.vocabulary for i in range(3, 3 + n)]
    found = {i: torch.zeros(model.n_heads, n, n) for i in model.layout.layers_with("attn_out")}

    def keep(one: AttentionBlock) -> None:
        found[one.layer][:, one.rows.slice, one.keys.slice] = one.probabilities.float().cpu()

    _read(model, ids, keep, BLOCK)
    fed = torch.tensor([ids], device=model.device)
    sites = [Site("attn_probs", i) for i in found if i in model.layout.layers_with("attn_probs")]
    own = HooksBackend(model.hf, model.layout).forward(fed, mask=torch.ones_like(fed), read=sites).activations
    allowed = max(1e-4, 4 * torch.finfo(model.compute_dtype).eps)
    for layer, ours in found.items():
        theirs = own.get(Site("attn_probs", layer))
        if theirs is None or float((ours[: theirs.shape[1]] - theirs[0].float().cpu()).abs().max()) > allowed:
            raise ArchitectureError(
                f"the attention of {model.layout.model_type} (block {layer}) is more than queries on keys, so it cannot be "
                "read block by block; read attn_probs of a short text instead (run_with_cache)"
            )


@contextmanager
def attending(hf: PreTrainedModel, attend: Callable[[AttentionCall], Tensor]) -> Iterator[None]:
    """Inside, the attention of every layer of `hf` is `attend`: from the heads' queries, keys and values to (batch,
    head, query, d_head).

    No mask is made: `attend` knows what a query may see. Restores the previous attention.
    """
    before = hf.config.get_text_config()._attn_implementation
    name = f"reasonscope_{id(attend)}"

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        rule = ScoreRule(
            scaling=options["scaling"],
            softcap=options.get("softcap"),
            window=options.get("sliding_window"),
            sink=options.get("s_aux"),
        )
        layer = module.layer_idx
        assert isinstance(layer, int)

        def answer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(AttentionCall(layer=layer, query=query, key=key, value=value, rule=rule))

        return outside_inference(answer)(query, key, value).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register(name, forward)
    hf.set_attn_implementation(name)
    try:
        with eagerly_if_compiled(hf):
            yield
    finally:
        hf.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name, None)  # register has no inverse


def _weighted(probabilities: Tensor, value: Tensor) -> Tensor:
    """Σ over keys: (head, row, key) and (kv_head, key, d_head) → (head, row, d_head)."""
    heads, rows, keys = probabilities.shape
    grouped = probabilities.to(value.dtype).reshape(len(value), -1, keys)
    return (grouped @ value).view(heads, rows, -1)
