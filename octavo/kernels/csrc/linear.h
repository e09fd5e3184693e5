// y = x W^T + b for packed weights: activations are brought to the weights' precision, then multiplied in tiles.
//
// bf16 weights take bf16 activations (or fp32 ones, see DotBF16). int8 weights take int8 activations with a scale a token,
// and a second byte of those that stand out (quantize_token). Grouped weights take integers with a scale a token and group: int8 where weights were rounded to 4 bits here,
// and 16 bits, as two int8 halves, for a file's own precision, so that nothing but that precision is lost.
#pragma once

#include "amx.h"
#include "lines.h"
#include "team.h"

namespace octavo {

// Room for one matrix of activations in a kernel's precision.
struct Activations {
  Lines<int32_t> lanes;
  std::vector<float> scale;
  std::vector<int32_t> sums;
  std::vector<uint8_t> uppers;  // of int8: whether there are any, for a row, or with tiles for a block of rows and tile

  void reserve(int64_t rows, int64_t inputs) {
    if (kTiles) rows = (rows + 15) / 16 * 16, inputs += 32;
    if (int64_t(lanes.size()) >= rows * inputs) return;
    lanes.resize(size_t(rows * inputs));
    scale.resize(size_t(rows * (inputs / 16 + 1)));
    sums.resize(scale.size());
    uppers.resize(scale.size());
  }
};

// fp32 numbers [rows][width], the rows `stride` apart.
struct Matrix {
  float* data;
  int64_t stride;
  float* row(int64_t i) const { return data + i * stride; }
};

inline int64_t padded(int64_t width) { return (width + 31) / 32 * 32; }

// Whether a weight is multiplied by tiles (amx.h), which have a layout of activations of their own.
inline bool by_tiles(const Weight& w) { return kTiles && (w.format == kPlainBF16 || w.format == kInt8); }

// Tiles along the inputs.
inline int64_t tiles_of(const Weight& w) { return (w.inputs * (w.format == kInt8 ? 1 : 2) + 63) / 64; }

// Lanes of a row of activations.
inline int64_t lanes_of(const Weight& w) {
  switch (w.format) {
    case kPlainF32: return w.inputs;
    case kPlainBF16: return w.inputs / 2 * DotBF16::a_lanes;
    case kInt8: return w.inputs / 2;  // two bytes each
    case kGrouped: return w.inputs / 4 * w.halves;
  }
  __builtin_unreachable();
}

OCTAVO_INLINE void store_int8(int8_t* out, vi v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8((__m512i)v));
#else
  for (int i = 0; i < W; i++) out[i] = int8_t(v[i]);
#endif
}

// Rounds `count` floats to integers with one scale: int8 to `out`, or with `lower` two halves, the upper ones to `out`.
// Returns (scale, sum of the integers). `count` is a multiple of 16.
inline std::pair<float, int32_t> quantize(const float* x, int64_t count, int8_t* out, int8_t* lower = nullptr) {
  vf most{};
  for (int64_t k = 0; k < count; k += W) most = max(most, max(load(x + k), -load(x + k)));
  const float scale = largest(most) / (lower ? 127.0f * kHalf + 126.0f : 127.0f);
  const vf inverse = set(scale > 0 ? 1.0f / scale : 0.0f), magic = set(12582912.0f);
  vi total{};
  for (int64_t k = 0; k < count; k += W) {
    const vf rounded = load(x + k) * inverse + magic;
    const vi q = as_lanes(rounded) - as_lanes(magic);
    total += q;
    if (!lower) {
      store_int8(out + k, q);
      continue;
    }
    const vi upper = as_lanes((rounded - magic) * set(1.0f / kHalf) + magic) - as_lanes(magic);
    store_int8(out + k, upper);
    store_int8(lower + k, q - upper * kHalf);
  }
  int32_t sum = 0;
  for (int i = 0; i < W; i++) sum += total[i];
  return {scale, sum};
}

