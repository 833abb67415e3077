"""A cache of keys and values with spare room, in which new tokens are written in place, and how many rows of it fit into memory."""

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from reasonscope.probes.models.model import Model

ROOM = 256  # tokens for which room is made at once
SMALL = 2**20  # bytes of keys below which copying is as fast as writing in place: they fit into the processor's cache
# Of the free memory; the other half is for the pass over the prompts, and for the copies that are made when a row ends.
SHARE = 0.5
# Bytes of one logit while a token is drawn: float32 logits, log-probabilities and probabilities, and a float64 sum.
_LOGITS = 24


def growing_cache(config: PreTrainedConfig | None = None) -> DynamicCache:
    """An empty cache for a model of `config`: layers of full attention grow in place, and windowed ones are those of transformers.

    Without a configuration every layer keeps all tokens.
    """
    cache = _GrowingCache(config=config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    if not cache.layers:
        cache.layer_class_to_replicate = _GrowingLayer
    return cache


class _GrowingCache(DynamicCache):
    """A `DynamicCache` that also keeps rows of recurrent and convolutional states, of which that of transformers cannot choose rows."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(indices)  # type: ignore[arg-type]  # selects rows of whatever the layer keeps
            else:
                layer.batch_select_indices(indices)  # type: ignore[union-attr]  # every other kind has it


class _GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values (batch, kv_head, token, d_head) are views of larger tensors.

    If other keys and values were put in their place (by a crop or a reordering), this is noticed, and they are copied once.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms: list[Tensor] = []
        self._views: list[Tensor] = []

    @property
    def _in_place(self) -> bool:
        """Whether the keys and values are still the last views that were made."""
        return bool(self._views) and self.keys is self._views[0] and self.values is self._views[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, kv_head, new token, d_head); return those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._in_place and (self.keys is None or self.keys.nbytes < SMALL):
            return super().update(key_states, value_states)
        n = self.get_seq_length()
        end = n + key_states.shape[-2]
        if not self._in_place or end > self._rooms[0].shape[-2]:
            self._rooms = [
                new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1]) for new in (key_states, value_states)
            ]
            if n and self.keys is not None and self.values is not None:
                self._rooms[0][..., :n, :], self._rooms[1][..., :n, :] = self.keys, self.values
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room.narrow(-2, n, end - n).copy_(new)
        return self._look(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, with their spare room."""
        if not self.is_initialized or not self._in_place:
            super().batch_select_indices(indices)
        else:
            self._rooms = [room[indices] for room in self._rooms]
            self._look(self.get_seq_length())

    def _look(self, n: int) -> tuple[Tensor, Tensor]:
        keys, values = self._views = [room.narrow(-2, 0, n) for room in self._rooms]
        self.keys, self.values = keys, values
        return keys, values


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
    cache = growing_cache(model.hf.config)
    out = model.backend.forward(fed, mask=None, cache=cache, use_cache=True, last_logits_only=True)
    found = {out.logits.device: _LOGITS * out.logits.shape[-1]}
    for layer in getattr(out.cache, "layers", ()):
        for kept in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if kept is not None:
                found[kept.device] = found.get(kept.device, 0) + kept.nbytes * (tokens + ROOM)
        # Recurrent and convolutional states do not grow with the text.
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            for state in (one for one in states.values() if one is not None):
                found[state.device] = found.get(state.device, 0) + state.nbytes
    return found


def _free(device: torch.device) -> int:
    """Free memory in bytes; on an accelerator this includes what torch has reserved and does not use."""
    if device.type in ("cpu", "mps"):  # mps shares the memory of the CPU
        return int(psutil.virtual_memory().available)
    kind = torch.get_device_module(device)
    return int(kind.mem_get_info(device)[0] + kind.memory_reserved(device) - kind.memory_allocated(device))
