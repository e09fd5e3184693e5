// Weights as the kernels read them, and how they are packed.
//
// The outputs of a matrix are cut into panels of 16. A panel holds, for one lane after another along the inputs, the 16
// outputs' lanes side by side, so that a vector load gives one lane of 16 outputs (or of W, on narrower machines):
//
//     panel of outputs 16 p to 16 p + 15:   [lane 0: 16 x 4 bytes] [lane 1: 16 x 4 bytes] ...
//     a lane:                               1 fp32, 2 bf16 or 4 int8 inputs
//
// Grouped formats keep integers of 4 or 8 bits and a scale (and a minimum) for each output and group of 16 or 32 inputs:
//
//     panel:   quants  [group][lane][16 x 4]; of 4 bits: [group][lane / 2][16 x 4], the low nibbles hold the first
//                      half of the group's lanes, the high ones the second
//              scales  [group][16]   fp16, or fp32 where the file's scales are products
//              minima  [group][16]
#pragma once

#include <cstdlib>
#include <vector>

#include "stored.h"

namespace octavo {

enum Format : int32_t { kPlainF32, kPlainBF16, kInt8, kGrouped };  // shared with library.py

struct Weight {
  Format format;
  int64_t outputs, inputs;  // inputs are a multiple of 32
  int32_t bits, group, offset;  // of kGrouped; offset is taken off the integers where there are no minima
  bool minima, wide, exact;     // wide: fp32 scales; exact: the integers are those of the file
  int32_t halves;               // of kGrouped: the bytes of an activation, see linear.h
  int64_t panel_bytes, scales_at, minima_at;  // within a panel
  uint8_t* data;                              // [panels][panel_bytes]
  float* scale;                               // [panels * 16], of kInt8

  int64_t panels() const { return (outputs + 15) / 16; }
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes; }
};

// Fills in the layout of a weight whose format, sizes and group shape are given; returns its bytes.
inline int64_t lay_out(Weight& w) {
  auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  switch (w.format) {
    case kPlainF32: w.panel_bytes = w.inputs * 64; break;
    case kPlainBF16: w.panel_bytes = w.inputs * 32; break;
    case kInt8: w.panel_bytes = (w.inputs + 63) / 64 * 64 * 16; break;  // whole tiles of amx.h
    case kGrouped: {
      const int64_t column = aligned(w.inputs / w.group * 16 * (w.wide ? 4 : 2));
      w.scales_at = w.inputs * 16 * w.bits / 8;
      w.minima_at = w.scales_at + column;
      w.panel_bytes = w.minima_at + (w.minima ? column : 0);
      break;
    }
  }
  return w.panels() * w.panel_bytes + (w.format == kInt8 ? aligned(w.panels() * 16 * 4) : 0);
}

// The grouped layout that holds a stored type exactly.
inline void exact_layout(Stored type, Weight& w) {
  w.format = kGrouped;
  w.exact = true;
  w.halves = 2;
  w.minima = type == kQ4_1 || type == kQ5_1 || type == kQ2_K || type == kQ4_K || type == kQ5_K;
  w.wide = type >= kQ2_K;
  w.group = type == kQ2_K || type == kQ3_K || type == kQ6_K ? 16 : 32;
  w.bits = type == kQ4_0 || type == kQ4_1 || type == kQ2_K || type == kQ3_K || type == kQ4_K ? 4 : 8;
  w.offset = w.bits == 4 ? (type == kQ3_K ? 4 : 8) : 0;
}

class Packer {
 public:
  explicit Packer(Weight& weight) : w(weight), row(size_t(weight.inputs)) {}

  // Puts one stored row of `width` inputs in as output `n`; the inputs beyond `width` are zeros.
  void put(int64_t n, Stored type, const uint8_t* stored, int64_t width) {
    uint8_t* panel = w.data + n / 16 * w.panel_bytes;
    const int lane = int(n % 16);
    if (w.exact) {
      with_type(type, [&](auto known) { put_groups<decltype(known)::value>(panel, lane, stored, width); });
      return;
    }
    read_row(type, stored, width, row.data());
    std::fill(row.begin() + width, row.end(), 0.0f);
    switch (w.format) {
      case kPlainF32:
        for (int64_t k = 0; k < w.inputs; k++) std::memcpy(panel + (k * 16 + lane) * 4, &row[k], 4);
        return;
      case kPlainBF16:
        for (int64_t k = 0; k < w.inputs; k++) {
          const uint16_t bits = to_bf16(row[k]);
          std::memcpy(panel + (k / 2 * 16 + lane) * 4 + k % 2 * 2, &bits, 2);
        }
        return;
      case kInt8: return put_int8(panel, lane, n);
      case kGrouped: return put_int4(panel, lane);
    }
  }

