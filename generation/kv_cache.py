"""A cache of keys and values that writes in place: the stock one copies itself for every new token.

Shapes: B rows, G key/value heads, L tokens, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    import torch


class PreallocatedLayer(DynamicLayer):
    """Keys and values (B, G, L, D) of one layer: the front part of larger tensors, its `buffers`."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.buffers: list[torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Put new keys and values (B, G, new, D) behind the cached ones; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if self.buffers is None or self.buffers[0].shape[2] < stop:
            self.allocate_buffers(key_states, value_states, start, stop)
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values

    def allocate_buffers(self, key_states: torch.Tensor, value_states: torch.Tensor, start: Any, stop: int) -> None:
        """Room for `capacity` tokens, or for twice as many as are needed; what is cached moves in."""
        size = self.capacity if stop <= self.capacity else 2 * stop
        buffers = []
        for states, cached in ((key_states, self.keys), (value_states, self.values)):
            buffer = states.new_empty(*states.shape[:2], size, states.shape[3])
            if start:
                buffer[:, :, :start] = cached
            buffers.append(buffer)
        self.buffers = buffers

    # What follows makes new `keys` and `values`: they are no longer part of the buffers.

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.buffers = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the rows `beam_idx` (B,), as beam search does."""
        super().reorder_cache(beam_idx)
        self.buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self.buffers = None


class PreallocatedCache(Cache):
    """Room for `capacity` tokens from the start, prompt and answer; more are taken in, at the price of a copy.

    `prompt_layout` is what ChatGLM-6B keeps here: a tuple of (B,) tensors, or None.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(num_layers)])
        self.prompt_layout = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of all that is cached."""
        super().batch_select_indices(indices)
        if self.prompt_layout is not None:
            self.prompt_layout = tuple(of_rows[indices] for of_rows in self.prompt_layout)
