"""Keys and values of decoded tokens, whose rows can be copied, dropped and joined."""

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, (rows, heads, positions, head size), in buffers that double in
    size when they are full. The library's layer copies all of them for each token."""

    buffers: list[Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self._grow(key_states, value_states, max(64, 2 * end))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., begin:end, :] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Copy or drop rows; the next update makes buffers for them."""
        super().batch_select_indices(indices)
        self.buffers = None

    def rearrange(
        self, rows: list[int], begin: int, other: "GrowingLayer | None", length: int, room: int
    ) -> None:
        """Keep these rows from position `begin` on, and put the rows of another layer behind them.

        All rows end at position `length`; what is in front of a shorter one is zero. room: free
        positions behind them.
        """
        if not self.is_initialized:  # a layer that reads the keys of another one
            return
        kept = [(states[rows][..., begin:, :],) for states in (self.keys, self.values)]
        if other is not None:
            kept = [(*own, new) for own, new in zip(kept, (other.keys, other.values), strict=True)]
        self.buffers = []
        for parts in kept:
            _, heads, _, size = parts[0].shape
            buffer = parts[0].new_zeros(sum(map(len, parts)), heads, length + room, size)
            at = 0
            for part in parts:
                buffer[at : at + len(part), :, length - part.shape[-2] : length] = part
                at += len(part)
            self.buffers.append(buffer)
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)

    def _grow(self, key_states: Tensor, value_states: Tensor, size: int) -> None:
        """New buffers for `size` positions, with the keys and values so far."""
        buffers = [
            states.new_empty(*states.shape[:-2], size, states.shape[-1])
            for states in (key_states, value_states)
        ]
        if length := self.get_seq_length():
            for buffer, states in zip(buffers, (self.keys, self.values), strict=True):
                buffer[..., :length, :] = states
        self.buffers = buffers


def make_cache(model: nn.Module) -> DynamicCache | None:
    """An empty cache whose rows can be copied; its layers grow in buffers if all of them attend to
    every position. None for other models, for example recurrent ones, which make their own."""
    cache = DynamicCache(config=model.config)
    types = {type(layer) for layer in cache.layers}
    if types == {DynamicLayer}:
        cache.layers = [GrowingLayer() for _ in cache.layers]
    elif not types <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    return cache


def can_join(cache: DynamicCache | None) -> bool:
    """Whether the rows of two such caches can stand in one."""
    return cache is not None and {type(layer) for layer in cache.layers} == {GrowingLayer}


def join(
    cache: DynamicCache, rows: list[int], begin: int, other: DynamicCache | None, room: int
) -> None:
    """`GrowingLayer.rearrange` of all layers, with rows as long as the longest of both caches."""
    length = cache.get_seq_length() - begin
    others = [None] * len(cache.layers) if other is None else other.layers
    if other is not None:
        length = max(length, other.get_seq_length())
    for layer, new in zip(cache.layers, others, strict=True):
        layer.rearrange(rows, begin, new, length, room)
