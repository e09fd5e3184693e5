// Attention of a segment of keys by Intel's tiles (amx.h), for a bf16 cache; attention_tiles8.h is for an
// int8 cache, attention.h has the rest of it.
//
// Scores, weights and results of up to 32 rows, which are (query, head of the group), are products of tiles:
//
//     scores  [rows][16 keys a unit]  = queries [rows][lanes of H]      x  K of a unit [lanes of H][16 keys], as cached
//     out     [rows][16 of H]         = weights [rows][lanes of tokens] x  V           [lanes of tokens][16 of H]
//
// K lies in the cache as such a panel. Of V a block has only as many lanes as half its tokens, so V is gathered into
// panels over the whole segment, once for all rows. The largest score of a row is known before its weights are made,
// so nothing is scaled again within a segment.
#pragma once

#include "cache.h"
#include "linear.h"

namespace octavo {

constexpr int64_t kSegment = 512;
constexpr float kNone = -__builtin_inff();

OCTAVO_INLINE float exp2_of(float x) { return exp2(set(x))[0]; }

// soft_cap * tanh(score / soft_cap), on scores times log2(e).
OCTAVO_INLINE vf capped(vf x, float soft_cap) {
  const vf one = set(1.0f), cap = set(soft_cap * 1.44269504f);
  const vf e = exp2(x * set(2.0f / soft_cap));
  return cap * ((e - one) / (e + one));
}

// One thread's room for a segment.
struct SegmentRoom {
  static constexpr int64_t kScores = kSegment + 16;  // from row to row
  Lines<float> scores;
  Lines<uint8_t> weights, keys, values;
  float k_scales[kSegment], v_scales[kSegment];  // of an int8 cache
  void reserve(int64_t width) {
    const int64_t padded_width = padded(width);
    scores.resize(size_t(32 * kScores));
    weights.resize(size_t(32 * kSegment * 2));
    keys.resize(size_t(kSegment * padded_width * 2));
    values.resize(size_t(kSegment * padded_width * 2));
  }
};

// The keys from position `from` to `to` of one sequence and kv head, within a segment.
struct SegmentTask {
  const CacheShape& cache;
  const void *k_cache, *v_cache;
  const int32_t* table;
  int64_t head, from, to;
  float scale, soft_cap;
  int64_t window;

