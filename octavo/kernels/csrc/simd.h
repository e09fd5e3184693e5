// Vectors of 32-bit lanes for one instruction set, chosen by the compiler's flags; the kernels are written on these alone.
//
// `vf` holds W floats, `vi` W 32-bit lanes. A lane is one fp32 number, two bf16 numbers or four 8-bit integers; the
// dot functions multiply lane by lane and add to an accumulator. Every function has one order of operations, so a
// kernel's result does not depend on which of its tile shapes computed it. Build with -ffp-contract=off.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define OCTAVO_INLINE static inline __attribute__((always_inline))

namespace octavo {

#if defined(__AVX512F__)
constexpr int W = 16;
// Tiles that fit 32 registers: rows of A times vectors of B.
constexpr int kTileRows = 12, kTileVectors = 2;
constexpr int kGroupRows = 6, kGroupVectors = 2;
constexpr int kValueRows = 6, kValueVectors = 4;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kTileRows = 5, kTileVectors = 2;
constexpr int kGroupRows = 2, kGroupVectors = 2;
constexpr int kValueRows = 3, kValueVectors = 4;
#else
constexpr int W = 4;
constexpr int kTileRows = 6, kTileVectors = 4;
constexpr int kGroupRows = 3, kGroupVectors = 4;
constexpr int kValueRows = 6, kValueVectors = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), may_alias));

OCTAVO_INLINE vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
OCTAVO_INLINE vi load_lanes(const void* p) { vi v; std::memcpy(&v, p, sizeof v); return v; }
OCTAVO_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
OCTAVO_INLINE void store_lanes(void* p, vi v) { std::memcpy(p, &v, sizeof v); }
OCTAVO_INLINE vf set(float x) { return x - vf{}; }
OCTAVO_INLINE vi set_lanes(int32_t x) { return x - vi{}; }
OCTAVO_INLINE vf as_float(vi v) { return (vf)v; }
OCTAVO_INLINE vi as_lanes(vf v) { return (vi)v; }
OCTAVO_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

OCTAVO_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

OCTAVO_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
OCTAVO_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// The lanes' own numbers: 0, 1, 2, ...
OCTAVO_INLINE vi lane_numbers() {
  vi v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

// The lanes with each number's bits in `n` flipped.
OCTAVO_INLINE vf swapped(vf v, int n) {
#if defined(__clang__)
  vf other;
  for (int i = 0; i < W; i++) other[i] = v[i ^ n];
  return other;
#else
  return __builtin_shuffle(v, lane_numbers() ^ n);
#endif
}

// Sum and largest of a vector's lanes, by halves, in one fixed order.
template <class Join>
OCTAVO_INLINE float folded(vf v, Join join) {
  for (int n = W / 2; n > 0; n /= 2) v = join(v, swapped(v, n));
  return v[0];
}

OCTAVO_INLINE float sum(vf v) {
  return folded(v, [](vf a, vf b) { return a + b; });
}

OCTAVO_INLINE float largest(vf v) {
  return folded(v, [](vf a, vf b) { return max(a, b); });
}

// bf16 is the upper half of fp32; rounded to nearest, ties to even.
OCTAVO_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

OCTAVO_INLINE float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

OCTAVO_INLINE float from_fp16(uint16_t x) {
  uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {  // subnormal: fraction * 2^-24
    float value = float(fraction) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest, ties to even; what exceeds fp16's range becomes infinite.
OCTAVO_INLINE uint16_t to_fp16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: the addition rounds
    float value;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &value, 4);
    return uint16_t(sign | (rounded - 0x3f000000));
  }
  return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// W floats from as many fp16 numbers.
OCTAVO_INLINE vf load_fp16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = from_fp16(p[i]);
  return v;
#endif
}

// 2W floats -> 2W bf16 numbers at `out`.
OCTAVO_INLINE void store_bf16(uint16_t* out, vf first, vf second) {
#if defined(__AVX512BF16__)
  __m512bh v = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  std::memcpy(out, &v, 64);
#else
  for (int i = 0; i < W; i++) {
    out[i] = to_bf16(first[i]);
    out[W + i] = to_bf16(second[i]);
  }
#endif
}

// The two bf16 numbers of each lane as fp32.
OCTAVO_INLINE vf low_bf16(vi v) { return as_float(v << 16); }
OCTAVO_INLINE vf high_bf16(vi v) { return as_float(v & set_lanes(int32_t(0xffff0000))); }

// What `dot_u8s8` adds to each unsigned weight: with VNNI w + 128 is multiplied as it stands, and 128 * sum(x) must be
// subtracted afterwards; the other instruction sets make the weight signed themselves.
#if defined(__AVX512VNNI__)
constexpr int kBias8 = 128;
#else
constexpr int kBias8 = 0;
#endif

// c + sum of the four products of a lane: x signed; w holds weights of 0 to 127 as they are.
OCTAVO_INLINE vi dot_u7s8(vi c, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)c, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
  __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
  return c + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  return c + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vi)vdotq_s32((int32x4_t)c, (int8x16_t)w, (int8x16_t)x);
#elif defined(__aarch64__)
  // Two products fit 16 bits: 2 * 128 * 127 at most, for |x| is below 128.
  const int16x8_t first = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
  const int16x8_t second = vmull_high_s8((int8x16_t)w, (int8x16_t)x);
  return (vi)vpadalq_s16((int32x4_t)c, vpaddq_s16(first, second));
#else
  for (int shift = 0; shift < 32; shift += 8) c += ((w << (24 - shift)) >> 24) * ((x << (24 - shift)) >> 24);
  return c;
#endif
}

// As dot_u7s8, but w holds signed weights with 128 added; see kBias8.
OCTAVO_INLINE vi dot_u8s8(vi c, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)c, (__m512i)w, (__m512i)x);
#else
  w ^= set_lanes(int32_t(0x80808080));
#if defined(__AVX512BW__)
  __m512i turned = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), (__m512i)x);
  return dot_u7s8(c, (vi)_mm512_abs_epi8((__m512i)w), (vi)turned);
#elif defined(__AVX2__)
  return dot_u7s8(c, (vi)_mm256_abs_epi8((__m256i)w), (vi)_mm256_sign_epi8((__m256i)x, (__m256i)w));
#else
  return dot_u7s8(c, w, x);
#endif
#endif
}

// 2^x, relative error below 2e-7; x below -126 gives 2^-126.
OCTAVO_INLINE vf exp2(vf x) {
  x = max(min(x, set(126.0f)), set(-126.0f));
  const vf magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which then lies in the low bits
  vf shifted = x + magic;
  vf f = x - (shifted - magic);
  vf p = set(1.535336188e-4f);
  p = fma(p, f, set(1.339887440e-3f));
  p = fma(p, f, set(9.618437357e-3f));
  p = fma(p, f, set(5.550332548e-2f));
  p = fma(p, f, set(2.402264791e-1f));
  p = fma(p, f, set(6.931472028e-1f));
  p = fma(p, f, set(1.0f));
  return as_float(as_lanes(p) + (as_lanes(shifted) << 23));
}

}  // namespace octavo
