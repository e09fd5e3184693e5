// Activations in the precision that a weight takes them.
//
// bf16 weights take bf16 activations (or fp32 ones, see DotBF16). int8 weights take int8 activations with a scale a token,
// and a second byte of those that stand out (quantize_token). Grouped weights take integers with a scale a token and
// group: int8 where weights were rounded to 4 bits here, and 16 bits, as two int8 halves, for a file's own precision, so
// that nothing but that precision is lost.
#pragma once

#include "amx.h"
#include "lines.h"

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

  // Row `m` of tile `t`, 64 bytes, where rows lie in `tiles` tiles each (amx.h).
  uint8_t* tile_row(int64_t tiles, int64_t m, int64_t t) {
    return (uint8_t*)lanes.data() + (m / 16 * tiles + t) * 1024 + m % 16 * 64;
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

}  // namespace octavo
