"""A cache of keys and values with spare room: a new token is written in place, and earlier ones are not copied each time."""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens for which room is made at once
SMALL = (
    2**20
)  # bytes of keys below which copying is as fast as writing in place, because they fit into the processor's cache


def growing_cache(config: PreTrainedConfig | None = None) -> DynamicCache:
    """An empty cache for a model of `config`: layers of full attention grow in place, and windowed ones are those of transformers.

    Without a configuration every layer keeps all tokens.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    if not cache.layers:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


class GrowingLayer(DynamicLayer):
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
