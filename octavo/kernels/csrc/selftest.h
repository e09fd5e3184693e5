// What the kernels' self-test is made of: random numbers, a check against wanted ones, one instruction run alone.
//
// Numbers are chosen so that no rounding is a matter of luck: what a kernel brings to 8 or 16 bits are whole multiples
// of the scale that it will find, so that results are exact but for the order of fp32 sums.
#pragma once

#include <cstdio>
#include <string>

#include "program.h"

namespace octavo::selftest {

typedef std::vector<float> Floats;
typedef std::vector<int32_t> Ints;

uint64_t state = 1;

uint32_t random_bits() {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return uint32_t((z ^ z >> 31) >> 32);
}

float uniform() { return float(random_bits() >> 8) * 0x1p-23f - 1.0f; }

Floats uniforms(int64_t count, float size = 1.0f) {
  Floats out(size_t(count), 0.0f);
  for (float& x : out) x = uniform() * size;
  return out;
}

Floats rounded(Floats x) {
  for (float& value : x) value = from_bf16(to_bf16(value));
  return x;
}

// Rows of whole numbers over a power of two; of each group one is `extreme`, and none goes beyond it.
Floats wholes(int64_t rows, int64_t width, int64_t group, int extreme) {
  Floats out(size_t(rows * width), 0.0f);
  const int most = std::abs(extreme);
  for (float& x : out) x = std::min(float(extreme < 0 ? most - 1 : most), std::round(uniform() * float(most))) * 0x1p-7f;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < width; k += group)
      out[size_t(r * width + k + random_bits() % std::min(group, width - k))] = float(extreme) * 0x1p-7f;
  return out;
}

// The largest difference over the largest number, against what is allowed, for all cases of one kernel.
struct Check {
  static inline int failed = 0;
  const char* name;
  double allowed, worst = 0;
  int cases = 0;

  Check(const char* name, double allowed) : name(name), allowed(allowed) {}

  ~Check() {
    const bool good = worst <= allowed;
    failed += !good;
    std::printf("%-6s %-28s error %.1e, allowed %.1e, %d cases\n", good ? "ok" : "FAILED", name, worst, allowed, cases);
  }

  template <class Found>
  void compare(const Found& found, const std::vector<double>& wanted) {
    double size = 1e-30, most = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
      size = std::max(size, std::abs(wanted[i]));
      const double error = std::abs(double(found[i]) - wanted[i]);
      most = error <= most ? most : std::isnan(error) ? 1e30 : error;
    }
    worst = std::max(worst, most / size);
    cases++;
  }

  void holds(bool good) {
    if (!good) worst = 1e30;
    cases++;
  }
};

// Runs one instruction whose operands are buffers 0, 1, ... : inputs first, then outputs.
void run(Engine& engine, Instruction instruction, std::vector<Buffer> buffers, Step step, int inputs, int outputs) {
  for (int i = 0; i < inputs; i++) instruction.in[i] = {i, 0};
  for (int i = 0; i < outputs; i++) instruction.out[i] = {inputs + i, 0};
  const int64_t most = instruction.code == kLinear ? ((const Weight*)instruction.weight)->inputs : 0;
  engine.run({&instruction, 1, buffers.data(), most}, step);
}

Step tokens_only(int64_t tokens) {
  Step step = {};
  step.tokens = int32_t(tokens);
  return step;
}

}  // namespace octavo::selftest
