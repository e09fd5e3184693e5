"""Blocks of all layers' caches, cleared by one kernel: a launch for each cache would take as long as a short prompt."""

import torch
import triton
import triton.language as tl


def pointers_to(caches: list[torch.Tensor]) -> torch.Tensor:
    """Addresses of `caches`, [C] int64 on their device; good as long as these live."""
    return torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.int64, device=caches[0].device)


def clear_blocks(pointers_C: torch.Tensor, blocks_N: torch.Tensor, block_bytes: int) -> None:
    """Fills blocks (int32) of `block_bytes` bytes, a multiple of 4, with zeros in every cache."""
    words = block_bytes // 4
    _clear[(len(pointers_C), len(blocks_N))](pointers_C, blocks_N, words, BLOCK=1024, num_warps=4)


@triton.jit(do_not_specialize_on_alignment=["blocks"])
def _clear(pointers, blocks, words, BLOCK: tl.constexpr):
    cache = tl.load(pointers + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    block = cache + tl.load(blocks + tl.program_id(1)).to(tl.int64) * words
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(block + at, tl.zeros([BLOCK], tl.int32), mask=at < words)
