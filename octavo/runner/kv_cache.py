"""The paged KV cache of one device: K and V of every layer in blocks of fixed size.

Which block belongs to whom is the engine's business; here a block is a number.

    k_PBKH of a layer:  block 0 [B tokens][K heads][H]   block 1 [...]   ...   slot = block * B + offset
"""

from math import prod

import numpy as np
import torch

from octavo.batch import Ints
from octavo.config import ModelConfig
from octavo.layers.context import LayerCache, on_device
from octavo.ops import Ops


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for each layer, zeroed."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.layers = [
            LayerCache(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(config.num_layers)
        ]
        self.device = device

    def copy_blocks(self, copies_C2: Ints, ops: Ops) -> None:
        """Copies blocks, (source, destination) a row, in all layers."""
        if len(copies_C2):
            caches = [cache for layer in self.layers for cache in (layer.k_PBKH, layer.v_PBKH)]
            ops.copy_blocks(caches, on_device(copies_C2, self.device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, since attention multiplies by zero what it hides, and a NaN would survive that.

    In RAM they are pages that the system zeroes when they are first touched: a cache takes what is used of it.
    """
    if device.type == "cpu":
        size = prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
