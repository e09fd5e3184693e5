// How K and V lie in a block of the paged cache: so that attention's tiles can be multiplied as they are.
//
//     K of a block:  [kv head][lane of the head's width][token]      a vector: one lane of 16 tokens
//     V of a block:  [kv head][lane of the tokens][element of H]     a vector: one lane of 16 elements
//
// A lane is one fp32 number, two bf16 numbers or four int8 numbers. Behind the lanes of int8 numbers each kv head has its
// tokens' scales in fp32, [B]: a number is its integer times the scale of its token. The block size is a multiple of 16.
// The bytes of a block are as many as in any other order, so whoever copies whole blocks need not know.
#pragma once

#include "simd.h"

namespace octavo {

constexpr int64_t kMostWidth = 1024;  // of a head

struct CacheShape {
  int64_t block_size, kv_heads, width;  // of a head
  int32_t bytes;                        // of an element: 4, 2 or 1

  int64_t per_lane() const { return 4 / bytes; }
  int64_t number_lanes() const { return block_size * width / per_lane(); }
  // The lanes of a kv head's part of a block.
  int64_t head_lanes() const { return number_lanes() + (bytes == 1 ? block_size : 0); }
  const int32_t* head(const void* cache, int64_t block, int64_t kv_head) const {
    return (const int32_t*)cache + (block * kv_heads + kv_head) * head_lanes();
  }
  // The scales of a block's tokens; int8 alone has them.
  const float* scales(const void* cache, int64_t block, int64_t kv_head) const {
    return (const float*)head(cache, block, kv_head) + number_lanes();
  }
};

// int8 numbers, 127 for the largest of `x`, which are `width`; gives their scale.
inline float to_int8(const float* x, int64_t width, int8_t* out) {
  vf most{};
  for (int64_t i = 0; i < width; i += W) most = max(most, max(load(x + i), vf{} - load(x + i)));
  const float largest_one = largest(most);
  const vf inverse = set(largest_one > 0 ? 127.0f / largest_one : 0.0f), magic = set(12582912.0f);  // as in exp2
  for (int64_t i = 0; i < width; i += W) {
    const vi bits = as_lanes(load(x + i) * inverse + magic);
    for (int lane = 0; lane < W; lane++) out[i + lane] = int8_t(bits[lane]);
  }
  return largest_one / 127.0f;
}

template <class Element>
inline void write_token(const CacheShape& shape, void* k_cache, void* v_cache, int64_t slot, int64_t kv_head,
                        const float* k, const float* v) {
  constexpr int64_t p = 4 / sizeof(Element);
  const int64_t B = shape.block_size, H = shape.width, token = slot % B;
  Element* k_head = (Element*)shape.head(k_cache, slot / B, kv_head);
  Element* v_head = (Element*)shape.head(v_cache, slot / B, kv_head);
  auto write = [&](const auto* k, const auto* v, auto&& narrow) {
    for (int64_t h = 0; h < H; h++) {
      k_head[(h / p * B + token) * p + h % p] = narrow(k[h]);
      v_head[(token / p * H + h) * p + token % p] = narrow(v[h]);
    }
  };
  if constexpr (p == 4) {
    int8_t k_numbers[kMostWidth], v_numbers[kMostWidth];
    float* k_scales = (float*)shape.scales(k_cache, slot / B, kv_head);
    float* v_scales = (float*)shape.scales(v_cache, slot / B, kv_head);
    k_scales[token] = to_int8(k, H, k_numbers);
    v_scales[token] = to_int8(v, H, v_numbers);
    write(k_numbers, v_numbers, [](int8_t x) { return x; });
  } else {
    write(k, v, [](float x) -> Element {
      if constexpr (p == 2) return to_bf16(x);
      else return x;
    });
  }
}

}  // namespace octavo
