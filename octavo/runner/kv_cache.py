"""The paged KV cache of one device: K and V of every layer in blocks of fixed size; and its tier in host memory.

Which block belongs to whom is the engine's business; here a block is a number. On the device a block lies in as many
pieces as there are caches (K and V of each layer), on the host in one, so that it crosses the link whole.

    k_PBKH of a layer:  block 0 [B tokens][K heads][H]   block 1 [...]   ...   slot = block * B + offset
    host_PCBKH:         block 0 [K of layer 0][V of layer 0][K of layer 1] ...   block 1 [...]   ...
"""

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import Batch, Ints
from octavo.config import ModelConfig
from octavo.layers.context import LayerCache
from octavo.log import logger
from octavo.ops import Ops
from octavo.ops.transfer import on_device

# Bytes of blocks gathered at once on their way between device and host.
_STAGED = 64 * 1024**2
# Bytes of host memory made at once: about 10 ms where it is pinned.
_MADE_AT_ONCE = 16 * 1024**2


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for each layer, zeroed, and `num_host_blocks` in host memory."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_host_blocks: int = 0,
    ):
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.layers = [
            LayerCache(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(config.num_layers)
        ]
        self.device = device
        # Moved as bytes where torch cannot move the type itself.
        moved = torch.uint8 if dtype.itemsize == 1 else dtype
        self._caches = [cache.view(moved) for layer in self.layers for cache in (layer.k_PBKH, layer.v_PBKH)]
        self._host = HostBlocks(num_host_blocks, (len(self._caches), *shape[1:]), moved, device)

    def move_blocks(self, batch: Batch, ops: Ops) -> None:
        """All that a step wants moved before it computes, in the order in which one may need the other's place."""
        self.swap_out(batch.swap_out)
        self.swap_in(batch.swap_in)
        self.write_blocks(batch.loaded_blocks, batch.loaded_bytes)
        self.copy_blocks(batch.block_copies, ops)

    def copy_blocks(self, copies_C2: Ints, ops: Ops) -> None:
        """Copies blocks, (source, destination) a row, in all layers."""
        if len(copies_C2):
            ops.copy_blocks(self._caches, on_device(copies_C2, self.device))

    def swap_out(self, copies_O2: Ints) -> None:
        """Copies blocks to host memory, (device block, host block) a row."""
        for blocks, host in self._pieces(copies_O2):
            whole = torch.stack([cache.index_select(0, blocks) for cache in self._caches], dim=1)
            for piece, place in zip(whole, host, strict=True):
                self._host[place].copy_(piece, non_blocking=True)

    def swap_in(self, copies_I2: Ints) -> None:
        """Copies blocks back from host memory, (device block, host block) a row."""
        for blocks, host in self._pieces(copies_I2):
            whole = torch.empty((len(host), *self._host.shape), dtype=self._host.dtype, device=self.device)
            for piece, place in zip(whole, host, strict=True):
                piece.copy_(self._host[place], non_blocking=True)
            for i, cache in enumerate(self._caches):
                cache.index_copy_(0, blocks, whole[:, i])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self._host.block_bytes

    def read_blocks(self, blocks_L: Ints) -> NDArray[np.uint8]:
        """The bytes of blocks, whole as on the host, [L, `block_bytes`]."""
        blocks = on_device(blocks_L, self.device).long()
        whole_LC = torch.stack([cache.index_select(0, blocks) for cache in self._caches], dim=1)
        return whole_LC.view(len(blocks_L), -1).view(torch.uint8).cpu().numpy()

    def write_blocks(self, blocks_L: Ints, content: NDArray[np.uint8]) -> None:
        """The reverse of `read_blocks`."""
        if not len(blocks_L):
            return
        blocks = on_device(blocks_L, self.device).long()
        first = self._caches[0]
        whole = torch.from_numpy(content).to(self.device).view(first.dtype)
        for cache, part in zip(self._caches, whole.chunk(len(self._caches), dim=1), strict=True):
            cache.index_copy_(0, blocks, part.reshape(len(blocks_L), *cache.shape[1:]))

    def _pieces(self, copies_C2: Ints) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Device blocks and host blocks, as many at a time as `_STAGED` allows.

        Copies and kernels of a device run in the order of their calls, so nothing has to be waited for.
        """
        step = max(1, _STAGED // self.block_bytes)
        for start in range(0, len(copies_C2), step):
            part = copies_C2[start : start + step]
            yield on_device(part[:, 0], self.device).long(), part[:, 1].tolist()


class HostBlocks:
    """`count` blocks of `shape` in host memory. Beside a GPU it is pinned, else copies are slow and not asynchronous.

    Pinning takes about half a second a GiB, in which the driver lets nobody else in: a piece is made when a block of it
    is first asked for, so that engines that never swap neither wait for it nor take the memory.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype = shape, dtype
        self.block_bytes = prod(shape) * dtype.itemsize
        self._count, self._pinned = count, device.type == "cuda"
        self._at_once = max(1, _MADE_AT_ONCE // self.block_bytes)
        self._pieces: list[torch.Tensor | None] = [None] * -(-count // self._at_once)

    def __getitem__(self, block: int) -> torch.Tensor:
        number, within = divmod(block, self._at_once)
        piece = self._pieces[number]
        if piece is None:
            size = min(self._at_once, self._count - number * self._at_once)
            piece = self._pieces[number] = _host_memory((size, *self.shape), self.dtype, self._pinned)
        return piece[within]


def kv_torch_dtype(name: str) -> torch.dtype:
    """What `EngineConfig.kv_dtype` is called in torch."""
    dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, since attention multiplies by zero what it hides, and a NaN would survive that.

    In RAM they are pages that the system zeroes when they are first touched: a cache takes what is used of it.
    """
    if device.type == "cpu":
        size = prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
    return torch.zeros(prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype).view(shape)


def _host_memory(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)
    except RuntimeError as error:
        logger.warning("host memory could not be pinned, so swapped blocks are copied slower: %s", error)
        return torch.empty(shape, dtype=dtype)
