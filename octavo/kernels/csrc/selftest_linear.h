// Matrix products in every format and from every stored type, against the products of what was read.
#pragma once

#include "selftest.h"

namespace octavo::selftest {

struct Matrix8 {  // a packed weight with its memory, and what it holds
  Weight weight = {};
  std::vector<uint8_t> data;
  Floats values;
};

void pack(Engine& engine, Matrix8& m, Stored stored, const std::vector<uint8_t>& rows, int64_t outputs, int64_t width) {
  m.data.assign(size_t(stored >= kQ4_0 ? octavo_lay_out_exact(&m.weight, stored) : octavo_lay_out(&m.weight)), 0);
  m.weight.data = m.data.data();
  m.weight.scale = (float*)(m.data.data() + m.weight.panels() * m.weight.panel_bytes);
  octavo_pack(&engine, &m.weight, 0, outputs, stored, rows.data(), width);
  m.values.resize(size_t(outputs * width));
  octavo_read_rows(stored, rows.data(), outputs, width, m.values.data());
}

Matrix8 sized(Format format, int64_t outputs, int64_t width) {
  Matrix8 m;
  m.weight.format = format;
  m.weight.outputs = outputs;
  m.weight.inputs = padded(width);
  return m;
}

// Rows of fp32 numbers as a file would hold them.
std::vector<uint8_t> stored_as(Stored type, const Floats& values) {
  std::vector<uint8_t> out(values.size() * size_t(kBlocks[type].bytes));
  for (size_t i = 0; i < values.size(); i++) {
    const uint16_t bits = type == kBF16 ? to_bf16(values[i]) : to_fp16(values[i]);
    type == kF32 ? std::memcpy(&out[4 * i], &values[i], 4) : std::memcpy(&out[2 * i], &bits, 2);
  }
  return out;
}

// Products of `x` and the matrix for every number of tokens, with and without a bias; alone as in company.
void multiply_all(Engine& engine, Check& check, const Matrix8& m, const Floats& x, int64_t most, int64_t width) {
  const int64_t O = m.weight.outputs;
  const Floats bias = uniforms(O);
  Floats whole;
  for (int64_t tokens : {most, int64_t(13), int64_t(3), int64_t(2), int64_t(1)}) {
    std::vector<double> wanted(size_t(tokens * O));
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t o = 0; o < O; o++) {
        double sum = tokens % 2 ? bias[o] : 0.0;
        for (int64_t k = 0; k < width; k++) sum += double(x[t * width + k]) * double(m.values[o * width + k]);
        wanted[t * O + o] = sum;
      }
    Floats in = x, out(size_t(tokens * O), NAN);
    Instruction i = {};
    i.code = kLinear;
    i.width = width;
    i.weight = &m.weight;
    i.bias = tokens % 2 ? bias.data() : nullptr;
    run(engine, i, {{in.data(), width}, {out.data(), O}}, tokens_only(tokens), 1, 1);
    check.compare(out, wanted);
    if (tokens == most) whole = out;
    else if (tokens % 2 == most % 2) check.holds(!std::memcmp(out.data(), whole.data(), out.size() * 4));
  }
}

void test_plain_linear(Engine& engine) {
  const struct { const char* name; Format format; Stored stored; } kinds[] = {
      {"linear float32", kPlainF32, kF32},   {"linear float32 from fp16", kPlainF32, kF16},
      {"linear bfloat16", kPlainBF16, kBF16}, {"linear int8", kInt8, kF32}, {"linear int4", kGrouped, kF32},
  };
  for (const auto& kind : kinds) {
    Check check(kind.name, 2e-6);
    for (auto [width, outputs] : {std::pair<int64_t, int64_t>{64, 16}, {576, 40}, {80, 37}, {48, 100}}) {
      Matrix8 m = sized(kind.format, outputs, width);
      Floats values = uniforms(outputs * width), x = rounded(uniforms(25 * width));
      if (kind.format == kInt8) values = wholes(outputs, width, width, 127), x = wholes(25, width, width, 127);
      if (kind.format == kGrouped) values = wholes(outputs, width, 32, -8), x = wholes(25, width, 32, 127);
      pack(engine, m, kind.stored, stored_as(kind.stored, values), outputs, width);
      multiply_all(engine, check, m, x, 25, width);
    }
  }
}

