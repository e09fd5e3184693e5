"""Rows that begin with the same blocks are found, and what is not worth it is left alone."""

import numpy as np

from octavo.runner.prefix_groups import find_groups, most_tiles


def tables(*rows: list[int]) -> np.ndarray:
    found = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


LONG, OTHER = list(range(100, 140)), list(range(200, 240))


def test_rows_of_a_group_stand_together():
    block_tables = tables(*([*(LONG if i % 2 else OTHER), 300 + i] for i in range(10)), [1, 2])
    seq_lens = np.array([643 + i for i in range(10)] + [20], np.int32)
    groups = find_groups(block_tables, seq_lens, 16, rows_of_tile=3)
    assert groups is not None
    assert groups.order.tolist() == [10, 1, 3, 5, 7, 9, 0, 2, 4, 6, 8]
    assert groups.lengths.tolist() == [0] + [640] * 10
    assert list(zip(groups.tile_start.tolist(), groups.tile_rows.tolist(), strict=True)) == [
        *((1, 3), (4, 2)),
        *((6, 3), (9, 2)),
    ]
    assert most_tiles(11, 3) >= 4


def test_what_a_row_computes_now_is_not_shared():
    block_tables = tables(*(LONG for _ in range(5)))
    groups = find_groups(block_tables, np.full(5, 640, np.int32), 16, rows_of_tile=64)
    assert groups is not None
    assert set(groups.lengths.tolist()) == {624}, "the newest token's key lies in the last block"


def test_few_rows_or_short_beginnings_go_alone():
    seq_lens = np.full(3, 641, np.int32)
    assert find_groups(tables(*([*LONG, i] for i in range(3))), seq_lens, 16, 64) is None
    seq_lens = np.full(6, 641, np.int32)
    assert find_groups(tables(*([*LONG[:15], *range(40 * i, 40 * i + 26)] for i in range(6))), seq_lens, 16, 64) is None
