// y = x W^T + b for packed weights: activations are brought to the weights' precision (activations.h), then multiplied in
// tiles.
#pragma once

#include "activations.h"
#include "elementwise.h"
#include "team.h"

namespace octavo {

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

// A piece of a product: columns from `n` on of rows from `first` on, and the column that this thread will do next, or -1.
struct Part { int64_t first, rows, n, coming; };

// Memory that is fetched piece by piece while something else is computed.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  int64_t lines = 0;  // at a time

  Ahead() = default;
  // The two panels from `panel` on, in `times` times.
  Ahead(const Weight& w, int64_t panel, int64_t times)
      : at(w.panel(panel)), end(at + w.panel_bytes * std::min<int64_t>(2, w.panels() - panel)),
        lines((w.panel_bytes / 32 + times - 1) / times) {}

  void operator()() {
    for (int64_t i = 0; i < lines && at < end; i++, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

#if defined(__AMX_TILE__)
// Sums of `Blocks` blocks of 16 rows and two panels, in tiles 0 to 3: of int8 the upper bytes first, where there are any.
template <class Dot, int Blocks>
OCTAVO_INLINE void multiply_blocks(const uint8_t* x, int64_t a_step, const uint8_t* b0, const uint8_t* b1, int64_t count,
                                   const uint8_t* uppers, int32_t (&sums)[4][16][16], Ahead& ahead) {
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
  add_tiles<Dot, Blocks>(x, a_step, b0, b1, count, 64, ahead);
}

// The outputs of 16 sums, without the bias.
template <class Dot>
OCTAVO_INLINE vf outputs_of(const Weight& w, const Activations& a, int64_t row, int64_t column, vi sum) {
  if constexpr (Dot::per_lane == 2) return as_float(sum);
  return to_float(sum - set_lanes(kBias8 * a.sums[size_t(row)])) * (load(w.scale + column) * set(a.scale[size_t(row)]));
}

// As plain_columns, by tiles: 32 outputs, 32 rows at a time.
template <class Dot>
inline void tiled_columns(const Weight& w, const Activations& a, const Part& part, const float* bias, Matrix out) {
  const auto [first, rows, n, coming] = part;
  const int64_t count = tiles_of(w), a_step = count * (Dot::per_lane == 4 ? 2048 : 1024);
  const uint8_t* const b0 = w.panel(n / 16);
  const uint8_t* const b1 = w.panel(std::min(n / 16 + 1, w.panels() - 1));
  Ahead ahead = coming < 0 ? Ahead() : Ahead(w, coming / 16, (rows + 31) / 32 * count);
  alignas(64) int32_t sums[4][16][16];  // as [block of rows][16][32]
  for (int64_t start = 0; start < rows; start += 32) {
    const int64_t here = std::min<int64_t>(32, rows - start), block = (first + start) / 16;
    const uint8_t* x = (const uint8_t*)a.lanes.data() + block * a_step;
    const uint8_t* uppers = a.uppers.data() + block * count;
    here > 16 ? multiply_blocks<Dot, 2>(x, a_step, b0, b1, count, uppers, sums, ahead)
              : multiply_blocks<Dot, 1>(x, a_step, b0, b1, count, uppers, sums, ahead);
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
        const vf value = outputs_of<Dot>(w, a, row, column, load_lanes((const int32_t*)sums + m * 32 + v * 16));
        store_outputs(out.row(row) + column, value, bias ? bias + column : nullptr, w.outputs - column);
      }
    }
  }
}

// silu(gate) * up for 32 columns from `n` on, where the outputs are first all gates, then as many ups; the sums of both
// never leave the first-level cache. To `out`, or as bf16 activations to `next`.
template <class Dot>
inline void gated_columns(const Weight& w, const Activations& a, const Part& part, const float* bias, Matrix out,
                          Activations* next) {
  const auto [first, rows, n, coming] = part;
  const int64_t count = tiles_of(w), a_step = count * (Dot::per_lane == 4 ? 2048 : 1024), width = w.outputs / 2;
  const int64_t times = (rows + 31) / 32 * count;
  Ahead ahead[2];
  if (coming >= 0) ahead[0] = Ahead(w, coming / 16, times), ahead[1] = Ahead(w, (width + coming) / 16, times);
  alignas(64) int32_t sums[2][4][16][16];  // of 16 columns each, as [block of rows][16][gate, up][16]
  for (int64_t start = 0; start < rows; start += 32) {
    const int64_t here = std::min<int64_t>(32, rows - start), block = (first + start) / 16;
    const uint8_t* x = (const uint8_t*)a.lanes.data() + block * a_step;
    const uint8_t* uppers = a.uppers.data() + block * count;
    for (int half = 0; half < 2; half++) {
      const uint8_t* const gate = w.panel(n / 16 + half);
      const uint8_t* const up = w.panel((width + n) / 16 + half);
      if (here > 16) {
        multiply_blocks<Dot, 2>(x, a_step, gate, up, count, uppers, sums[half], ahead[half]);
        store_tiles<2>((float*)sums[half][0], (float*)sums[half][2], 32, true);
      } else {
        multiply_blocks<Dot, 1>(x, a_step, gate, up, count, uppers, sums[half], ahead[half]);
        store_tiles<1>((float*)sums[half][0], nullptr, 32, true);
      }
    }
    for (int64_t m = 0; m < here; m++) {
      const int64_t row = first + start + m;
      vf value[2];
      for (int half = 0; half < 2; half++) {
        const int32_t* sum = (const int32_t*)sums[half] + m * 32;
        const int64_t column = n + half * 16;
        vf gate = outputs_of<Dot>(w, a, row, column, load_lanes(sum));
        vf up = outputs_of<Dot>(w, a, row, width + column, load_lanes(sum + 16));
        if (bias) gate = gate + load(bias + column), up = up + load(bias + width + column);
        value[half] = gated(gate, up);
      }
      if (next) {
        store_bf16((uint16_t*)next->tile_row(width / 32, row, n / 32), value[0], value[1]);
      } else {
        store(out.row(row) + n, value[0]);
        store(out.row(row) + n + 16, value[1]);
      }
    }
  }
}
#endif

template <class Dot>
inline void plain_columns(const Weight& w, const Activations& a, const Part& part, const float* bias, Matrix out) {
  const int64_t first = part.first, rows = part.rows, n = part.n;
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
inline void grouped_columns(const Weight& w, const Activations& a, const Part& part, const float* bias, Matrix out) {
  const int64_t first = part.first, rows = part.rows, n = part.n;
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
    const GroupedRows of_rows = {a.lanes.data() + row * lanes, lanes, w.inputs / 4, a.scale.data() + row * groups,
                              a.sums.data() + row * groups, groups};
    vf sum[Rows][Vectors];
    multiply_groups<Bits, Lanes, Minima, Wide, Halves>(sum, of_rows, w, panel, column);
    for (int m = 0; m < Rows; m++)
      for (int v = 0; v < Vectors; v++) {
        const int64_t at = n + v * W;
        if (at >= w.outputs) break;
        store_outputs(out.row(row + m) + at, sum[m][v], bias ? bias + at : nullptr, w.outputs - at);
      }
  });
}

