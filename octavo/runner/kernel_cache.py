"""The paged KV cache of the CPU's kernels, and its tier in host memory: what `kv_cache` is for a device of torch's.

A block's bytes are the kernels' business (`csrc/cache.h`); here they are only moved. Numpy has no bfloat16, so
elements of two bytes are integers; those of one are bytes, as are the scales of an int8 cache among them.
"""

import numpy as np
from numpy.typing import NDArray

from octavo.batch import Batch, Ints
from octavo.config import KV_DTYPE_BYTES, SCALE_BYTES, ModelConfig
from octavo.layers.context import LayerCache
from octavo.ops.cpu.memory import zeros

_ELEMENT = {1: np.uint8, 2: np.uint16, 4: np.float32}


class KernelCache:
    """`num_blocks` blocks of `block_size` tokens for each layer, zeroed, and `num_host_blocks` beside them."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: str, *, num_host_blocks: int = 0):
        element = _ELEMENT[KV_DTYPE_BYTES[dtype]]
        width = config.head_dim + (SCALE_BYTES if dtype == "int8" else 0)
        shape = (num_blocks, block_size, config.num_kv_heads, width)
        self.layers = [LayerCache(zeros(shape, element), zeros(shape, element)) for _ in range(config.num_layers)]
        self._caches = [cache for layer in self.layers for cache in (layer.k_PBKH, layer.v_PBKH)]
        self._host_PCBKH = zeros((num_host_blocks, len(self._caches), *shape[1:]), element)

    def move_blocks(self, batch: Batch) -> None:
        """All that a step wants moved before it computes, in the order in which one may need the other's place."""
        if len(batch.swap_out):
            self.swap_out(batch.swap_out)
        if len(batch.swap_in):
            self.swap_in(batch.swap_in)
        if len(batch.loaded_blocks):
            self.write_blocks(batch.loaded_blocks, batch.loaded_bytes)
        if len(batch.block_copies):
            self.copy_blocks(batch.block_copies)

    def clear_begun(self, batch: Batch) -> None:
        """Clears the blocks that rows begin in a step, see `Batch.begun_blocks`; after `move_blocks`."""
        blocks = batch.begun_blocks(self._caches[0].shape[1])
        if len(blocks):
            for cache in self._caches:
                cache[blocks] = 0

    def copy_blocks(self, copies_C2: Ints) -> None:
        """Copies blocks, (source, destination) a row, in all layers; all reads go before all writes."""
        for cache in self._caches:
            cache[copies_C2[:, 1]] = cache[copies_C2[:, 0]]

    def swap_out(self, copies_O2: Ints) -> None:
        """Copies blocks to host memory, (device block, host block) a row."""
        for i, cache in enumerate(self._caches):
            self._host_PCBKH[copies_O2[:, 1], i] = cache[copies_O2[:, 0]]

    def swap_in(self, copies_I2: Ints) -> None:
        """Copies blocks back from host memory, (device block, host block) a row."""
        for i, cache in enumerate(self._caches):
            cache[copies_I2[:, 0]] = self._host_PCBKH[copies_I2[:, 1], i]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(cache[:1].nbytes for cache in self._caches)

    def read_blocks(self, blocks_L: Ints) -> NDArray[np.uint8]:
        """The bytes of blocks, whole as on the host, [L, `block_bytes`]."""
        whole_LC = np.stack([cache[blocks_L] for cache in self._caches], axis=1)
        return whole_LC.reshape(len(blocks_L), -1).view(np.uint8)

    def write_blocks(self, blocks_L: Ints, content: NDArray[np.uint8]) -> None:
        """The reverse of `read_blocks`."""
        whole_LC = np.ascontiguousarray(content).view(self._caches[0].dtype)
        whole_LC = whole_LC.reshape(len(blocks_L), len(self._caches), *self._caches[0].shape[1:])
        for i, cache in enumerate(self._caches):
            cache[blocks_L] = whole_LC[:, i]