// Rounds a token's `count` floats to integers with one scale, kHalf * upper + lower. The scale is for the many: numbers up
// to eight times the mean magnitude fit the lower byte, and whatever stands out has an upper one (decision 0100). From 64
// numbers to the next are `step` bytes; `found` is told for each 64 whether there are upper bytes, or with no `step` for
// all. Returns (scale, sum of the integers).
inline std::pair<float, int32_t> quantize_token(const float* x, int64_t count, int8_t* lower, int8_t* upper, int64_t step,
                                                uint8_t* found) {
  vf most{}, magnitude{};
  for (int64_t k = 0; k < count; k += W) {
    const vf size = max(load(x + k), -load(x + k));
    most = max(most, size);
    magnitude = magnitude + size;
  }
  const float top = largest(most), common = 8.0f * sum(magnitude) / float(count);
  const float scale = std::max(std::min(top, common) / 127.0f, top / (127.0f * kHalf + 126.0f));
  const vf inverse = set(scale > 0 ? 1.0f / scale : 0.0f), magic = set(12582912.0f);
  const vf share = set(0.999999f / kHalf);  // so that 127 is all lower byte
  vi total{}, any{};
  for (int64_t k = 0; k < count; k += W) {
    const vf rounded = load(x + k) * inverse + magic;
    const vi q = as_lanes(rounded) - as_lanes(magic);
    const vi high = as_lanes((rounded - magic) * share + magic) - as_lanes(magic);
    const int64_t at = step ? k / 64 * step + k % 64 : k;
    total += q;
    any |= high;
    store_int8(upper + at, high);
    store_int8(lower + at, q - high * kHalf);
    if (k + W == count || (step && (k + W) % 64 == 0)) {
      found[step ? k / 64 : 0] |= largest(to_float(any & set_lanes(0xff))) > 0;
      any = vi{};
    }
  }
  int32_t sum = 0;
  for (int i = 0; i < W; i++) sum += total[i];
  return {scale, sum};
}

// Row `m` of activations, from `width` floats, zeros behind them up to the weight's inputs.
inline void prepare_row(const Weight& w, const float* x, int64_t width, int64_t m, Activations& out) {
  const bool tiles = by_tiles(w);
  const int64_t lanes = tiles ? tiles_of(w) * (w.format == kInt8 ? 32 : 16) : lanes_of(w), step = tiles ? 1024 : 64;
  int32_t* row = out.lanes.data() + (tiles ? m / 16 * 16 * lanes + m % 16 * 16 : m * lanes);
  float tail[32] = {};
  const int64_t whole = width / 32 * 32;
  std::memcpy(tail, x + whole, size_t(width - whole) * 4);
  auto part = [&](int64_t k) { return k < whole ? x + k : tail; };  // 32 floats from input k on
  if (lanes == w.inputs && !tiles) {
    std::memcpy(row, x, size_t(whole) * 4);
    if (whole < w.inputs) std::memcpy(row + whole, tail, 128);
    return;
  }
  switch (w.format) {
    case kPlainF32: return;  // done above
    case kPlainBF16:
      for (int64_t k = 0; k < w.inputs; k += 32)
        for (int i = 0; i < 32; i += 2 * W)
          store_bf16((uint16_t*)((uint8_t*)row + k / 32 * step) + i, load(part(k) + i), load(part(k) + i + W));
      return;
    case kInt8: {
      std::vector<float> filled;
      if (whole < w.inputs) {
        filled.assign(size_t(w.inputs), 0.0f);
        std::memcpy(filled.data(), x, size_t(width) * 4);
        x = filled.data();
      }
      const int64_t count = tiles_of(w);
      int8_t *lower = (int8_t*)row, *upper = lower + (tiles ? count * 1024 : w.inputs);
      uint8_t* found = out.uppers.data() + (tiles ? m / 16 * count : m);
      if (!tiles || m % 16 == 0) std::memset(found, 0, size_t(tiles ? count : 1));
      if (tiles && w.inputs % 64)
        for (int8_t* half : {lower, upper}) std::memset(half + (count - 1) * step + 32, 0, 32);
      std::tie(out.scale[m], out.sums[m]) = quantize_token(x, w.inputs, lower, upper, tiles ? step : 0, found);
      return;
    }
    case kGrouped: {
      const int64_t groups = w.inputs / w.group;
      for (int64_t g = 0; g < groups; g++) {
        const int64_t k = g * w.group;
        const float* from = part(k / 32 * 32) + k % 32;
        int8_t* lower = w.halves == 2 ? (int8_t*)(row + w.inputs / 4) + k : nullptr;
        std::tie(out.scale[m * groups + g], out.sums[m * groups + g]) =
            quantize(from, w.group, (int8_t*)row + k, lower);
      }
    }
  }
}

// Writes a tile's vector, adding the bias; only the outputs that exist.
OCTAVO_INLINE void store_outputs(float* out, vf value, const float* bias, int64_t left) {
  if (left >= W) {
    store(out, bias ? value + load(bias) : value);
    return;
  }
  for (int i = 0; i < left; i++) out[i] = bias ? value[i] + bias[i] : value[i];
}

// Columns that one piece of work covers, and rows: A's part should stay in the second-level cache.
constexpr int kColumns = kTileVectors * W;
inline int64_t rows_at_once(const Weight& w) {
  return by_tiles(w) ? std::max<int64_t>(32, (1 << 20) / (tiles_of(w) * 64) / 32 * 32) : 192;
}

