// Weights as files hold them: plain numbers, and GGUF's blocks of 32 or 256 small integers with scales.
//
// Every quantized type is read in groups of 16 weights, w = scale * q + minimum with q from 0 to 255, which is exact.
// Source of the layouts: ggml's `ggml-quants`; they are drawn in octavo/layers/quant/gguf.py.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

namespace octavo {

// The numbers are shared with library.py.
enum Stored : int32_t {
  kF32, kBF16, kF16, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kNumStored
};

struct StoredBlock { int weights, bytes; };

constexpr StoredBlock kBlocks[kNumStored] = {
    {1, 4}, {1, 2}, {1, 2}, {32, 18}, {32, 20}, {32, 22}, {32, 24}, {32, 34},
    {256, 84}, {256, 110}, {256, 144}, {256, 176}, {256, 210},
};

OCTAVO_INLINE size_t row_bytes(Stored type, int64_t width) {
  return size_t(width / kBlocks[type].weights) * kBlocks[type].bytes;
}

struct Group16 {
  uint8_t q[16];
  float scale, minimum;
};

OCTAVO_INLINE float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return from_fp16(bits);
}

// Scale and minimum number j of the eight that Q4_K and Q5_K pack into 12 bytes of 6-bit numbers.
OCTAVO_INLINE void six_bit_pair(const uint8_t* packed, int j, int& scale, int& minimum) {
  if (j < 4) {
    scale = packed[j] & 63;
    minimum = packed[j + 4] & 63;
  } else {
    scale = (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
    minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
  }
}

// Group `g` of a row, which holds weights 16 g to 16 g + 15.
template <Stored type>
OCTAVO_INLINE Group16 read_group(const uint8_t* row, int64_t g) {
  constexpr int per_block = kBlocks[type].weights / 16;
  const uint8_t* block = row + (g / per_block) * kBlocks[type].bytes;
  const int part = int(g % per_block);
  Group16 out;
  const float d = half_at(block);
  switch (type) {
    case kQ4_0: case kQ4_1: case kQ5_0: case kQ5_1: {
      const bool five = type == kQ5_0 || type == kQ5_1, has_minimum = type == kQ4_1 || type == kQ5_1;
      const uint8_t* bits = block + (has_minimum ? 4 : 2);
      const uint8_t* nibbles = bits + (five ? 4 : 0);
      for (int i = 0; i < 16; i++) {
        int q = part ? nibbles[i] >> 4 : nibbles[i] & 15;
        const int place = 16 * part + i;
        if (five) q |= (bits[place / 8] >> place % 8 & 1) << 4;
        out.q[i] = uint8_t(q);
      }
      out.scale = d;
      out.minimum = has_minimum ? half_at(block + 2) : d * (five ? -16.0f : -8.0f);
      return out;
    }
    case kQ8_0:
      for (int i = 0; i < 16; i++) out.q[i] = uint8_t(block[2 + 16 * part + i] ^ 0x80);
      out.scale = d;
      out.minimum = d * -128.0f;
      return out;
    case kQ2_K:
      for (int i = 0; i < 16; i++) {
        const int place = 16 * part + i, half = place / 128, within = place % 128;
        out.q[i] = block[16 + 32 * half + within % 32] >> 2 * (within / 32) & 3;
      }
      out.scale = half_at(block + 80) * float(block[part] & 15);
      out.minimum = -(half_at(block + 82) * float(block[part] >> 4));
      return out;
    case kQ3_K: {
      for (int i = 0; i < 16; i++) {
        const int place = 16 * part + i, half = place / 128, within = place % 128;
        const int low = block[32 + 32 * half + within % 32] >> 2 * (within / 32) & 3;
        out.q[i] = uint8_t(low | (block[place % 32] >> place / 32 & 1) << 2);
      }
      const uint8_t* packed = block + 96;
      const int low = part < 8 ? packed[part] & 15 : packed[part - 8] >> 4;
      const int high = packed[8 + part % 4] >> 2 * (part / 4) & 3;
      out.scale = half_at(block + 108) * float((low | high << 4) - 32);
      out.minimum = out.scale * -4.0f;
      return out;
    }
    case kQ4_K: case kQ5_K: {
      const int j = part / 2;  // of the eight groups of 32
      const uint8_t* nibbles = block + (type == kQ5_K ? 48 : 16) + 32 * (j / 2) + 16 * (part % 2);
      for (int i = 0; i < 16; i++) {
        int q = j % 2 ? nibbles[i] >> 4 : nibbles[i] & 15;
        if (type == kQ5_K) q |= (block[16 + 16 * (part % 2) + i] >> j & 1) << 4;
        out.q[i] = uint8_t(q);
      }
      int scale, minimum;
      six_bit_pair(block + 4, j, scale, minimum);
      out.scale = d * float(scale);
      out.minimum = -(half_at(block + 2) * float(minimum));
      return out;
    }
    case kQ6_K:
      for (int i = 0; i < 16; i++) {
        const int place = 16 * part + i, half = place / 128, within = place % 128;
        const uint8_t low = block[64 * half + within % 64];
        const int high = block[128 + 32 * half + within % 32] >> 2 * (within / 32) & 3;
        out.q[i] = uint8_t((within < 64 ? low & 15 : low >> 4) | high << 4);
      }
      out.scale = half_at(block + 208) * float(int8_t(block[192 + part]));
      out.minimum = out.scale * -32.0f;
      return out;
    default:
      __builtin_unreachable();
  }
}

// Calls work(std::integral_constant<Stored, type>) for a quantized type.
template <class Work>
OCTAVO_INLINE void with_type(Stored type, Work&& work) {
  auto try_all = [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((type == Stored(kQ4_0 + I) && (work(std::integral_constant<Stored, Stored(kQ4_0 + I)>{}), true)) || ...);
  };
  try_all(std::make_integer_sequence<int, kNumStored - kQ4_0>{});
}

// A row as fp32.
inline void read_row(Stored type, const uint8_t* row, int64_t width, float* out) {
  switch (type) {
    case kF32:
      std::memcpy(out, row, size_t(width) * 4);
      return;
    case kBF16: case kF16:
      for (int64_t i = 0; i < width; i++) {
        uint16_t bits;
        std::memcpy(&bits, row + 2 * i, 2);
        out[i] = type == kBF16 ? from_bf16(bits) : from_fp16(bits);
      }
      return;
    default:
      with_type(type, [&](auto known) {
        constexpr Stored T = decltype(known)::value;
        // An offset is taken off the integer, as the format says; only a true minimum is added after the product.
        constexpr int offset = T == kQ4_0 ? 8 : T == kQ5_0 ? 16 : T == kQ8_0 ? 128 : T == kQ3_K ? 4 : T == kQ6_K ? 32 : 0;
        for (int64_t g = 0; g < width / 16; g++) {
          const Group16 group = read_group<T>(row, g);
          for (int i = 0; i < 16; i++) {
            const float value = float(int(group.q[i]) - offset) * group.scale;
            out[16 * g + i] = offset ? value : value + group.minimum;
          }
        }
      });
  }
}

}  // namespace octavo
