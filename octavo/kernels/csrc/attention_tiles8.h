// Attention of a segment of keys by Intel's tiles, for an int8 cache: products of integers, exact in any order.
//
// A query is 16 bits wide, a scale a row, and so is a weight times its value's scale: two bytes, 256 * upper + lower, each
// a row of A of its own. K and V go into tiles as they lie. Up to 8 rows have both bytes in one tile, which is a single
// token's usual case:
//
//     rows 0 to 7:  upper bytes     rows 8 to 15: lower bytes        9 to 16 rows: a tile of each
//
// K's scales multiply the scores. A sum of 512 products of bytes is below 2^24, so both halves are exact as fp32 numbers.
#pragma once

#include "attention_tiles.h"

namespace octavo {

constexpr int kByte = 256;

#if defined(__AMX_TILE__)

inline int64_t tiles8(int64_t width) { return (width + 63) / 64; }
// From a row's upper byte to its lower one, in rows of A.
constexpr int64_t halves_apart(bool few) { return few ? 8 : 16; }

// Row `m` of `rows` queries of `width` floats as two rows of int8 tiles, zeros behind them; gives its scale.
inline float put_query8(const float* x, int64_t width, int64_t m, int64_t rows, int8_t* tiles) {
  constexpr float kMost = 127 * kByte + 127;
  const bool few = rows <= 8;
  const int64_t block = tiles8(width) * 1024;
  int8_t* upper = tiles + (few ? 0 : m / 16 * 2 * block) + m % 16 * 64;
  int8_t* lower = upper + (few ? 8 * 64 : block);
  vf most{};
  for (int64_t k = 0; k < width; k += W) most = max(most, max(load(x + k), vf{} - load(x + k)));
  const float largest_one = largest(most);
  const __m512 inverse = (__m512)set(largest_one > 0 ? kMost / largest_one : 0.0f);
  for (int64_t k = 0; k < tiles8(width) * 64; k += W) {
    const vi whole = k < width ? (vi)_mm512_cvtps_epi32((__m512)load(x + k) * inverse) : vi{};
    const vi high = (whole + kByte / 2) >> 8;
    const int64_t at = k / 64 * 1024 + k % 64;
    _mm_storeu_si128((__m128i*)(upper + at), _mm512_cvtepi32_epi8((__m512i)high));
    _mm_storeu_si128((__m128i*)(lower + at), _mm512_cvtepi32_epi8((__m512i)whole));  // modulo 256
  }
  return largest_one / kMost;
}

// V of all units as panels of 16 elements, [element / 16][lane of tokens][16], the scales of K and V as they follow; K as
// panels too, [unit][lane of H, padded][16], if the cache's own cannot be used.
inline void gather8(const SegmentTask& task, SegmentRoom& room, bool keys_too) {
  const CacheShape& c = task.cache;
  const int64_t H = c.width, whole = tiles8(H) * 16;
  for (int64_t u = 0; u < task.units(); u++) {
    const int64_t key = task.from + 16 * u, token = key % c.block_size, block = task.table[key / c.block_size];
    std::memcpy(room.k_scales + 16 * u, c.scales(task.k_cache, block, task.head) + token, 64);
    std::memcpy(room.v_scales + 16 * u, c.scales(task.v_cache, block, task.head) + token, 64);
    const int32_t* v = c.head(task.v_cache, block, task.head) + token / 4 * H;
    for (int64_t h = 0; h < H; h += 16)
      for (int lane = 0; lane < 4; lane++)
        store_lanes(room.values.data() + h * kSegment + u * 256 + lane * 64, load_lanes(v + lane * H + h));
    if (!keys_too) continue;
    const int32_t* k = c.head(task.k_cache, block, task.head) + token;
    uint8_t* to = room.keys.data() + u * whole * 64;
    for (int64_t lane = 0; lane < H / 4; lane++) store_lanes(to + lane * 64, load_lanes(k + lane * c.block_size));
    std::memset(to + H * 16, 0, size_t(whole * 64 - H * 16));
  }
}

// Adds to tiles 0 to 3 as add_tiles does; A is unsigned where it is `Weights`.
template <bool Weights, int Blocks>
OCTAVO_INLINE void add_tiles8(const void* a, int64_t a_step, const void* b0, const void* b1, int64_t count, int64_t lane = 64) {
#define OCTAVO_DOT8(sum, a, b)                    \
  do {                                           \
    if constexpr (Weights) _tile_dpbusd(sum, a, b); \
    else _tile_dpbssd(sum, a, b);                \
  } while (0)
  written(a);
  for (int64_t t = 0; t < count; t++) {
    const uint8_t* rows = (const uint8_t*)a + t * 1024;
    _tile_loadd(6, (const uint8_t*)b0 + t * 16 * lane, lane);
    _tile_loadd(4, rows, 64);
    OCTAVO_DOT8(0, 4, 6);
    _tile_loadd(7, (const uint8_t*)b1 + t * 16 * lane, lane);
    OCTAVO_DOT8(1, 4, 7);
    if constexpr (Blocks == 2) {
      _tile_loadd(5, rows + a_step, 64);
      OCTAVO_DOT8(2, 5, 6);
      OCTAVO_DOT8(3, 5, 7);
    }
  }
#undef OCTAVO_DOT8
}

// Both halves of W sums as they lie in tiles' results, `apart` lanes apart.
OCTAVO_INLINE vf whole_sum(const float* upper, int64_t apart) {
  return fma(to_float(load_lanes(upper)), set(float(kByte)), to_float(load_lanes(upper + apart)));
}

struct RowWeights { float most, sum, scale; };  // the largest score times log2(e), the weights' sum, the scale of their bytes

// Scores of row `m` to weights times V's scales, two bytes each, for keys [low, high) counted from the segment's part;
// zeros around them up to `end`.
inline RowWeights weigh_row8(const SegmentTask& task, SegmentRoom& room, int64_t m, float q_scale, bool few, int64_t low,
                             int64_t high, int64_t end) {
  float* s = room.scores.data() + m * SegmentRoom::kScores;
  uint8_t* upper = room.weights.data() + m * 64;
  uint8_t* lower = upper + (few ? 8 * 64 : kSegment / 64 * 1024);
  const int64_t first = low / 64 * 64, last = low < high ? (high + 15) / 16 * 16 : first;
  for (int64_t i = 0; i < end; i += W)
    if (i < first || i >= last)
      for (uint8_t* out : {upper, lower}) std::memset(out + i / 64 * 1024 + i % 64, 0, W);
  if (low >= high) return {kNone, 0.0f, 0.0f};
  const vf scale = set(q_scale * task.scale * 1.44269504f), none = set(kNone);
  vf most = none;
  for (int64_t i = first; i < last; i += W) {
    vf x = whole_sum(s + i, halves_apart(few) * SegmentRoom::kScores) * scale * load(room.k_scales + i);
    if (task.soft_cap > 0) x = capped(x, task.soft_cap);
    if (i < low || i + W > high) {
      const vi index = lane_numbers() + int32_t(i);
      x = index < int32_t(low) || index >= int32_t(high) ? none : x;
    }
    most = max(most, x);
    store(s + i, x);
  }
  const float largest_score = largest(most);
  const vf top = set(largest_score);
  vf total{}, heaviest{};
  for (int64_t i = first; i < last; i += W) {
    const vf x = load(s + i), weight = x > none ? exp2(x - top) : vf{};
    total = total + weight;
    const vf scaled = x > none ? weight * load(room.v_scales + i) : vf{};  // a stale scale may be anything
    heaviest = max(heaviest, scaled);
    store(s + i, scaled);
  }
  constexpr float kMost = 255 * kByte + 255;
  const float largest_weight = largest(heaviest);
  const __m512 inverse = (__m512)set(largest_weight > 0 ? kMost / largest_weight : 0.0f);
  for (int64_t i = first; i < last; i += W) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)load(s + i) * inverse);
    const int64_t at = i / 64 * 1024 + i % 64;
    _mm_storeu_si128((__m128i*)(upper + at), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    _mm_storeu_si128((__m128i*)(lower + at), _mm512_cvtepi32_epi8(whole));
  }
  return {largest_score, sum(total), largest_weight / kMost};
}