#if defined(__AMX_TILE__)
// Sums of `Blocks` blocks of 16 rows and two panels, in tiles 0 to 3: of int8 the upper bytes first, where there are any.
template <class Dot, int Blocks>
OCTAVO_INLINE void multiply_blocks(const uint8_t* x, int64_t a_step, const uint8_t* b0, const uint8_t* b1, int64_t count,
                                   const uint8_t* uppers, int32_t (&sums)[4][16][16]) {
  zero_tiles<Blocks>();
  if constexpr (Dot::per_lane == 4) {
    bool any = false;
    for (int64_t t = 0; t < count; t++) {
      if (!(uppers[t] | (Blocks == 2 ? uppers[count + t] : 0))) continue;
      any = true;
      add_tile<Dot, Blocks>(x + (count + t) * 1024, a_step, b0 + t * 1024, b1 + t * 1024, 64);
    }
    if (any) {
      store_tiles<Blocks>((float*)sums[0], (float*)sums[2], 32, true);
      vi* all = (vi*)sums;
      for (int i = 0; i < 32 * Blocks; i++) all[i] *= kHalf;
      written(sums);
      _tile_loadd(0, sums[0], 128);
      _tile_loadd(1, (const uint8_t*)sums[0] + 64, 128);
      if constexpr (Blocks == 2) {
        _tile_loadd(2, sums[2], 128);
        _tile_loadd(3, (const uint8_t*)sums[2] + 64, 128);
      }
    }
  }
  add_tiles<Dot, Blocks>(x, a_step, b0, b1, count);
}

// As plain_columns, by tiles: 32 outputs, 32 rows at a time.
template <class Dot>
inline void tiled_columns(const Weight& w, const Activations& a, int64_t first, int64_t rows, int64_t n,
                          const float* bias, Matrix out) {
  const int64_t count = tiles_of(w), a_step = count * (Dot::per_lane == 4 ? 2048 : 1024);
  const uint8_t* const b0 = w.panel(n / 16);
  const uint8_t* const b1 = w.panel(std::min(n / 16 + 1, w.panels() - 1));
  alignas(64) int32_t sums[4][16][16];  // as [block of rows][16][32]
  for (int64_t start = 0; start < rows; start += 32) {
    const int64_t here = std::min<int64_t>(32, rows - start), block = (first + start) / 16;
    const uint8_t* x = (const uint8_t*)a.lanes.data() + block * a_step;
    const uint8_t* uppers = a.uppers.data() + block * count;
    here > 16 ? multiply_blocks<Dot, 2>(x, a_step, b0, b1, count, uppers, sums)
              : multiply_blocks<Dot, 1>(x, a_step, b0, b1, count, uppers, sums);
    if (Dot::per_lane == 2 && !bias && here == 32 && n + 32 <= w.outputs) {
      store_tiles<2>(out.row(first + start) + n, out.row(first + start + 16) + n, out.stride, true);
      continue;
    }
    here > 16 ? store_tiles<2>((float*)sums[0], (float*)sums[2], 32, true) : store_tiles<1>((float*)sums[0], nullptr, 32, true);
    for (int64_t m = 0; m < here; m++) {
      const int64_t row = first + start + m;
      for (int v = 0; v < 2; v++) {
        const int64_t column = n + v * 16;
        if (column >= w.outputs) break;
        const vi sum = load_lanes((const int32_t*)sums + m * 32 + v * 16);
        vf value = as_float(sum);
        if constexpr (Dot::per_lane == 4)
          value = to_float(sum - set_lanes(kBias8 * a.sums[row])) * (load(w.scale + column) * set(a.scale[row]));
        store_outputs(out.row(row) + column, value, bias ? bias + column : nullptr, w.outputs - column);
      }
    }
  }
}
#endif

template <class Dot>
inline void plain_columns(const Weight& w, const Activations& a, int64_t first, int64_t rows, int64_t n,
                          const float* bias, Matrix out) {
  const int64_t stride = lanes_of(w);
  const int32_t* b[kTileVectors];
  for (int v = 0; v < kTileVectors; v++) {
    const int64_t column = n + v * W;
    b[v] = (const int32_t*)w.panel(std::min(column / 16, w.panels() - 1)) + column % 16;
  }
  in_tiles<kTileRows>(rows, [&](int64_t start, auto height) {
    constexpr int Rows = decltype(height)::value;
    typename Dot::Sum sum[Rows][kTileVectors] = {};
    const int32_t* lanes = a.lanes.data() + (first + start) * stride;
    if constexpr (Dot::per_lane == 4) {
      bool any = false;
      for (int m = 0; m < Rows; m++) any |= a.uppers[size_t(first + start + m)] != 0;
      if (any) {
        multiply<Dot>(sum, lanes + w.inputs / 4, stride, b, 16, w.inputs / 4);
        for (auto& row : sum)
          for (vi& v : row) v *= kHalf;
      }
    }
    multiply<Dot>(sum, lanes, stride, b, 16, w.inputs / Dot::per_lane);
    for (int m = 0; m < Rows; m++) {
      const int64_t row = first + start + m;
      for (int v = 0; v < kTileVectors; v++) {
        const int64_t column = n + v * W;
        if (column >= w.outputs) break;
        vf value;
        if constexpr (Dot::per_lane == 4) {
          const vi exact = sum[m][v] - set_lanes(kBias8 * a.sums[row]);
          value = to_float(exact) * (load(w.scale + column) * set(a.scale[row]));
        } else {
          value = sum[m][v];
        }
        store_outputs(out.row(row) + column, value, bias ? bias + column : nullptr, w.outputs - column);
      }
    }
  });
}

