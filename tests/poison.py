"""Freed memory, poisoned: whoever reads what nobody may rely on gets NaN."""

from typing import Any

import numpy as np
import torch


def poison_free_blocks(engine: Any) -> int:
    """Fills the blocks of `engine` that are free, those without a hash, in all layers and in host memory; how many."""
    blocks, swap, cache = engine.scheduler.blocks, engine.scheduler.swap, engine.executor.runner.kv_cache
    free = np.array([block for block in blocks._free_queue if blocks._hash_of[block] is None], np.int64)
    for array in cache._caches:
        _fill(array, free)
    host = list(swap._free)
    if hasattr(cache, "_host_PCBKH"):
        _fill(cache._host_PCBKH, np.array(host, np.int64))
    else:
        for block in host:
            cache._host[block].view(torch.uint8).fill_(0xFF)
    return len(free)


def _fill(array: Any, blocks: np.ndarray) -> None:
    """Bytes of ones are NaN in every type of float, the scales of an int8 cache among them."""
    if isinstance(array, np.ndarray):
        array.view(np.uint8)[blocks] = 0xFF
    else:
        array.view(torch.uint8)[torch.from_numpy(blocks).to(array.device)] = 0xFF
