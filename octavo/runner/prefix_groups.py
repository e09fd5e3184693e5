"""Which rows of a decode step begin with the same blocks, so that attention reads these once for all of them.

Found in the block tables alone, step by step: whoever shares blocks, through the prefix cache, as samples or as beams,
shares them here. No torch. Shapes: R rows, M blocks of the longest row, L tiles of rows.
"""

from dataclasses import dataclass

import numpy as np

from octavo.batch import Ints

# What makes it worth a kernel of its own: rows in a group, and keys that they share.
_LEAST_ROWS = 4
_LEAST_KEYS = 256


@dataclass(slots=True)
class PrefixGroups:
    """Rows in the order in which groups are side by side, with tiles of rows of one group each."""

    order: Ints  # [R] the step's rows as they should stand
    lengths: Ints  # [R] keys that a row shares with its group, in that order; 0 for none
    tile_start: Ints  # [L] first row of a tile, in that order
    tile_rows: Ints  # [L] rows of a tile


def find_groups(block_tables_RM: Ints, seq_lens_R: Ints, block_size: int, rows_of_tile: int) -> PrefixGroups | None:
    """The groups among rows that each compute their last token; None if there are none worth it.

    Rows are of one group if their first blocks are the same, and share as many blocks as all of the group have.
    """
    if len(seq_lens_R) < _LEAST_ROWS:
        return None
    order = np.argsort(block_tables_RM[:, 0], kind="stable")
    first = block_tables_RM[order, 0]
    starts = np.flatnonzero(np.diff(first, prepend=-1))
    ends = np.append(starts[1:], len(first))
    lengths = np.zeros(len(first), np.int32)
    tiles: list[tuple[int, int]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - start < _LEAST_ROWS:
            continue
        rows = order[start:end]
        # Blocks in which every row's tokens but its newest have their keys.
        whole = (int(seq_lens_R[rows].min()) - 1) // block_size
        tables = block_tables_RM[rows, :whole]
        different = np.flatnonzero((tables != tables[0]).any(axis=0))
        shared = (int(different[0]) if len(different) else whole) * block_size
        if shared >= _LEAST_KEYS:
            lengths[start:end] = shared
            tiles += [(row, min(rows_of_tile, end - row)) for row in range(start, end, rows_of_tile)]
    if not tiles:
        return None
    tile_start, tile_rows = np.array(tiles, np.int32).T
    return PrefixGroups(order.astype(np.int32), lengths, tile_start, tile_rows)


def most_tiles(rows: int, rows_of_tile: int) -> int:
    """The most tiles that `rows` rows can make."""
    return -(-rows // rows_of_tile) + rows // _LEAST_ROWS
