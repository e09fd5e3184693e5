// The inner products that everything else is made of: a tile of rows of A times vectors of B, in registers.
//
// An output element is one accumulator that takes its products in the order of the inputs, whatever the tile's shape:
// so a row's result is the same alone and in company.
#pragma once

#include <type_traits>

#include "packed.h"

namespace octavo {

// A kind of product: `per_lane` numbers of B in a lane, and the `a_lanes` lanes of A that they meet.
struct DotF32 {
  typedef vf Sum;
  typedef vi Columns;
  static constexpr int per_lane = 1, a_lanes = 1;
  OCTAVO_INLINE vi columns(vi b) { return b; }
  OCTAVO_INLINE vf dot(vf c, const int32_t* a, vi b) { return fma(as_float(set_lanes(*a)), as_float(b), c); }
};

// Where the processor multiplies bf16 pairs, A is rounded to bf16; elsewhere A stays fp32, and B is widened.
struct DotBF16 {
  typedef vf Sum;
  static constexpr int per_lane = 2;
#if defined(__AVX512BF16__)
  typedef vi Columns;
  static constexpr int a_lanes = 1;
  OCTAVO_INLINE vi columns(vi b) { return b; }
  OCTAVO_INLINE vf dot(vf c, const int32_t* a, vi b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)set_lanes(*a), (__m512bh)b);
  }
#else
  struct Columns { vf low, high; };
  static constexpr int a_lanes = 2;
  OCTAVO_INLINE Columns columns(vi b) { return {low_bf16(b), high_bf16(b)}; }
  OCTAVO_INLINE vf dot(vf c, const int32_t* a, const Columns& b) {
    c = fma(as_float(set_lanes(a[0])), b.low, c);
    return fma(as_float(set_lanes(a[1])), b.high, c);
  }
#endif
};

struct DotInt8 {
  typedef vi Sum;
  typedef vi Columns;
  static constexpr int per_lane = 4, a_lanes = 1;
  OCTAVO_INLINE vi columns(vi b) { return b; }
  OCTAVO_INLINE vi dot(vi c, const int32_t* a, vi b) { return dot_u8s8(c, b, set_lanes(*a)); }
};

// sum[m][v] += products of A's row m and B's vector v over `lanes` lanes of B. A's rows lie `a_stride` lanes apart; from
// one lane to the next, each vector of B moves on by `b_step` lanes.
template <class Dot, int Rows, int Vectors>
OCTAVO_INLINE void multiply(typename Dot::Sum (&sum)[Rows][Vectors], const int32_t* a, int64_t a_stride,
                            const int32_t* const (&b)[Vectors], int64_t b_step, int64_t lanes) {
  for (int64_t k = 0; k < lanes; k++) {
    typename Dot::Columns columns[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) columns[v] = Dot::columns(load_lanes(b[v] + k * b_step));
#pragma GCC unroll 16
    for (int m = 0; m < Rows; m++) {
      const int32_t* x = a + m * a_stride + k * Dot::a_lanes;
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) sum[m][v] = Dot::dot(sum[m][v], x, columns[v]);
    }
  }
}

// Activations as integers by groups: a row's lanes of int8 (with two halves first all the upper ones, then the lower),
// and the scale and sum of each row and group.
struct GroupedRows {
  const int32_t* lanes;
  int64_t stride;       // lanes from row to row
  int64_t lower;        // lanes from an upper half to its lower one
  const float* scale;   // [row][groups]
  const int32_t* sums;  // [row][groups]
  int64_t groups;
};

// An activation of two halves is kHalf * upper + lower, both from -127 to 127.
constexpr int kHalf = 254;

// out[m][v] = rows of A times weights in groups of `Lanes` lanes; `panel[v]` is where vector v's columns start.
template <int Bits, int Lanes, bool Minima, bool Wide, int Halves, int Rows, int Vectors>
OCTAVO_INLINE void multiply_groups(vf (&out)[Rows][Vectors], const GroupedRows& a, const Weight& w,
                                   const uint8_t* const (&panel)[Vectors], const int (&column)[Vectors]) {
  constexpr int kLoads = Bits == 4 ? Lanes / 2 : Lanes;
  const vi nibble = set_lanes(0x0f0f0f0f);
  for (int m = 0; m < Rows; m++)
    for (int v = 0; v < Vectors; v++) out[m][v] = vf{};
  for (int64_t g = 0; g < a.groups; g++) {
    vi sum[Rows][Vectors] = {}, fine[Rows][Vectors] = {};
#pragma GCC unroll 8
    for (int j = 0; j < kLoads; j++) {
      vi low[Vectors], high[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) {
        const vi quants = load_lanes(panel[v] + (g * kLoads + j) * 64 + column[v] * 4);
        low[v] = Bits == 4 ? quants & nibble : quants;
        high[v] = Bits == 4 ? (quants >> 4) & nibble : quants;
      }
#pragma GCC unroll 8
      for (int m = 0; m < Rows; m++) {
        const int32_t* row = a.lanes + m * a.stride + g * Lanes + j;
        auto add = [&](vi(&total)[Vectors], const vi(&weights)[Vectors], int32_t lane) {
          const vi x = set_lanes(lane);
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; v++)
            total[v] = Bits == 4 || Minima ? dot_u7s8(total[v], weights[v], x) : dot_u8s8(total[v], weights[v], x);
        };
        add(sum[m], low, row[0]);
        if (Halves == 2) add(fine[m], low, row[a.lower]);
        if (Bits == 4) add(sum[m], high, row[Lanes / 2]);
        if (Bits == 4 && Halves == 2) add(fine[m], high, row[a.lower + Lanes / 2]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) {
      auto number = [&](int64_t at) {
        const int64_t index = g * 16 + column[v];
        return Wide ? load((const float*)(panel[v] + at) + index) : load_fp16((const uint16_t*)(panel[v] + at) + index);
      };
      const vf scale = number(w.scales_at);
      const vf minimum = Minima ? number(w.minima_at) : vf{};
#pragma GCC unroll 8
      for (int m = 0; m < Rows; m++) {
        const float x_scale = a.scale[m * a.groups + g];
        const int shift = Minima ? 0 : Bits == 4 ? w.offset : kBias8;
        vi exact = sum[m][v];
        if (Halves == 2) exact = (exact << 8) - (exact << 1) + fine[m][v];  // kHalf times the upper halves
        exact -= set_lanes(shift * a.sums[m * a.groups + g]);
        out[m][v] = fma(to_float(exact), scale * set(x_scale), out[m][v]);
        if (Minima) out[m][v] = fma(minimum, set(x_scale * float(a.sums[m * a.groups + g])), out[m][v]);
      }
    }
  }
}

// Calls work(std::integral_constant<int, rows>), for rows from 1 to Most.
template <int Most, class Work>
OCTAVO_INLINE void with_rows(int64_t rows, Work&& work) {
  if (rows == Most) {
    work(std::integral_constant<int, Most>{});
  } else if constexpr (Most > 1) {
    with_rows<Most - 1>(rows, work);
  }
}

// Cuts `rows` into tiles of about equal height, none above Most: work(first row, std::integral_constant<int, height>).
template <int Most, class Work>
OCTAVO_INLINE void in_tiles(int64_t rows, Work&& work) {
  const int64_t tiles = (rows + Most - 1) / Most;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
    with_rows<Most>(last - first, [&](auto height) { work(first, height); });
  }
}

}  // namespace octavo