 private:
  static float largest_magnitude(const float* x, int64_t count) {
    float most = 0;
    for (int64_t k = 0; k < count; k++) most = std::abs(x[k]) > most ? std::abs(x[k]) : most;
    return most;
  }

  // One scale an output, symmetric: w = scale * q, q from -127 to 127, stored as q + 128.
  void put_int8(uint8_t* panel, int lane, int64_t n) {
    const float scale = largest_magnitude(row.data(), w.inputs) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    w.scale[n] = scale;
    for (int64_t k = 0; k < w.inputs; k++) {
      const int q = int(__builtin_rintf(row[k] * inverse));
      panel[(k / 4 * 16 + lane) * 4 + k % 4] = uint8_t((q > 127 ? 127 : q < -127 ? -127 : q) + 128);
    }
  }

  // Groups of 32 with an fp16 scale: the weight of the largest magnitude becomes -8, as in GGUF's Q4_0.
  void put_int4(uint8_t* panel, int lane) {
    for (int64_t g = 0; g < w.inputs / 32; g++) {
      const float* x = &row[g * 32];
      float extreme = 0;
      for (int i = 0; i < 32; i++) extreme = std::abs(x[i]) > std::abs(extreme) ? x[i] : extreme;
      const uint16_t scale = to_fp16(extreme / -8.0f);
      const float used = from_fp16(scale), inverse = used != 0 ? 1.0f / used : 0.0f;
      uint8_t q[32];
      for (int i = 0; i < 32; i++) {
        const int value = int(__builtin_rintf(x[i] * inverse)) + 8;
        q[i] = uint8_t(value < 0 ? 0 : value > 15 ? 15 : value);
      }
      put_quants(panel, lane, g, q);
      std::memcpy(panel + w.scales_at + (g * 16 + lane) * 2, &scale, 2);
    }
  }

  template <Stored type>
  void put_groups(uint8_t* panel, int lane, const uint8_t* stored, int64_t width) {
    for (int64_t g = 0; g < w.inputs / w.group; g++) {
      uint8_t q[32] = {};
      float scale = 0, minimum = 0;
      for (int part = 0; part < w.group / 16 && g * w.group < width; part++) {
        const Group16 group = read_group<type>(stored, g * w.group / 16 + part);
        std::memcpy(q + 16 * part, group.q, 16);
        scale = group.scale;
        minimum = group.minimum;
      }
      if (w.bits == 8 && !w.minima) {
        // Signed weights, with 128 added for `dot_u8s8`; in Q8_0 it is there already.
        const int shift = type == kQ8_0 ? 0 : type == kQ5_0 ? 128 - 16 : 128 - 32;
        for (uint8_t& value : q) value = uint8_t(value + shift);
      }
      put_quants(panel, lane, g, q);
      put_number(panel + w.scales_at, g * 16 + lane, scale);
      if (w.minima) put_number(panel + w.minima_at, g * 16 + lane, minimum);
    }
  }

  void put_quants(uint8_t* panel, int lane, int64_t g, const uint8_t* q) {
    const int lanes = w.group / 4, half = lanes / 2;
    if (w.bits == 8) {
      for (int j = 0; j < lanes; j++) std::memcpy(panel + ((g * lanes + j) * 16 + lane) * 4, q + 4 * j, 4);
      return;
    }
    for (int j = 0; j < half; j++) {
      uint32_t low, high;
      std::memcpy(&low, q + 4 * j, 4);
      std::memcpy(&high, q + 4 * (half + j), 4);
      low |= high << 4;
      std::memcpy(panel + ((g * half + j) * 16 + lane) * 4, &low, 4);
    }
  }

  void put_number(uint8_t* column, int64_t index, float value) {
    const uint16_t half = to_fp16(value);
    w.wide ? std::memcpy(column + index * 4, &value, 4) : std::memcpy(column + index * 2, &half, 2);
  }

  Weight& w;
  std::vector<float> row;
};

}  // namespace octavo