// Up to 16 rows (8 if they are `Few`): `weigh` makes weights of their scores and gives the scale of a row's.
template <bool Few>
inline void tiled_rows8(const SegmentTask& task, SegmentRoom& room, const int8_t* q, int64_t count, int64_t units, float* out,
                        auto&& weigh) {
  constexpr int Blocks = Few ? 1 : 2;
  const int64_t H = task.cache.width, tiles = tiles8(H);
  const bool direct = H % 64 == 0;
  auto keys = [&](int64_t u) -> const void* {
    const int64_t key = task.from + 16 * u;
    if (direct) return task.block(task.k_cache, key) + key % task.cache.block_size;
    return room.keys.data() + u * tiles * 1024;
  };
  for (int64_t u = 0; u < units; u += 2) {
    float* to = room.scores.data() + 16 * u;
    zero_tiles<Blocks>();
    add_tiles8<false, Blocks>(q, tiles * 1024, keys(u), keys(std::min(u + 1, units - 1)), tiles,
                              direct ? task.cache.block_size * 4 : 64);
    store_tiles<Blocks>(to, to + 16 * SegmentRoom::kScores, SegmentRoom::kScores, true);
  }
  float scales[16], sums[32 * 32];
  for (int64_t m = 0; m < count; m++) scales[m] = weigh(m);
  for (int64_t h = 0; h < H; h += 32) {
    const bool wide = h + 16 < H;
    const uint8_t* values = room.values.data() + h * kSegment;
    zero_tiles<Blocks>();
    add_tiles8<true, Blocks>(room.weights.data(), kSegment / 64 * 1024, values, wide ? values + 16 * kSegment : values,
                             (units + 3) / 4);
    store_tiles<Blocks>(sums, sums + 16 * 32, 32, wide);
    for (int64_t m = 0; m < count; m++)
      for (int64_t i = 0; i < (wide ? 32 : 16); i += W)
        store(out + m * H + h + i, whole_sum(sums + m * 32 + i, halves_apart(Few) * 32) * set(scales[m]));
  }
}

