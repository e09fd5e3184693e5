// Intel's matrix units: tiles of 16 rows of 64 bytes, sixteen rows of A times sixteen outputs in one instruction.
//
// A tile of B is 16 lanes of a panel as packed.h lays them out, 1 KB in one piece. A lies in blocks of 16 rows, tile by
// tile, each 1 KB too:
//
//     [rows 0 to 15: [tile 0: 16 x 64 bytes] [tile 1] ...] [rows 16 to 31: ...]
//
// A row of a product depends on that row of A alone, whatever stands in the other fifteen, and an output takes its
// products in the order of the inputs: so a row's result is the same alone and in company.
#pragma once

#include "tiles.h"

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo {

#if defined(__AMX_TILE__)
constexpr bool kTiles = true;

// Asks the system to let this process use tiles; it must be asked before the first one is.
inline bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The compiler is not told which memory these instructions read: what was written to `memory` must lie there from here on.
OCTAVO_INLINE void written(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// While it lives, this thread's eight tiles are whole ones: 0 to 3 sums, 4 and 5 of A, 6 and 7 of B.
class TilesInUse {
 public:
  TilesInUse() {
    struct alignas(64) { uint8_t palette, start, none[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {};
    shape.palette = 1;
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    written(&shape);
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() { _tile_release(); }
};

#define OCTAVO_DOT(sum, a, b)                                  \
  do {                                                         \
    if constexpr (Dot::per_lane == 2) _tile_dpbf16ps(sum, a, b); \
    else _tile_dpbsud(sum, a, b);                              \
  } while (0)

template <int Blocks>
OCTAVO_INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Blocks == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// Adds to tiles 0 to 3 the products of one tile of each of `Blocks` blocks of 16 rows of A, `a_step` bytes apart, and of
// two panels of B: block 0 with each panel, then block 1. B's lanes lie `lane` bytes apart.
template <class Dot, int Blocks>
OCTAVO_INLINE void add_tile(const uint8_t* a, int64_t a_step, const uint8_t* b0, const uint8_t* b1, int64_t lane) {
  _tile_loadd(6, b0, lane);
  _tile_loadd(4, a, 64);
  OCTAVO_DOT(0, 4, 6);
  _tile_loadd(7, b1, lane);
  OCTAVO_DOT(1, 4, 7);
  if constexpr (Blocks == 2) {
    _tile_loadd(5, a + a_step, 64);
    OCTAVO_DOT(2, 5, 6);
    OCTAVO_DOT(3, 5, 7);
  }
}

// All of `count` tiles along the inputs; between() is called after each.
template <class Dot, int Blocks, class Between>
OCTAVO_INLINE void add_tiles(const uint8_t* a, int64_t a_step, const void* b0, const void* b1, int64_t count, int64_t lane,
                             Between&& between) {
  written(a);
  for (int64_t t = 0; t < count; t++) {
    add_tile<Dot, Blocks>(a + t * 1024, a_step, (const uint8_t*)b0 + t * 16 * lane, (const uint8_t*)b1 + t * 16 * lane, lane);
    between();
  }
}

template <class Dot, int Blocks>
OCTAVO_INLINE void add_tiles(const uint8_t* a, int64_t a_step, const void* b0, const void* b1, int64_t count,
                             int64_t lane = 64) {
  add_tiles<Dot, Blocks>(a, a_step, b0, b1, count, lane, [] {});
}

// Stores tiles 0 to 3 as fp32: block 0 of rows to `to`, block 1 to `below` if there are two, rows `stride` floats apart;
// of the second panel nothing if it is not `wide`.
template <int Blocks>
OCTAVO_INLINE void store_tiles(float* to, float* below, int64_t stride, bool wide) {
  _tile_stored(0, to, stride * 4);
  if (wide) _tile_stored(1, to + 16, stride * 4);
  if constexpr (Blocks == 2) {
    _tile_stored(2, below, stride * 4);
    if (wide) _tile_stored(3, below + 16, stride * 4);
  }
}

#else
constexpr bool kTiles = false;
inline bool tiles_granted() { return true; }
struct TilesInUse { ~TilesInUse() {} };
#endif

}  // namespace octavo
