"""Ablate a direction in the weights, so that the model cannot write it (arXiv 2406.11717, section 4.1)."""

import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from reasonscope.data.errors import ArchitectureError, InputError
from reasonscope.probes.architecture.layout import BlockLayout, embedding_rows, unreadable
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.operators import project_out


def orthogonalised(model: Model, direction: NDArray[np.floating]) -> PreTrainedModel:
    """Copy a model and remove a direction from everything that writes to the residual stream: W ← W − r̂ r̂ᵀW.

    These are the embedding and the outputs of attention and MLP, with their biases. Up to rounding, the logits equal those under
    `refusal.ablated_everywhere`.

    Args:
        model: The model; it stays as it is.
        direction: (d_model,), of any length but 0.

    Returns:
        The Hugging Face model of the copy.

    Raises:
        ArchitectureError: For mixtures of experts and families with a norm after attention or MLP.
        InputError: If the weights are not in memory, or the direction has another width, length 0 or NaN.

    Departures: shared embedding and unembedding weights are untied first; the released code changes the unembedding too.

    Example:
        (direction,) = vector.directions.values()
        hf = orthogonalised(model, direction)
        hf.save_pretrained("without-refusal")
    """
    for layer, block_layout in enumerate(model.layout.of_block):
        if reason := _rescaled(block_layout):
            raise ArchitectureError(
                f"the weights of {model.layout.model_type} cannot be orthogonalised: block {layer} {reason}; "
                "ablate while the model runs instead (steering.methods.refusal.ablated_everywhere)"
            )
    norm = float(np.linalg.norm(direction))
    if direction.shape != (model.d_model,) or not norm or not np.isfinite(norm):
        raise InputError(
            f"a direction of shape {direction.shape} and length {norm}; give one of shape ({model.d_model},) and finite length above 0"
        )
    if reason := unreadable(model.hf, model.layout):
        raise InputError(f"the weights are {reason}; load the model onto a device that holds it")
    hf = copy.deepcopy(model.hf)
    unit = torch.from_numpy(direction / norm).double()
    with torch.no_grad():
        _untie(hf, model)
        for table in _tables(hf, model):
            table.copy_(_without(table, unit))
        for layer in range(model.n_layers):
            for point in ("z", "mlp_post"):
                _clean(model.layout.module(hf, Site(point, layer)), unit)
    return hf


def _rescaled(block: BlockLayout) -> str | None:
    """Why what a block writes is more than its two output projections; None if it is not."""
    if block.o_proj is None or block.down_proj is None:
        return "has experts or a mixer, which write by other weights"
    if block.has_post_norm or not block.down_proj.startswith(block.mlp_out[0].path):
        return "has a norm after attention or MLP, whose weights rescale what was written, so that the direction comes back"
    return None


def save_orthogonalised(model: Model, direction: NDArray[np.floating], folder: str | Path) -> None:
    """Save the copy of `orthogonalised` with its tokenizer as a model folder. Raises InputError for a folder that is not empty."""
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; give a new folder")
    orthogonalised(model, direction).save_pretrained(target, safe_serialization=True)
    model.tokenizer.save_pretrained(target)


def _untie(hf: PreTrainedModel, model: Model) -> None:
    head = hf.get_submodule(model.layout.unembedding)
    table = embedding_rows(hf, model.layout)
    if head.weight is table:
        head.weight = nn.Parameter(table.detach().clone())
    hf.config.get_text_config().tie_word_embeddings = False
    hf.config.tie_word_embeddings = False


def _tables(hf: PreTrainedModel, model: Model) -> list[Tensor]:
    """What writes to the stream before the first block, (row, d_model): the embedding, and GPT-2's positions."""
    learned = getattr(hf.get_submodule(model.layout.embedding.rpartition(".")[0]), "wpe", None)
    return [embedding_rows(hf, model.layout), *([] if learned is None else [learned.weight])]


def _clean(module: nn.Module, unit: Tensor) -> None:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    # A Linear holds (out, in), the Conv1D of GPT-2 (in, out); rows need the width of the residual stream.
    rows = weight.T if isinstance(module, nn.Linear) else weight
    cleaned = _without(rows, unit)
    weight.copy_(cleaned.T if isinstance(module, nn.Linear) else cleaned)
    if isinstance(bias, Tensor):
        bias.copy_(_without(bias, unit))


def _without(rows: Tensor, unit: Tensor) -> Tensor:
    """`rows` (…, d_model) minus their part along `unit`, in float64, so that none is left at the precision of the weights."""
    return project_out(rows.double(), unit.to(rows.device)).to(rows.dtype)
