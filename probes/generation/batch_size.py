"""How many rows of a batch there is room for: keys, values and logits of rows that are written to their end."""

import psutil
import torch

from reasonscope.probes.generation.cache import ROOM, growing_cache
from reasonscope.probes.models.model import Model

# Of the memory that is free; the other half is for the pass over the prompts, and for what is copied when a row ends.
SHARE = 0.5
# Bytes of one logit while a token is drawn: float32 logits, log-probabilities and probabilities, and a float64 sum.
_LOGITS = 24


def max_rows_that_fit(model: Model, tokens: int, *, most: int) -> int:
    """The first of `most`, its half, its quarter … of rows whose caches fit, each of `tokens` tokens; at least 1.

    A row takes (tokens + ROOM) × bytes of keys and values a token, measured on one token in every layer and counted on the device where
    it lies, and its logits; all rows may take `SHARE` of what is free on each device. Halves, so that a little more or less free memory
    seldom changes the batches, which change the last digit of what is computed.
    """
    rows = most
    for device, of_row in _row_bytes(model, tokens).items():
        while rows > 1 and rows * of_row > SHARE * _free(device):
            rows //= 2
    return rows


def _row_bytes(model: Model, tokens: int) -> dict[torch.device, int]:
    """What a row takes on each device. A window counts as if it were the whole text."""
    fed = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    out = model.backend.forward(fed, mask=None, cache=growing_cache(), use_cache=True, last_logits_only=True)
    found = {out.logits.device: _LOGITS * out.logits.shape[-1]}
    for layer in getattr(out.cache, "layers", ()):
        for kept in (layer.keys, layer.values):
            found[kept.device] = found.get(kept.device, 0) + kept.nbytes * (tokens + ROOM)
    return found


def _free(device: torch.device) -> int:
    """Bytes; on an accelerator with what torch holds and does not use."""
    if device.type in ("cpu", "mps"):  # mps shares the memory of the host
        return int(psutil.virtual_memory().available)
    kind = torch.get_device_module(device)
    return int(kind.mem_get_info(device)[0] + kind.memory_reserved(device) - kind.memory_allocated(device))
