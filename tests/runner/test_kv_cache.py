"""Blocks on their way to host memory and back: they arrive whole, in every layer, whatever fits at once."""

import numpy as np
import pytest
import torch

from octavo import ops
from octavo.runner import kv_cache
from octavo.runner.kv_cache import HostBlocks, KVCache
from tests.tiny_config import model_config

CPU = torch.device("cpu")
MODEL = model_config(hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4)
BLOCK_BYTES = MODEL.kv_bytes_per_token("float32") * 4


def pairs(*given: tuple[int, int]) -> np.ndarray:
    return np.array(given, np.int32).reshape(-1, 2)


def made(num_host_blocks: int = 6) -> KVCache:
    cache = KVCache(MODEL, 8, 4, torch.float32, CPU, num_host_blocks=num_host_blocks)
    for layer in cache.layers:
        layer.k_PBKH.normal_()
        layer.v_PBKH.normal_()
    return cache


def contents(cache: KVCache, block: int) -> torch.Tensor:
    return torch.stack([x[block].clone() for layer in cache.layers for x in (layer.k_PBKH, layer.v_PBKH)])


@pytest.mark.parametrize("staged", [1, 2 * BLOCK_BYTES, 2**30])
def test_blocks_go_out_and_come_back_elsewhere(staged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_STAGED", staged)
    monkeypatch.setattr(kv_cache, "_MADE_AT_ONCE", staged)
    cache = made()
    was = [contents(cache, block) for block in range(8)]
    cache.swap_out(pairs((1, 5), (3, 0), (4, 2)))
    for layer in cache.layers:
        layer.k_PBKH[[1, 3, 4]] = -1
        layer.v_PBKH[[1, 3, 4]] = -1
    cache.swap_in(pairs((3, 5), (7, 0), (1, 2)))
    for block, source in ((3, 1), (7, 3), (1, 4), (0, 0), (2, 2), (5, 5), (6, 6)):
        torch.testing.assert_close(contents(cache, block), was[source], rtol=0, atol=0)


def test_nothing_to_copy_needs_no_host_memory() -> None:
    cache = made(num_host_blocks=0)
    was = contents(cache, 0)
    cache.swap_out(pairs())
    cache.swap_in(pairs())
    cache.copy_blocks(pairs((0, 5)), ops.for_device(CPU))
    torch.testing.assert_close(contents(cache, 5), was, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_blocks_come_back_elsewhere(dtype: torch.dtype) -> None:
    cache = KVCache(MODEL, 8, 4, dtype, CPU)
    for layer in cache.layers:
        layer.k_PBKH.normal_()
        layer.v_PBKH.normal_()
    was = [contents(cache, block) for block in range(8)]
    content = cache.read_blocks(np.array([5, 2], np.int32))
    assert content.shape == (2, cache.block_bytes)
    cache.write_blocks(np.array([0, 5], np.int32), content)
    for block, source in ((0, 5), (5, 2), (1, 1), (2, 2), (3, 3)):
        torch.testing.assert_close(contents(cache, block), was[source], rtol=0, atol=0)
    cache.write_blocks(np.empty(0, np.int32), np.empty((0, 0), np.uint8))


def test_memory_that_cannot_be_pinned_is_taken_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def scarce(*shape: object, pin_memory: bool = False, **more: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("no more can be locked")
        return empty(*shape, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", scarce)
    blocks = HostBlocks(3, (2, 4), torch.float32, torch.device("cuda"))
    blocks[2].fill_(7)
    assert blocks[2].tolist() == [[7] * 4] * 2
    assert "no more can be locked" in caplog.text
