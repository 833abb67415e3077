"""How many rows of a batch fit into memory, with their keys, values and logits."""

import psutil
import torch

from reasonscope.probes.generation.cache import ROOM, growing_cache
from reasonscope.probes.models.model import Model

# Of the free memory; the other half is for the pass over the prompts, and for the copies that are made when a row ends.
SHARE = 0.5
# Bytes of one logit while a token is drawn: float32 logits, log-probabilities and probabilities, and a float64 sum.
_LOGITS = 24


def max_rows_that_fit(model: Model, tokens: int, *, most: int) -> int:
    """The largest of `most`, its half, its quarter … that fits as the number of rows of `tokens` tokens; at least 1.

    A row takes its logits and (tokens + ROOM) times the keys and values of a token, which are measured with one token on the device of
    each layer. All rows together may take `SHARE` of the free memory of each device. Halving means that a little more or less free
    memory seldom changes the batch size, which would change the last digits of the results.
    """
    rows = most
    for device, of_row in _row_bytes(model, tokens).items():
        while rows > 1 and rows * of_row > SHARE * _free(device):
            rows //= 2
    return rows


def _row_bytes(model: Model, tokens: int) -> dict[torch.device, int]:
    """Bytes of a row on each device. A windowed layer counts as if its window were the whole text."""
    fed = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    out = model.backend.forward(fed, mask=None, cache=growing_cache(), use_cache=True, last_logits_only=True)
    found = {out.logits.device: _LOGITS * out.logits.shape[-1]}
    for layer in getattr(out.cache, "layers", ()):
        for kept in (layer.keys, layer.values):
            found[kept.device] = found.get(kept.device, 0) + kept.nbytes * (tokens + ROOM)
    return found


def _free(device: torch.device) -> int:
    """Free memory in bytes; on an accelerator this includes what torch has reserved and does not use."""
    if device.type in ("cpu", "mps"):  # mps shares the memory of the CPU
        return int(psutil.virtual_memory().available)
    kind = torch.get_device_module(device)
    return int(kind.mem_get_info(device)[0] + kind.memory_reserved(device) - kind.memory_allocated(device))
