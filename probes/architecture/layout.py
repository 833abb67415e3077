"""Where each architecture keeps the modules that we read and write: a table with one row per family, checked on the live model."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reasonscope.data.errors import ArchitectureError, InputError, SiteError
from reasonscope.probes.architecture.sites import Site

# Takes a router and its logits (row, expert); returns what the router hands on: logits, scores and chosen experts.
Route = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]


def _softmax_then_topk(router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Qwen3-MoE: the probabilities of the chosen experts, normalised to sum to 1 if the config says so."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float)
    scores, experts = torch.topk(probabilities, _chosen(router), dim=-1)
    if router.norm_topk_prob:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return logits, scores.to(logits.dtype), experts


def _topk_then_softmax(router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gpt-oss: a softmax over the chosen experts only."""
    values, experts = torch.topk(logits, _chosen(router), dim=-1)
    return logits, torch.softmax(values, dim=-1, dtype=values.dtype), experts


def _sigmoid_in_groups(router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3: sigmoids, plus a bias that balances the load, choose experts from the best groups; the weights omit the bias."""
    factor = router.routed_scaling_factor
    assert isinstance(factor, int | float)
    scores = logits.sigmoid()
    biased = (scores + router.get_buffer("e_score_correction_bias")).unflatten(-1, (router.num_group, -1))
    groups = biased.topk(2, dim=-1).values.sum(dim=-1).topk(router.topk_group, dim=-1, sorted=False).indices
    allowed = torch.zeros_like(biased[..., 0]).scatter(-1, groups, 1).bool()[..., None]
    experts = biased.where(allowed, -torch.inf).flatten(-2).topk(_chosen(router), dim=-1, sorted=False).indices
    weights = scores.gather(-1, experts)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * factor, experts


def _chosen(router: nn.Module) -> int:
    """How many experts a token goes to."""
    assert isinstance(router.top_k, int)
    return router.top_k


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The modules of an architecture, as dotted paths: a row of `LAYOUTS`, or your own for `load_model(layout=…)`.

    In every row resid_pre + attn_out + mlp_out == resid_post, even if attention and MLP both read the block's input (GPT-NeoX).

    Attributes:
        model_type: The architecture, as `config.model_type` names it.
        blocks: The list of blocks, from the model.
        embedding: The token embedding, from the model.
        final_norm: The norm before the unembedding, from the model.
        attention: The attention, from a block; it returns (output, weights).
        o_proj: The output projection of the attention, from a block; it takes the heads side by side.
        mlp: The MLP, from a block.
        attn_out: The module whose output is added to the residual stream: the attention itself, or the norm after it.
        mlp_out: The same for the MLP.
        unembedding: The output layer, from the model.
        router: The router of a mixture of experts, from a block; None for dense models.
        route: What the router hands on, given its logits.
        sinks: Whether attention rows may sum to less than 1.

    Example:
        >>> row = resolve_layout(AutoConfig.from_pretrained("Qwen/Qwen3-0.6B"))
        >>> own = replace(row, model_type="my_qwen3")
        >>> model = load_model("path/to/model", layout=own)
    """

    model_type: str
    blocks: str
    embedding: str
    final_norm: str
    attention: str
    o_proj: str
    mlp: str
    attn_out: str
    mlp_out: str
    unembedding: str = "lm_head"
    router: str | None = None
    route: Route | None = None
    sinks: bool = False

    @property
    def has_post_norm(self) -> bool:
        """Whether a norm stands between the attention's output projection and the residual stream."""
        return self.attn_out != self.attention

    def block(self, hf: PreTrainedModel, layer: int) -> nn.Module:
        """Block `layer`, counted from 0."""
        return hf.get_submodule(self.blocks_path(layer))

    def blocks_path(self, layer: int) -> str:
        return f"{self.blocks}.{layer}"

    def path(self, site: Site) -> str:
        """The path from the model to the module whose input (`resid_pre`, `z`) or output (the rest) `site` is."""
        inside = {
            "resid_pre": "",
            "resid_post": "",
            "attn_out": self.attn_out,
            "mlp_out": self.mlp_out,
            "z": self.o_proj,
            "attn_probs": self.attention,
            "router": self.router,
        }[site.point]
        if inside is None:
            raise SiteError(f"{site}: {self.model_type} is not a mixture of experts, so it has no router")
        return f"{self.blocks_path(site.layer)}.{inside}".rstrip(".")

    def module(self, hf: PreTrainedModel, site: Site) -> nn.Module:
        """The module at `path(site)`. Raises SiteError if this model has no such layer, or the layer has no router."""
        try:
            return hf.get_submodule(self.path(site))
        except AttributeError:
            n_layers = hf.config.get_text_config().num_hidden_layers
            if site.layer >= n_layers:
                raise SiteError(
                    f"{site}: the model has {n_layers} layers, so the last is {site.point}.{n_layers - 1}"
                ) from None
            # Some blocks of a mixture of experts are dense.
            raise SiteError(f"{site}: block {site.layer} of this {self.model_type} has no {site.point}") from None

    def output_weights(self, hf: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_O (head, d_head, d_model) and the bias (d_model,) of the output projection of block `layer`.

        Raises InputError if accelerate has offloaded it or it is quantised.
        """
        projection = self.block(hf, layer).get_submodule(self.o_proj)
        weight, bias = projection.weight, getattr(projection, "bias", None)
        assert isinstance(weight, Tensor)
        if reason := _unreadable(weight):
            raise InputError(
                f"the output projection of block {layer} is {reason}, so its weights cannot be read; "
                "load the model without quantisation, on devices with enough memory for it"
            )
        if isinstance(projection, nn.Linear):
            weight = weight.T  # Linear keeps (out, in), the Conv1D of GPT-2 keeps (in, out)
        return weight.reshape(head_count(hf.config), -1, weight.shape[-1]), bias

    def attention_of_heads(self, hf: PreTrainedModel, layer: int, z: Tensor) -> Tensor:
        """`attn_out` (batch, token, d_model) of block `layer`, computed from `z` (batch, token, head, d_head) of its heads.

        It is the sum of what the heads write, plus the bias, after the post-norm if the block has one.
        """
        weight, bias = self.output_weights(hf, layer)
        written = torch.einsum("bthd,hdm->bthm", z, weight.to(z)).sum(dim=2)
        written = written if bias is None else written + bias.to(z)
        if not self.has_post_norm:
            return written
        normed: Tensor = self.module(hf, Site("attn_out", layer))(written)
        return normed


def head_count(config: PretrainedConfig) -> int:
    """Number of query heads in a block."""
    return int(config.get_text_config().num_attention_heads)


_LLAMA = Layout(
    model_type="llama",
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    attention="self_attn",
    o_proj="self_attn.o_proj",
    mlp="mlp",
    attn_out="self_attn",
    mlp_out="mlp",
)
_GEMMA = replace(_LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
_GPT2 = Layout(
    model_type="gpt2",
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    attention="attn",
    o_proj="attn.c_proj",
    mlp="mlp",
    attn_out="attn",
    mlp_out="mlp",
)
_GPT_NEOX = Layout(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    o_proj="attention.dense",
    mlp="mlp",
    attn_out="attention",
    mlp_out="mlp",
)

LAYOUTS = MappingProxyType(
    {
        row.model_type: row
        for row in (
            _LLAMA,
            replace(_LLAMA, model_type="qwen2"),
            replace(_LLAMA, model_type="qwen3"),
            replace(_LLAMA, model_type="qwen3_moe", router="mlp.gate", route=_softmax_then_topk),
            # Latent attention: `z` has the values' width (v_head_dim), which is not that of queries and keys.
            replace(_LLAMA, model_type="deepseek_v3", router="mlp.gate", route=_sigmoid_in_groups),
            replace(_LLAMA, model_type="mistral"),
            replace(_LLAMA, model_type="phi3"),
            replace(_LLAMA, model_type="gpt_oss", router="mlp.router", route=_topk_then_softmax, sinks=True),
            replace(_GEMMA, model_type="gemma2"),
            replace(_GEMMA, model_type="gemma3_text"),
            replace(_GEMMA, model_type="olmo2"),  # norms after attention and MLP, as in Gemma, but not before them
            _GPT2,
            _GPT_NEOX,
        )
    }
)


_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # other types are packed or need scales


def embedding_rows(hf: PreTrainedModel, layout: Layout) -> Tensor:
    """The weights of the token embedding (vocab, d_model)."""
    weight = hf.get_submodule(layout.embedding).weight
    assert isinstance(weight, Tensor)
    return weight


def input_device(hf: PreTrainedModel, layout: Layout) -> torch.device:
    """The device that token ids are fed on: that of the embedding, or the CPU if accelerate has offloaded it."""
    rows = embedding_rows(hf, layout)
    return torch.device("cpu") if rows.is_meta else rows.device


def resolve_layout(config: PretrainedConfig) -> Layout:
    """The row of `LAYOUTS` for `config.model_type`. Raises ArchitectureError if the table has none."""
    row = LAYOUTS.get(config.model_type)
    if row is None:
        example = ", ".join(f"{f.name}={getattr(_LLAMA, f.name)!r}" for f in fields(Layout) if getattr(_LLAMA, f.name))
        raise ArchitectureError(
            f"no layout for the architecture {config.model_type!r}; supported are {', '.join(sorted(LAYOUTS))}. "
            "Describe yours with load_model(…, layout=Layout(…)), or add it to LAYOUTS in probes/architecture/layout.py; "
            f"Llama's is Layout({example})"
        )
    return row


def check_layout(hf: PreTrainedModel, layout: Layout) -> None:
    """Compare names and shapes with the live model. Raises ArchitectureError with those that do not match."""
    config = hf.config.get_text_config()
    faults = []
    for name in ("embedding", "final_norm", "unembedding"):
        if not _has(hf, getattr(layout, name)):
            faults.append(f"{name}: the model has no module {getattr(layout, name)!r}")
    if not _has(hf, layout.blocks):
        faults.append(f"blocks: the model has no module {layout.blocks!r}")
    else:
        faults += _block_faults(hf, layout, config)
    if faults:
        raise ArchitectureError(f"the {layout.model_type} model does not match its layout. {'; '.join(faults)}")


def unreadable(hf: PreTrainedModel, layout: Layout) -> str | None:
    """Why the weights of the first block cannot be read as numbers, though they can be run; None if they can be read."""
    for parameter in layout.block(hf, 0).parameters():
        if reason := _unreadable(parameter):
            return reason
    return None


def _unreadable(weight: Tensor) -> str | None:
    if weight.is_meta:
        return "offloaded"
    return None if weight.dtype in _PLAIN else "quantised"


def _block_faults(hf: PreTrainedModel, layout: Layout, config: PretrainedConfig) -> list[str]:
    faults = []
    blocks = hf.get_submodule(layout.blocks)
    n_blocks = sum(1 for _ in blocks.children())
    if n_blocks != config.num_hidden_layers:
        faults.append(f"blocks: the model has {n_blocks}, but its config says {config.num_hidden_layers}")
    for name in ("attention", "o_proj", "mlp", "attn_out", "mlp_out"):
        path = getattr(layout, name)
        faults += [
            f"{name}: no {path!r} in block {i}" for i, block in enumerate(blocks.children()) if not _has(block, path)
        ]
    if layout.router is not None and not any(_has(block, layout.router) for block in blocks.children()):
        faults.append(f"router: no {layout.router!r} in any block")
    if not faults and not unreadable(hf, layout):
        weight, _ = layout.output_weights(hf, 0)
        if weight.shape[-1] != config.hidden_size:
            faults.append(f"o_proj: writes {weight.shape[-1]} values into a residual stream of {config.hidden_size}")
    return faults


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
