"""Sequences of different lengths as one batch."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.errors import ContextError, InputError
from reasonscope.probes.models.prompting import Prompting


def check_vocabulary(sequences: Sequence[Sequence[int]] | NDArray[np.int64], vocabulary: int) -> None:
    """Raise InputError for a token outside a vocabulary of `vocabulary` tokens."""
    for i, sequence in enumerate(sequences):
        ids = np.asarray(sequence)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
            foreign = ids[(ids < 0) | (ids >= vocabulary)][0]
            raise InputError(
                f"token {foreign} of prompt {i} is not in the vocabulary of {vocabulary}; encode it with the model's tokenizer"
            )


def left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`sequences` as one left-padded batch: ids (batch, token) with 0 as padding, and the mask (batch, token), 1 on real tokens."""
    width = max(map(len, sequences))
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = sequence
        mask[row, width - len(sequence) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def check_sequence(model: Prompting, ids: Sequence[int]) -> None:
    """Raise InputError or ContextError if `model` cannot read `ids` in one pass."""
    if not len(ids):
        raise InputError("no tokens to feed; tokenise a trace first that was imported as text")
    if len(ids) > model.context_length:
        raise ContextError(
            f"a sequence of {len(ids)} tokens; the context of {model.name} holds {model.context_length}. Give only its beginning"
        )
    check_vocabulary([ids], model.vocabulary)