template <int Bits, int Lanes, bool Minima, bool Wide, int Halves = 2>
inline void grouped_columns(const Weight& w, const Activations& a, int64_t first, int64_t rows, int64_t n,
                            const float* bias, Matrix out) {
  constexpr int Vectors = kGroupVectors, kRows = Halves == 2 ? kGroupRows * 2 / 3 : kGroupRows;
  const int64_t lanes = lanes_of(w), groups = w.inputs / w.group;
  const uint8_t* panel[Vectors];
  int column[Vectors];
  for (int v = 0; v < Vectors; v++) {
    panel[v] = w.panel(std::min((n + v * W) / 16, w.panels() - 1));
    column[v] = int((n + v * W) % 16);
  }
  in_tiles<kRows>(rows, [&](int64_t start, auto height) {
    constexpr int Rows = decltype(height)::value;
    const int64_t row = first + start;
    const GroupedRows part = {a.lanes.data() + row * lanes, lanes, w.inputs / 4, a.scale.data() + row * groups,
                              a.sums.data() + row * groups, groups};
    vf sum[Rows][Vectors];
    multiply_groups<Bits, Lanes, Minima, Wide, Halves>(sum, part, w, panel, column);
    for (int m = 0; m < Rows; m++)
      for (int v = 0; v < Vectors; v++) {
        const int64_t at = n + v * W;
        if (at >= w.outputs) break;
        store_outputs(out.row(row + m) + at, sum[m][v], bias ? bias + at : nullptr, w.outputs - at);
      }
  });
}

typedef void (*Columns)(const Weight&, const Activations&, int64_t, int64_t, int64_t, const float*, Matrix);

inline Columns columns_of(const Weight& w) {
  switch (w.format) {
    case kPlainF32: return plain_columns<DotF32>;
#if defined(__AMX_TILE__)
    case kPlainBF16: return tiled_columns<DotBF16>;
    case kInt8: return tiled_columns<DotInt8>;
#else
    case kPlainBF16: return plain_columns<DotBF16>;
    case kInt8: return plain_columns<DotInt8>;
#endif
    case kGrouped: break;
  }
  const int lanes = w.group / 4;
  if (w.halves == 1) return grouped_columns<4, 8, false, false, 1>;
  if (w.bits == 4 && lanes == 8 && !w.minima) return grouped_columns<4, 8, false, false>;
  if (w.bits == 4 && lanes == 8 && !w.wide) return grouped_columns<4, 8, true, false>;
  if (w.bits == 4 && lanes == 8) return grouped_columns<4, 8, true, true>;
  if (w.bits == 4 && w.minima) return grouped_columns<4, 4, true, true>;
  if (w.bits == 4) return grouped_columns<4, 4, false, true>;
  if (lanes == 4) return grouped_columns<8, 4, false, true>;
  if (!w.minima) return grouped_columns<8, 8, false, false>;
  return w.wide ? grouped_columns<8, 8, true, true> : grouped_columns<8, 8, true, false>;
}

// Every thread calls it; the result can be read after the next barrier. `shared` is one for all threads, `own` is the
// thread's: a handful of rows is prepared by every thread for itself, which is cheaper than waiting for one another.
inline void linear(Team& team, const Weight& w, Matrix x, int64_t rows, int64_t width, const float* bias, Matrix out,
                   Activations& shared, Activations& own) {
  const bool alone = rows <= 2 || team.size() == 1, tiles = by_tiles(w);
  Activations& a = alone ? own : shared;
  const auto [begin, end] = alone ? std::pair<int64_t, int64_t>{0, rows} : tiles ? team.share_blocks(rows) : team.share(rows);
  for (int64_t m = begin; m < end; m++) prepare_row(w, x.row(m), width, m, a);
  if (!alone) team.barrier();
  const Columns work = columns_of(w);
  const int64_t most = rows_at_once(w);
  const int64_t across = (w.outputs + kColumns - 1) / kColumns, down = (rows + most - 1) / most;
  for (int64_t i = team.next(); i < across * down; i = team.next()) {
    const int64_t first = i / across * most;
    work(w, a, first, std::min(most, rows - first), i % across * kColumns, bias, out);
  }
}

}  // namespace octavo
