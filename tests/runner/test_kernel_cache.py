"""The kernels' cache: blocks copied, swapped, read and written whole, in every layer."""

from types import SimpleNamespace

import numpy as np
import pytest

from octavo.runner.kernel_cache import KernelCache
from tests.steps import Row, Steps
from tests.tiny_config import model_config

MODEL = model_config(hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4)


def pairs(*given: tuple[int, int]) -> np.ndarray:
    return np.array(given, np.int32).reshape(-1, 2)


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def cache(request: pytest.FixtureRequest) -> KernelCache:
    made = KernelCache(MODEL, 8, 4, request.param, num_host_blocks=6)
    random = np.random.default_rng(1)
    for layer in made.layers:
        for array in (layer.k_PBKH, layer.v_PBKH):
            array[:] = random.integers(0, 256, array.shape)
    return made


def contents(cache: KernelCache, block: int) -> np.ndarray:
    return np.stack([x[block].copy() for layer in cache.layers for x in (layer.k_PBKH, layer.v_PBKH)])


def check(cache: KernelCache, was: list[np.ndarray], *places: tuple[int, int]) -> None:
    for block, source in places:
        np.testing.assert_array_equal(contents(cache, block), was[source])


def test_blocks_go_out_and_come_back_elsewhere(cache: KernelCache) -> None:
    was = [contents(cache, block) for block in range(8)]
    cache.swap_out(pairs((1, 5), (3, 0), (4, 2)))
    for layer in cache.layers:
        layer.k_PBKH[[1, 3, 4]] = 0
        layer.v_PBKH[[1, 3, 4]] = 0
    cache.swap_in(pairs((3, 5), (7, 0), (1, 2)))
    check(cache, was, (3, 1), (7, 3), (1, 4), (0, 0), (2, 2), (5, 5), (6, 6))


def test_reads_go_before_writes(cache: KernelCache) -> None:
    was = [contents(cache, block) for block in range(8)]
    cache.copy_blocks(pairs((0, 1), (1, 0), (2, 5)))
    check(cache, was, (1, 0), (0, 1), (5, 2), (2, 2), (3, 3))


def test_bytes_of_blocks_come_back_elsewhere(cache: KernelCache) -> None:
    was = [contents(cache, block) for block in range(8)]
    content = cache.read_blocks(np.array([5, 2], np.int32))
    assert content.shape == (2, cache.block_bytes)
    assert content.dtype == np.uint8
    cache.write_blocks(np.array([0, 5], np.int32), content)
    check(cache, was, (0, 5), (5, 2), (1, 1), (2, 2), (3, 3))


def test_a_block_has_the_bytes_that_are_planned_and_begins_on_a_cache_line(cache: KernelCache) -> None:
    dtype = {1: "int8", 2: "bfloat16", 4: "float32"}[cache.layers[0].k_PBKH.itemsize]
    assert cache.block_bytes == MODEL.kv_bytes_per_token(dtype) * 4
    assert all(array.ctypes.data % 64 == 0 for layer in cache.layers for array in (layer.k_PBKH, layer.v_PBKH))


def test_a_step_moves_in_the_order_in_which_one_may_need_the_others_place(cache: KernelCache) -> None:
    was = [contents(cache, block) for block in range(8)]

    class Runner:
        kv_cache = cache

    batch = Steps(Runner()).batch([(Row([1, 2, 3]), 3)])  # type: ignore[arg-type]
    batch.swap_out = pairs((2, 1))
    batch.swap_in = pairs((4, 1))
    batch.loaded_blocks, batch.loaded_bytes = np.array([2], np.int32), cache.read_blocks(np.array([7], np.int32))
    batch.block_copies = pairs((2, 6))
    cache.move_blocks(batch)
    check(cache, was, (4, 2), (2, 7), (6, 7))


def test_blocks_that_a_step_begins():
    """Those whose first slot is filled and whose last is not; and none of a row that is written nowhere."""
    steps = Steps(SimpleNamespace(kv_cache=KernelCache(MODEL, 16, 4, "float32")))
    rows = [Row([5] * count) for count in (1, 4, 6, 7)]
    batch = steps.batch([(row, len(row.token_ids)) for row in rows])
    begun = [rows[0].block_table[0], rows[2].block_table[1], rows[3].block_table[1]]
    assert batch.begun_blocks(4).tolist() == begun
    assert batch.begun_blocks(4, of_chunks=True).tolist() == begun[1:]
    rows[0].token_ids.append(5)
    rows[1].token_ids.append(5)
    batch = steps.batch([(rows[0], 1), (rows[1], 1)])
    assert batch.begun_blocks(4).tolist() == [rows[1].block_table[1]]
    batch.slots[:] = -1
    assert batch.begun_blocks(4).tolist() == []
