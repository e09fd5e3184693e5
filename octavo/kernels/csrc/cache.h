// How K and V lie in a block of the paged cache: so that attention's tiles can be multiplied as they are.
//
//     K of a block:  [kv head][lane of the head's width][token]      a vector: one lane of 16 tokens
//     V of a block:  [kv head][lane of the tokens][element of H]     a vector: one lane of 16 elements
//
// A lane is one fp32 number or a pair of bf16 numbers. The block size is a multiple of 16. The bytes of a block are as
// many as in any other order, so whoever copies whole blocks need not know.
#pragma once

#include "simd.h"

namespace octavo {

struct CacheShape {
  int64_t block_size, kv_heads, width;  // of a head
  int32_t bytes;                        // of an element: 4 or 2

  int64_t per_lane() const { return 4 / bytes; }
  int64_t head_lanes() const { return block_size * width / per_lane(); }
  // The lanes of a kv head's part of a block.
  const int32_t* head(const void* cache, int64_t block, int64_t kv_head) const {
    return (const int32_t*)cache + (block * kv_heads + kv_head) * head_lanes();
  }
};

template <class Element>
inline void write_token(const CacheShape& shape, void* k_cache, void* v_cache, int64_t slot, int64_t kv_head,
                        const float* k, const float* v) {
  constexpr int64_t p = 4 / sizeof(Element);
  const int64_t B = shape.block_size, H = shape.width, token = slot % B;
  Element* k_head = (Element*)shape.head(k_cache, slot / B, kv_head);
  Element* v_head = (Element*)shape.head(v_cache, slot / B, kv_head);
  auto narrow = [](float x) -> Element {
    if constexpr (p == 2) return to_bf16(x);
    else return x;
  };
  for (int64_t h = 0; h < H; h++) {
    k_head[(h / p * B + token) * p + h % p] = narrow(k[h]);
    v_head[(token / p * H + h) * p + token % p] = narrow(v[h]);
  }
}

}  // namespace octavo
