// From logits to tokens: temperature, top-k, top-p, min-p and the Gumbel-max draw, one row after another.
//
// The rules and their order are those of octavo/runner/sampler.py, the noise that of octavo/runner/noise.py; only the
// last bits of logarithms and sums may differ.
#pragma once

#include <climits>
#include <cmath>
#include <functional>

#include "simd.h"
#include "team.h"

namespace octavo {

struct Draw {
  float temperature;  // 0: the likeliest
  int32_t top_k;      // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  uint32_t key[2];
};

// What stands in place of a token where none can be drawn; octavo/batch.py has the same numbers.
constexpr int32_t kNoToken = -1;      // all logits are -inf
constexpr int32_t kNotFinite = -2;    // a logit is NaN or +inf

// Natural logarithm of positive, normal numbers; error below 2 in the last place.
OCTAVO_INLINE vf log(vf x) {
  vi bits = as_lanes(x);
  // The mantissa in [sqrt(1/2), sqrt(2)), what is left of the exponent beside it.
  const vi shifted = bits - set_lanes(0x3f3504f3);
  const vi exponent = shifted >> 23;
  const vf f = as_float((shifted & set_lanes(0x007fffff)) + set_lanes(0x3f3504f3)) - set(1.0f);
  const vf s = f / (set(2.0f) + f), z = s * s;
  vf r = set(0.24279078841f);
  r = fma(r, z, set(0.28498786688f));
  r = fma(r, z, set(0.40000972152f));
  r = fma(r, z, set(0.66666662693f));
  const vf half = set(0.5f) * f * f, e = to_float(exponent);
  return fma(e, set(0.693145752f), f - (half - fma(s, half + r * z, e * set(1.42860677e-6f))));
}

OCTAVO_INLINE vu mix32(vu x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// -log(-log(1 - v)), v a number of (0, 1) that follows from the key and the token.
OCTAVO_INLINE vf gumbel(vu token, const uint32_t* key) {
  const vu x = mix32(mix32(token ^ key[0]) ^ key[1]);
  // To fp32, rounded once: the upper part is exact, and the sum rounds.
  const vf whole = fma(to_float((vi)(x >> 16)), set(65536.0f), to_float((vi)(x & 0xffffu)));
  const vf v = min((whole + set(0.5f)) * set(0x1p-32f), set(1.0f - 0x1p-24f));
  const vf u = set(1.0f) - v;
  // log(1 - v) by log(u), corrected for what u lost by rounding; where nothing is left of v, it is -v.
  const vf lost = u - set(1.0f);
  const vf minus_log = lost < set(0.0f) ? log(u) * (v / lost) : v;
  return -log(minus_log);
}

class Sampler {
 public:
  // Draws from one row of logits, which is used up.
  int32_t draw(float* logits, int64_t width, const Draw& how) {
    const float most = highest(logits, width);
    if (!(most < -kLowest)) return kNotFinite;
    if (most == kLowest) return kNoToken;
    if (how.temperature <= 0) return int32_t(std::find(logits, logits + width, most) - logits);
    scale(logits, width, most, how.temperature);
    float edge = kLowest;
    if (how.top_k > 0 && how.top_k < width) edge = std::max(edge, kth(logits, width, how.top_k));
    if (how.top_p < 1) edge = std::max(edge, nucleus(logits, width, edge, how.top_p));
    if (how.min_p > 0) edge = std::max(edge, std::log(how.min_p));
    return noisiest(logits, width, edge, how.key);
  }

  // NaN if there is one: a maximum does not say so by itself.
  static float highest(const float* x, int64_t width) {
    vf most = set(kLowest);
    vi nan = set_lanes(0);
    int64_t i = 0;
    for (; i + W <= width; i += W) {
      const vf value = load(x + i);
      nan |= value != value;
      most = max(most, value);
    }
    float best = largest(most);
    bool any = false;
    for (int l = 0; l < W; l++) any |= nan[l] != 0;
    for (; i < width; i++) {
      any |= x[i] != x[i];
      best = x[i] > best ? x[i] : best;
    }
    return any ? __builtin_nanf("") : best;
  }

 private:
  static constexpr float kLowest = -__builtin_inff();

  // Relative to the likeliest token, so that a tiny temperature cannot overflow.
  static void scale(float* x, int64_t width, float most, float temperature) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(x + i, (load(x + i) - set(most)) / set(temperature));
    for (; i < width; i++) x[i] = (x[i] - most) / temperature;
  }

  float kth(const float* x, int64_t width, int32_t k) {
    chosen.assign(x, x + width);
    std::nth_element(chosen.begin(), chosen.begin() + (k - 1), chosen.end(), std::greater<float>());
    return chosen[size_t(k - 1)];
  }

  // The smallest logit of the nucleus: a token belongs to it while those above hold less than top_p. What top-k
  // dropped (below `floor`) counts for nothing.
  float nucleus(const float* x, int64_t width, float floor, float top_p) {
    double whole = 0;
    for (int64_t i = 0; i < width; i++)
      if (x[i] >= floor) whole += std::exp(double(x[i]));
    // The nucleus lies among the likeliest nearly always; only if it does not, all are sorted.
    for (float cut : {-8.0f, kLowest}) {
      chosen.clear();
      for (int64_t i = 0; i < width; i++)
        if (x[i] >= std::max(cut, floor) && x[i] > kLowest) chosen.push_back(x[i]);
      std::sort(chosen.begin(), chosen.end(), std::greater<float>());
      double above = 0;
      for (size_t i = 0; i < chosen.size(); i++) {
        const double upto = above + std::exp(double(chosen[i]));
        if (upto >= double(top_p) * whole) return chosen[i];
        above = upto;
      }
    }
    return chosen.empty() ? kLowest : chosen.back();
  }

  static int32_t noisiest(const float* x, int64_t width, float edge, const uint32_t* key) {
    vf best = set(kLowest);
    vi place = set_lanes(-1);
    int64_t i = 0;
    float padded[W];
    for (; i < width; i += W) {
      vf value;
      if (i + W <= width) {
        value = load(x + i);
      } else {
        for (int l = 0; l < W; l++) padded[l] = i + l < width ? x[i + l] : kLowest;
        value = load(padded);
      }
      const vi kept = value >= set(edge);
      bool any = false;
      for (int l = 0; l < W; l++) any |= kept[l] != 0;
      if (!any) continue;
      const vi token = lane_numbers() + int32_t(i);
      const vf noisy = kept ? value + gumbel((vu)token, key) : set(kLowest);
      const vi better = noisy > best;
      best = better ? noisy : best;
      place = better ? token : place;
    }
    const float most = largest(best);
    int32_t first = INT32_MAX;
    for (int l = 0; l < W; l++)
      if (best[l] == most && place[l] >= 0) first = std::min(first, place[l]);
    return first == INT32_MAX ? kNotFinite : first;
  }

  std::vector<float> chosen;
};

}  // namespace octavo