// As tiled_segment, with the scales of the queries' rows.
inline void tiled_segment8(const SegmentTask& task, int64_t rows, int64_t G, int64_t position, const int8_t* q,
                           const float* q_scale, SegmentRoom& room, float* out, float* most, float* sum) {
  const int64_t H = task.cache.width;
  const bool few = rows <= 8;
  gather8(task, room, H % 64 != 0);
  by_rows(task, rows, 16, G, position, most, sum, [&](int64_t first, int64_t count, int64_t units) {
    auto weigh = [&](int64_t m) {
      const auto [low, high] = task.seen_at(position + (first + m) / G);
      const RowWeights found = weigh_row8(task, room, m, q_scale[first + m], few, low, high, (units + 3) / 4 * 64);
      most[first + m] = found.most;
      sum[first + m] = found.sum;
      return found.scale;
    };
    const int8_t* x = q + first / 16 * 2 * tiles8(H) * 1024;
    float* to = out + first * H;
    few ? tiled_rows8<true>(task, room, x, count, units, to, weigh) : tiled_rows8<false>(task, room, x, count, units, to, weigh);
  });
}

#else
inline float put_query8(const float*, int64_t, int64_t, int64_t, int8_t*) { return 0; }
inline void tiled_segment8(const SegmentTask&, int64_t, int64_t, int64_t, const int8_t*, const float*, SegmentRoom&, float*,
                           float*, float*) {}
#endif

}  // namespace octavo