// A norm, a product through silu(gate) * up and another one, joined as a tape joins them and each on its own.
void test_handing_over(Engine& engine) {
  constexpr int64_t width = 80, gated = 96, tokens = 37;
  const struct { const char* name; Format format; } kinds[] = {
      {"handed over float32", kPlainF32}, {"handed over bfloat16", kPlainBF16},
      {"handed over int8", kInt8}, {"handed over int4", kGrouped},
  };
  for (const auto& kind : kinds) {
    Check check(kind.name, 0);
    Matrix8 up = sized(kind.format, 2 * gated, width), down = sized(kind.format, width, gated);
    pack(engine, up, kF32, stored_as(kF32, uniforms(2 * gated * width)), 2 * gated, width);
    pack(engine, down, kF32, stored_as(kF32, uniforms(width * gated)), width, gated);
    const Floats norm = uniforms(width);
    Floats x = uniforms(tokens * width), normed(x.size()), both(size_t(tokens * 2 * gated)), made(size_t(tokens * gated));
    Floats apart(x.size(), NAN), joined(x.size(), NAN);
    Buffer buffers[] = {{x.data(), width}, {normed.data(), width}, {both.data(), 2 * gated}, {made.data(), gated},
                        {apart.data(), width}};
    Instruction list[4] = {};
    const Code codes[] = {kNorm, kLinear, kSiluMul, kLinear};
    const int64_t widths[] = {width, width, gated, gated};
    for (int i = 0; i < 4; i++) {
      list[i].code = codes[i], list[i].width = widths[i], list[i].heads = 1;
      list[i].in[0] = {i, 0}, list[i].out[0] = {i + 1, 0};
    }
    list[0].weight = norm.data();
    list[1].weight = &up.weight;
    list[3].weight = &down.weight;
    engine.run({list, 4, buffers, 96}, tokens_only(tokens));
    buffers[1].data = nullptr;
    buffers[4].data = joined.data();
    list[0].to = list[1].from = 1, list[0].next = &up.weight;
    if (can_gate(up.weight)) {
      list[1].gated = 1;
      list[1].out[0] = {3, 0};
      list[2] = list[3];
      if (can_gate_into(down.weight)) {
        buffers[3].data = nullptr;
        list[1].to = list[2].from = 2, list[1].next = &down.weight;
      }
    } else {
      list[2].to = list[3].from = 2, list[2].next = &down.weight;
    }
    engine.run({list, can_gate(up.weight) ? 3 : 4, buffers, 96}, tokens_only(tokens));
    check.holds(!std::isnan(apart[0]) && !std::memcmp(apart.data(), joined.data(), apart.size() * 4));
  }
}

// GGUF's types: rows of random bytes with small fp16 numbers where the type has them. What is read of them must be, bit
// for bit, what the digest says: that of values which tests/kernels/test_weights.py holds against the gguf package.
struct Quantized { const char* name; Stored type; int halves[2]; uint32_t digest; };
constexpr Quantized kQuantized[] = {
    {"linear Q4_0", kQ4_0, {0, 0}, 0xfe0c5b85}, {"linear Q4_1", kQ4_1, {0, 2}, 0xbf50997d},
    {"linear Q5_0", kQ5_0, {0, 0}, 0xec81ca67}, {"linear Q5_1", kQ5_1, {0, 2}, 0xfaf10c7c},
    {"linear Q8_0", kQ8_0, {0, 0}, 0xc81aa715}, {"linear Q2_K", kQ2_K, {80, 82}, 0x17e3c0b},
    {"linear Q3_K", kQ3_K, {108, 108}, 0x7666472}, {"linear Q4_K", kQ4_K, {0, 2}, 0xbe19b26c},
    {"linear Q5_K", kQ5_K, {0, 2}, 0xbbbdc1ec}, {"linear Q6_K", kQ6_K, {208, 208}, 0xb84b460c},
};

void test_quantized_linear(Engine& engine) {
  constexpr int64_t width = 512, outputs = 37;
  for (const Quantized& kind : kQuantized) {
    Check check(kind.name, 2e-6);
    state = uint64_t(kind.type);
    const StoredBlock block = kBlocks[kind.type];
    std::vector<uint8_t> rows(size_t(outputs * width / block.weights * block.bytes));
    for (uint8_t& byte : rows) byte = uint8_t(random_bits());
    for (size_t start = 0; start < rows.size(); start += size_t(block.bytes))
      for (int at : kind.halves) {
        const uint16_t half = to_fp16(0.01f + 0.005f * uniform());
        std::memcpy(&rows[start + size_t(at)], &half, 2);
      }
    Matrix8 m = sized(kGrouped, outputs, width);
    pack(engine, m, kind.type, rows, outputs, width);
    uint32_t digest = 0x811c9dc5;  // FNV-1a
    for (const float& value : m.values)
      for (int i = 0; i < 4; i++) digest = (digest ^ ((const uint8_t*)&value)[i]) * 0x01000193;
    if (digest != kind.digest) std::printf("       %s read as %#x\n", kind.name, digest);
    check.holds(digest == kind.digest);
    multiply_all(engine, check, m, wholes(25, width, m.weight.group, 127 * kHalf + 126), 25, width);
  }
}

}  // namespace octavo::selftest
