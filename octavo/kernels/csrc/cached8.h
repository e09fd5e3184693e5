// Products with the int8 numbers of a cache where there are no tiles. Their scales go into scores and weights.
//
// Where the processor multiplies bytes four at a time, queries and weights have two of them, rows of A of their own, upper
// and lower by turns: an integer is kHalf * upper + lower. Elsewhere the cache's numbers are widened to fp32.
#pragma once

#include "linear.h"

namespace octavo {

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
struct DotCached8 {
  typedef vi Sum;
  typedef vi Columns;
  static constexpr int per_lane = 4, a_lanes = 1;
  OCTAVO_INLINE vi columns(vi b) { return b ^ set_lanes(int32_t(0x80808080)); }
  OCTAVO_INLINE vi dot(vi c, const int32_t* a, vi b) { return dot_u8s8(c, b, set_lanes(*a)); }
};
#else
struct DotCached8 {
  typedef vf Sum;
  struct Columns { vf numbers[4]; };
  static constexpr int per_lane = 4, a_lanes = 4;
  OCTAVO_INLINE Columns columns(vi b) {
    return {to_float(b << 24 >> 24), to_float(b << 16 >> 24), to_float(b << 8 >> 24), to_float(b >> 24)};
  }
  OCTAVO_INLINE vf dot(vf c, const int32_t* a, const Columns& b) {
    for (int i = 0; i < 4; i++) c = fma(as_float(set_lanes(a[i])), b.numbers[i], c);
    return c;
  }
};
#endif

// A row of A in two bytes: its scale, and what dot_u8s8 has added to the sums of the upper and of the lower ones.
struct TwoBytes {
  float scale;
  int32_t more[2];

  TwoBytes() = default;
  // `count` floats to as many upper bytes, and lower ones behind these; `count` is a multiple of 16.
  TwoBytes(const float* x, int64_t count, int8_t* out) {
    int32_t whole, upper = 0;
    std::tie(scale, whole) = quantize(x, count, out, out + count);
    for (int64_t i = 0; i < count; i++) upper += out[i];
    more[0] = kBias8 * upper;
    more[1] = kBias8 * (whole - kHalf * upper);
  }

  // Of sums below 2^24, that is of up to 1024 products; without the scale.
  inline __attribute__((always_inline)) vf whole(vi upper, vi lower) const {
    return fma(to_float(upper - more[0]), set(float(kHalf)), to_float(lower - more[1]));
  }
};

}  // namespace octavo
