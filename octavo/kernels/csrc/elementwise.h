// What happens to each token by itself: norms, the gated activation, rotary embedding, embedding rows.
#pragma once

#include <cmath>

#include "simd.h"

namespace octavo {

// out = x / sqrt(mean(x^2) + eps) * weight; `width` is a multiple of 16.
inline void rms_norm_row(const float* x, const float* weight, int64_t width, float eps, float* out) {
  vf squares{};
  for (int64_t i = 0; i < width; i += W) squares = fma(load(x + i), load(x + i), squares);
  const vf scale = set(1.0f / std::sqrt(sum(squares) / float(width) + eps));
  for (int64_t i = 0; i < width; i += W) store(out + i, load(x + i) * scale * load(weight + i));
}

// sum = x + residual, out = rms_norm(sum).
inline void add_rms_norm_row(const float* x, const float* residual, const float* weight, int64_t width, float eps,
                             float* out, float* total) {
  for (int64_t i = 0; i < width; i += W) store(total + i, load(x + i) + load(residual + i));
  rms_norm_row(total, weight, width, eps, out);
}

// silu(gate) * up.
OCTAVO_INLINE vf gated(vf gate, vf up) { return gate / (set(1.0f) + exp2(gate * set(-1.44269504f))) * up; }

// The same of a row, with gate and up side by side in `gate_up`.
inline void silu_mul_row(const float* gate_up, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += W) store(out + i, gated(load(gate_up + i), load(gate_up + width + i)));
}

// Element i of a head turns with element i + half; what lies behind 2 * half passes unchanged.
inline void rotate_head(const float* x, const float* cos, const float* sin, int64_t half, int64_t width, float scale,
                        float* out) {
  for (int64_t i = 0; i < half; i++) {
    const float first = x[i], second = x[half + i];
    out[i] = (first * cos[i] - second * sin[i]) * scale;
    out[half + i] = (second * cos[i] + first * sin[i]) * scale;
  }
  for (int64_t i = 2 * half; i < width; i++) out[i] = x[i] * scale;
}

}  // namespace octavo