  int64_t units() const { return (to - from) / 16 + 1; }
  // Which keys a query at a position sees, counted from `from`: [first, last).
  std::pair<int64_t, int64_t> seen_at(int64_t position) const {
    const int64_t low = window > 0 ? std::max<int64_t>(0, position - window + 1 - from) : 0;
    return {low, std::min(position, to) - from + 1};
  }
  const int32_t* block(const void* of, int64_t key) const { return cache.head(of, table[key / cache.block_size], head); }
};

#if defined(__AMX_TILE__)

// Row `m` of a matrix of bf16 tiles, of `width` floats; zeros behind them.
inline void put_tile_row(const float* x, int64_t width, int64_t m, uint8_t* tiles) {
  uint8_t* row = tiles + m / 16 * (padded(width) / 32 * 1024) + m % 16 * 64;
  for (int64_t k = 0; k < width; k += 32)
    store_bf16((uint16_t*)(row + k / 32 * 1024), load(x + k), k + W < width ? load(x + k + W) : vf{});
}

// V of all units as panels of 16 elements: [element / 16][lane of tokens][16].
inline void gather_values(const SegmentTask& task, SegmentRoom& room) {
  const int64_t H = task.cache.width, units = task.units();
  for (int64_t u = 0; u < units; u++) {
    const int64_t key = task.from + 16 * u;
    const int32_t* from = task.block(task.v_cache, key) + key % task.cache.block_size / 2 * H;
    for (int64_t h = 0; h < H; h += 16) {
      uint8_t* to = room.values.data() + h * kSegment * 2 + u * 512;
      for (int lane = 0; lane < 8; lane++) store_lanes(to + lane * 64, load_lanes(from + lane * H + h));
      if (u == units - 1 && units % 2) std::memset(to + 512, 0, 512);
    }
  }
}

// K of all units as panels of 16 keys: [unit][lane of H, padded][16]; only where the cache's own cannot be used.
inline void gather_keys(const SegmentTask& task, SegmentRoom& room) {
  const int64_t lanes = task.cache.width / 2, whole = padded(task.cache.width) / 2;
  for (int64_t u = 0; u < task.units(); u++) {
    const int64_t key = task.from + 16 * u;
    const int32_t* from = task.block(task.k_cache, key) + key % task.cache.block_size;
    uint8_t* to = room.keys.data() + u * whole * 64;
    for (int64_t lane = 0; lane < lanes; lane++) store_lanes(to + lane * 64, load_lanes(from + lane * task.cache.block_size));
    std::memset(to + lanes * 64, 0, size_t(whole - lanes) * 64);
  }
}

// Scores of row `m` to weights in tiles, for keys [low, high) counted from the segment's part; zeros around them up to
// `end`. Gives the largest score, times log2(e), and the sum of the weights.
inline std::pair<float, float> weigh_row(const SegmentTask& task, SegmentRoom& room, int64_t m, int64_t low, int64_t high,
                                         int64_t end) {
  float* s = room.scores.data() + m * SegmentRoom::kScores;
  uint8_t* out = room.weights.data() + m / 16 * (kSegment / 32 * 1024) + m % 16 * 64;
  const int64_t first = low / 32 * 32, last = low < high ? (high + 31) / 32 * 32 : first;
  for (int64_t i = 0; i < end; i += 32)
    if (i < first || i >= last) std::memset(out + i * 32, 0, 64);
  if (low >= high) return {kNone, 0.0f};
  const vf scale = set(task.scale * 1.44269504f), none = set(kNone);
  vf most = none;
  for (int64_t i = first; i < last; i += W) {
    vf x = load(s + i) * scale;
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
  vf total{};
  for (int64_t i = first; i < last; i += 2 * W) {
    const vf x = load(s + i), y = load(s + i + W);
    const vf a = x > none ? exp2(x - top) : vf{}, b = y > none ? exp2(y - top) : vf{};
    total = total + a;
    total = total + b;
    store_bf16((uint16_t*)(out + i * 32), a, b);
  }
  return {largest_score, sum(total)};
}

template <int Blocks>
inline void tiled_rows(const SegmentTask& task, SegmentRoom& room, const uint8_t* q, bool direct, int64_t units, float* out,
                       auto&& weigh) {
  const int64_t H = task.cache.width, tiles = padded(H) / 32;
  const int64_t lane = direct ? task.cache.block_size * 4 : 64;
  auto keys = [&](int64_t u) -> const void* {
    const int64_t key = task.from + 16 * u;
    if (direct) return task.block(task.k_cache, key) + key % task.cache.block_size;
    return room.keys.data() + u * tiles * 1024;
  };
  for (int64_t u = 0; u < units; u += 2) {
    float* to = room.scores.data() + 16 * u;
    zero_tiles<Blocks>();
    add_tiles<DotBF16, Blocks>(q, tiles * 1024, keys(u), keys(std::min(u + 1, units - 1)), tiles, lane);
    store_tiles<Blocks>(to, to + 16 * SegmentRoom::kScores, SegmentRoom::kScores, true);
  }
  weigh();
  const uint8_t* values = room.values.data();
  for (int64_t h = 0; h < H; h += 32) {
    const bool wide = h + 16 < H;
    zero_tiles<Blocks>();
    add_tiles<DotBF16, Blocks>(room.weights.data(), kSegment / 32 * 1024, values + h * kSegment * 2,
                               values + (wide ? h + 16 : h) * kSegment * 2, (units + 1) / 2);
    store_tiles<Blocks>(out + h, out + 16 * H + h, H, wide);
  }
}

// Calls work(first row, count, units of keys that the last of them sees) for up to `step` rows at a time, which are
// (query, head of G), the first query at `position`; rows that see no keys get no sum.
inline void by_rows(const SegmentTask& task, int64_t rows, int64_t step, int64_t G, int64_t position, float* most, float* sum,
                    auto&& work) {
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    // Later queries see more; keys behind the last one of these rows are not computed.
    const int64_t place = position + (first + count - 1) / G;
    if (place < task.from) {
      std::fill(most + first, most + first + count, kNone);
      std::fill(sum + first, sum + first + count, 0.0f);
      continue;
    }
    work(first, count, std::min(task.units(), (place - task.from) / 16 + 1));
  }
}

// The keys of `task` for `rows` rows, (query, head of G), the first query at `position`: out [rows][H], up to the next
// multiple of 16 rows written, with each row's largest score and sum.
inline void tiled_segment(const SegmentTask& task, int64_t rows, int64_t G, int64_t position, const uint8_t* q,
                          SegmentRoom& room, float* out, float* most, float* sum) {
  const int64_t H = task.cache.width, q_step = padded(H) / 32 * 1024;
  const bool direct = H % 32 == 0;
  if (!direct) gather_keys(task, room);
  gather_values(task, room);
  by_rows(task, rows, 32, G, position, most, sum, [&](int64_t first, int64_t count, int64_t units) {
    auto weigh = [&] {
      for (int64_t m = 0; m < count; m++) {
        const auto [low, high] = task.seen_at(position + (first + m) / G);
        std::tie(most[first + m], sum[first + m]) = weigh_row(task, room, m, low, high, (units + 1) / 2 * 32);
      }
    };
    const uint8_t* x = q + first / 16 * q_step;
    float* to = out + first * H;
    count > 16 ? tiled_rows<2>(task, room, x, direct, units, to, weigh) : tiled_rows<1>(task, room, x, direct, units, to, weigh);
  });
}

#else
inline void put_tile_row(const float*, int64_t, int64_t, uint8_t*) {}
inline void tiled_segment(const SegmentTask&, int64_t, int64_t, int64_t, const uint8_t*, SegmentRoom&, float*, float*, float*) {}
#endif

}  // namespace octavo