typedef void (*Columns)(const Weight&, const Activations&, const Part&, const float*, Matrix);

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

// Whether silu(gate) * up of a weight's outputs can be had in one go (gated_columns), and as activations of `next`.
inline bool can_gate(const Weight& w) { return by_tiles(w) && w.outputs % 64 == 0; }
inline bool can_gate_into(const Weight& next) { return by_tiles(next) && next.format == kPlainBF16; }

// This thread's share of rows to prepare: what is known of a block of tiles (Activations::uppers) is written by one.
inline std::pair<int64_t, int64_t> share_rows(Team& team, const Weight& w, int64_t rows) {
  return by_tiles(w) && w.format == kInt8 ? team.share_blocks(rows) : team.share(rows);
}

// Draws pieces of the product, columns(part) for each, until there are none; one ahead, so that its weights can be
// fetched.
template <class Columns>
inline void draw_parts(Team& team, const Weight& w, int64_t rows, int64_t width, Columns&& columns) {
  const int64_t most = rows_at_once(w);
  const int64_t across = (width + kColumns - 1) / kColumns, down = (rows + most - 1) / most;
  for (int64_t i = team.next(), coming; i < across * down; i = coming) {
    coming = team.next();
    const int64_t first = i / across * most;
    columns(Part{first, std::min(most, rows - first), i % across * kColumns,
                 coming < across * down ? coming % across * kColumns : -1});
  }
}

// The product of activations that are prepared. Every thread calls it; the result can be read after the next barrier.
inline void multiply_rows(Team& team, const Weight& w, const Activations& a, int64_t rows, const float* bias, Matrix out) {
  const Columns work = columns_of(w);
  draw_parts(team, w, rows, w.outputs, [&](const Part& part) { work(w, a, part, bias, out); });
}

// The same of a weight that can_gate, through silu(gate) * up, to `out` or `next`.
inline void multiply_gated(Team& team, const Weight& w, const Activations& a, int64_t rows, const float* bias, Matrix out,
                           Activations* next) {
#if defined(__AMX_TILE__)
  draw_parts(team, w, rows, w.outputs / 2, [&](const Part& part) {
    w.format == kInt8 ? gated_columns<DotInt8>(w, a, part, bias, out, next)
                      : gated_columns<DotBF16>(w, a, part, bias, out, next);
  });
#endif
}

// Prepares the rows of `x`, all threads together; each gets the activations to multiply. `shared` is one for all threads,
// `own` is the thread's: a handful of rows is prepared by every thread for itself, which is cheaper than waiting for one
// another.
inline const Activations& prepare(Team& team, const Weight& w, Matrix x, int64_t rows, int64_t width, Activations& shared,
                                  Activations& own) {
  const bool alone = rows <= 2 || team.size() == 1;
  Activations& a = alone ? own : shared;
  const auto [begin, end] = alone ? std::pair<int64_t, int64_t>{0, rows} : share_rows(team, w, rows);
  for (int64_t m = begin; m < end; m++) prepare_row(w, x.row(m), width, m, a);
  if (!alone) team.barrier();
  return a;
}

}  // namespace octavo
