// Every kernel of one build against naive loops in double precision: `scripts/test-kernels` compiles and runs it, under
// an emulator too. One line a kernel; exits with 1 if one is wrong. The grid is small: tests/kernels holds the large one.

#include "kernels.cpp"
#include "selftest_linear.h"

namespace octavo::selftest {
namespace {

void test_norms(Engine& engine) {
  Check check("norm", 1e-6), added("norm of a sum", 1e-6);
  for (int64_t width : {16, 80, 576})
    for (int32_t heads : {1, 3}) {
      constexpr int64_t T = 5;
      const int64_t row = heads * width;
      Floats x = uniforms(T * row, 3), residual = uniforms(T * row, 100), weight = uniforms(width), out(x.size()), sum(x.size());
      Instruction i = {};
      i.code = kNorm;
      i.heads = heads;
      i.width = width;
      i.weight = weight.data();
      i.number = 1e-5f;
      auto wanted = [&](const std::vector<double>& of) {
        std::vector<double> result(of.size());
        for (int64_t h = 0; h < int64_t(of.size()) / width; h++) {
          double squares = 0;
          for (int64_t k = 0; k < width; k++) squares += of[h * width + k] * of[h * width + k];
          for (int64_t k = 0; k < width; k++)
            result[h * width + k] = of[h * width + k] / std::sqrt(squares / double(width) + 1e-5) * double(weight[k]);
        }
        return result;
      };
      run(engine, i, {{x.data(), row}, {out.data(), row}}, tokens_only(T), 1, 1);
      check.compare(out, wanted({x.begin(), x.end()}));
      if (heads > 1) continue;
      i.code = kAddNorm;
      run(engine, i, {{x.data(), row}, {residual.data(), row}, {out.data(), row}, {sum.data(), row}}, tokens_only(T), 2, 2);
      std::vector<double> total(x.size());
      for (size_t k = 0; k < x.size(); k++) total[k] = double(x[k]) + double(residual[k]);
      added.compare(sum, total);
      added.compare(out, wanted(total));
    }
}

void test_silu_mul(Engine& engine) {
  Check check("silu times up", 1e-6);
  constexpr int64_t T = 7, F = 112;
  Floats x = uniforms(T * 2 * F, 20), out(size_t(T * F));
  x[0] = -1000, x[1] = 1000, x[2] = 0, x[3] = -80;
  std::vector<double> wanted(out.size());
  for (int64_t t = 0; t < T; t++)
    for (int64_t i = 0; i < F; i++) {
      const double gate = x[t * 2 * F + i], up = x[t * 2 * F + F + i];
      wanted[t * F + i] = gate / (1 + std::exp(-gate)) * up;
    }
  Instruction i = {};
  i.code = kSiluMul;
  i.width = F;
  run(engine, i, {{x.data(), 2 * F}, {out.data(), F}}, tokens_only(T), 1, 1);
  check.compare(out, wanted);
}

void test_embedding(Engine& engine) {
  Check check("embedding", 0);
  constexpr int64_t D = 48;
  const Ints ids = {3, 49, 0, 3};
  for (Stored type : {kF32, kBF16, kF16}) {
    const std::vector<uint8_t> table = stored_as(type, uniforms(50 * D));
    Floats values(50 * D), out(ids.size() * D);
    octavo_read_rows(type, table.data(), 50, D, values.data());
    Instruction i = {};
    i.code = kEmbed;
    i.width = D;
    i.weight = table.data();
    i.stored = type;
    Step step = tokens_only(int64_t(ids.size()));
    step.token_ids = ids.data();
    run(engine, i, {{out.data(), D}}, step, 0, 1);
    std::vector<double> wanted;
    for (int32_t id : ids) wanted.insert(wanted.end(), &values[size_t(id) * D], &values[size_t(id) * D] + D);
    check.compare(out, wanted);
  }
}

// Every fp16 number there is, bf16's rounding, powers of two and logarithms.
void test_numbers() {
  Check halves("fp16", 0), rounding("bf16", 0x1p-8), powers("2^x", 2e-7), logarithms("log", 2e-7);
  for (uint32_t first = 0; first < 0x7c00; first += 16) {
    uint16_t bits[16];
    for (uint32_t i = 0; i < 16; i++) bits[i] = uint16_t(first + i);
    for (int i = 0; i < 16; i++) {
      float lanes[W];
      store(lanes, load_fp16(bits + i / W * W));
      const int exponent = bits[i] >> 10, fraction = bits[i] & 1023;
      const double wanted = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      halves.holds(double(lanes[i % W]) == wanted && to_fp16(lanes[i % W]) == bits[i] && from_fp16(bits[i]) == lanes[i % W]);
    }
  }
  for (int n = 0; n < 100; n++) {
    Floats x = uniforms(2 * W, 50), y(2 * W), positive(2 * W);
    uint16_t bits[2 * W];
    store_bf16(bits, load(&x[0]), load(&x[W]));
    for (int i = 0; i < 2 * W; i += W) {
      store(&y[i], exp2(load(&x[i])));
      store(&positive[i], octavo::log(load(&y[i])));
    }
    for (int i = 0; i < 2 * W; i++) {
      rounding.compare(Floats{from_bf16(bits[i])}, {x[i]});
      powers.compare(Floats{y[i]}, {std::exp2(double(x[i]))});
      logarithms.compare(Floats{positive[i]}, {std::log(double(y[i]))});
    }
  }
}

// --- the cache and attention ---

// Sequences whose last `counts` tokens are a step's, on blocks in reverse order.
struct Sequences {
  CacheShape shape;
  Ints lens, counts, starts = {0}, tables, positions, slots;
  int64_t stride = 0, blocks = 0;
  std::vector<uint8_t> k, v;

  Sequences(CacheShape shape, Ints lens, Ints counts) : shape(shape), lens(lens), counts(counts) {
    const int64_t B = shape.block_size;
    for (int32_t length : lens) stride = std::max(stride, (length + B - 1) / B);
    blocks = int64_t(lens.size()) * stride;
    for (int64_t i = 0; i < blocks; i++) tables.push_back(int32_t(blocks - 1 - i));
    for (size_t r = 0; r < lens.size(); r++) {
      starts.push_back(starts.back() + counts[r]);
      for (int32_t p = lens[r] - counts[r]; p < lens[r]; p++) {
        positions.push_back(p);
        slots.push_back(int32_t(slot(r, p)));
      }
    }
    k.resize(size_t(blocks * shape.kv_heads * shape.head_lanes() * 4));
    v.resize(k.size());
  }

  int64_t slot(size_t row, int64_t p) const {
    return tables[row * size_t(stride) + size_t(p / shape.block_size)] * shape.block_size + p % shape.block_size;
  }

  // Element h of a token's K (or V), by the picture in cache.h.
  float element(const std::vector<uint8_t>& cache, bool of_v, int64_t slot, int64_t head, int64_t h) const {
    const int64_t B = shape.block_size, p = shape.per_lane(), token = slot % B;
    const int64_t place = of_v ? (token / p * shape.width + h) * p + token % p : (h / p * B + token) * p + h % p;
    const int32_t* lanes = shape.head(cache.data(), slot / B, head);
    if (p == 4) return float(((const int8_t*)lanes)[place]) * shape.scales(cache.data(), slot / B, head)[token];
    return p == 2 ? from_bf16(((const uint16_t*)lanes)[place]) : ((const float*)lanes)[place];
  }

  Step step() const {
    Step step = tokens_only(int64_t(positions.size()));
    step.positions = positions.data();
    step.slots = slots.data();
    step.rows = int32_t(lens.size());
    step.query_start = starts.data();
    step.seq_lens = lens.data();
    step.block_tables = tables.data();
    step.table_stride = stride;
    return step;
  }
};

Instruction cached(Sequences& s, Code code, int32_t heads) {
  Instruction i = {};
  i.code = code;
  i.heads = heads;
  i.width = s.shape.width;
  i.cache = s.shape;
  i.k_cache = s.k.data();
  i.v_cache = s.v.data();
  return i;
}

void test_rope(Engine& engine, int32_t bytes) {
  const std::string type = bytes == 4 ? "float32" : bytes == 2 ? "bfloat16" : "int8", name = "rope, " + type + " cache";
  Check check(name.c_str(), bytes == 4 ? 1e-6 : bytes == 2 ? 0x1p-8 : 1 / 253.0);
  constexpr int64_t N = 4, K = 2, H = 80, half = 24;  // 48 of 80 elements turn
  for (int64_t B : {16, 48}) {
    Sequences s({B, K, H, bytes}, {70, 9}, {11, 9});
    const int64_t T = 20;
    Floats q = uniforms(T * N * H), k = uniforms(T * K * H), v = uniforms(T * K * H), out(q.size());
    Floats cos[2] = {uniforms(70 * half), uniforms(70 * half)}, sin[2] = {uniforms(70 * half), uniforms(70 * half)};
    Floats scale = uniforms(70);
    const float* tables[4] = {cos[0].data(), cos[1].data(), sin[0].data(), sin[1].data()};
    Instruction i = cached(s, kRope, N);
    i.half = half;
    Step step = s.step();
    step.cos = tables;
    step.sin = tables + 2;
    step.q_scale = scale.data();
    run(engine, i, {{q.data(), N * H}, {k.data(), K * H}, {v.data(), K * H}, {out.data(), N * H}}, step, 3, 1);
    auto turned = [&](const float* x, int64_t t, int64_t h) {
      const int row = t >= 11;
      const int64_t angle = s.positions[t] * half + h % half;
      if (h >= 2 * half) return double(x[h]);
      const double c = cos[row][angle], n = sin[row][angle];
      return h < half ? x[h] * c - x[h + half] * n : x[h] * c + x[h - half] * n;
    };
    std::vector<double> wanted_q, wanted_k, wanted_v;
    Floats found_k, found_v;
    for (int64_t t = 0; t < T; t++) {
      for (int64_t n = 0; n < N * H; n++)
        wanted_q.push_back(turned(&q[(t * N + n / H) * H], t, n % H) * double(scale[s.positions[t]]));
      for (int64_t n = 0; n < K * H; n++) {
        wanted_k.push_back(turned(&k[(t * K + n / H) * H], t, n % H));
        wanted_v.push_back(double(v[t * K * H + n]));
        found_k.push_back(s.element(s.k, false, s.slots[t], n / H, n % H));
        found_v.push_back(s.element(s.v, true, s.slots[t], n / H, n % H));
      }
    }
    check.compare(out, wanted_q);
    check.compare(found_k, wanted_k);
    check.compare(found_v, wanted_v);
  }
}

std::vector<double> attended(const Sequences& s, const Instruction& i, const Floats& q) {
  const int64_t H = s.shape.width, group = i.heads / s.shape.kv_heads;
  std::vector<double> out;
  for (size_t r = 0; r < s.lens.size(); r++)
    for (int64_t t = s.starts[r]; t < s.starts[r + 1]; t++)
      for (int64_t n = 0; n < i.heads; n++) {
        const int64_t place = s.positions[t], oldest = i.window > 0 ? std::max<int64_t>(0, place - i.window + 1) : 0;
        std::vector<double> weights, sum(size_t(H), 0.0);
        double whole = 0;
        for (int64_t p = oldest; p <= place; p++) {
          double score = 0;
          for (int64_t h = 0; h < H; h++)
            score += double(q[(t * i.heads + n) * H + h]) * double(s.element(s.k, false, s.slot(r, p), n / group, h));
          score *= double(i.number);
          if (i.soft_cap > 0) score = double(i.soft_cap) * std::tanh(score / double(i.soft_cap));
          weights.push_back(std::exp(score));
          whole += weights.back();
        }
        for (int64_t p = oldest; p <= place; p++)
          for (int64_t h = 0; h < H; h++)
            sum[h] += weights[p - oldest] / whole * double(s.element(s.v, true, s.slot(r, p), n / group, h));
        out.insert(out.end(), sum.begin(), sum.end());
      }
  return out;
}

void test_attention(Engine& engine, int32_t bytes) {
  const bool rounds = bytes == 2 && DotBF16::a_lanes == 1;  // scores' weights too, to bf16
  const bool in_bytes = bytes == 1 && (kTiles || DotCached8::a_lanes == 1);  // queries and weights, to two bytes
  const std::string type = bytes == 4 ? "float32" : bytes == 2 ? "bfloat16" : "int8", name = "attention, " + type + " cache";
  Check check(name.c_str(), rounds ? 1e-2 : in_bytes ? 5e-4 : 1e-5);
  Engine alone(1);
  const struct { int64_t N, K, H, B, window; float soft_cap; } shapes[] = {
      {9, 3, 64, 16, 0, 0}, {4, 4, 80, 32, 0, 0}, {8, 1, 96, 16, 100, 0}, {2, 1, 128, 48, 0, 5}, {2, 1, 256, 16, 0, 0}};
  for (const auto& at : shapes) {
    Sequences s({at.B, at.K, at.H, bytes}, {1101, 5, 33, 64, 560}, {1, 5, 17, 1, 3});
    for (auto* cache : {&s.k, &s.v})
      for (int64_t head = 0; head < s.blocks * at.K; head++) {
        int32_t* lanes = (int32_t*)s.shape.head(cache->data(), 0, head);
        for (int64_t n = 0; n < s.shape.number_lanes() * s.shape.per_lane(); n++) {
          const float value = uniform() * 2;
          if (bytes == 1) ((int8_t*)lanes)[n] = int8_t(value * 63.5f);
          else if (bytes == 2) ((uint16_t*)lanes)[n] = to_bf16(value);
          else ((float*)lanes)[n] = value;
        }
        for (int64_t token = 0; bytes == 1 && token < at.B; token++)
          ((float*)lanes)[s.shape.number_lanes() + token] = (uniform() + 1.5f) / 80;
      }
    Instruction i = cached(s, kAttend, int32_t(at.N));
    i.number = 1 / std::sqrt(float(at.H));
    i.window = at.window;
    i.soft_cap = at.soft_cap;
    const int64_t row = at.N * at.H;
    Floats q = rounded(uniforms(s.starts.back() * row, 2)), out(q.size()), again(q.size());
    run(engine, i, {{q.data(), row}, {out.data(), row}}, s.step(), 1, 1);
    check.compare(out, attended(s, i, q));
    run(alone, i, {{q.data(), row}, {again.data(), row}}, s.step(), 1, 1);
    check.holds(!std::memcmp(out.data(), again.data(), out.size() * 4));
    // The last query of the last sequence by itself.
    const int32_t ends[2] = {0, 1};
    Step step = tokens_only(1);
    step.rows = 1;
    step.query_start = ends;
    step.seq_lens = &s.lens[4];
    step.block_tables = &s.tables[size_t(4 * s.stride)];
    step.table_stride = s.stride;
    run(engine, i, {{&q[q.size() - size_t(row)], row}, {again.data(), row}}, step, 1, 1);
    check.holds(!std::memcmp(&out[out.size() - size_t(row)], again.data(), size_t(row) * 4));
  }
}

// --- the draw ---

// The likeliest of the kept tokens with the noise of its key; octavo/runner/sampler.py says the rules.
int32_t drawn(const float* logits, int64_t width, const Draw& how) {
  const double most = *std::max_element(logits, logits + width);
  if (how.temperature <= 0) return int32_t(std::find(logits, logits + width, float(most)) - logits);
  std::vector<double> x, sorted;
  for (int64_t i = 0; i < width; i++) x.push_back((double(logits[i]) - most) / double(how.temperature));
  sorted = x;
  std::sort(sorted.begin(), sorted.end(), std::greater<double>());
  if (how.top_k > 0 && how.top_k < width) sorted.resize(size_t(how.top_k));
  double whole = 0, above = 0;
  for (double value : sorted) whole += std::exp(value);
  size_t kept = 0;
  while (kept < sorted.size() && (how.top_p >= 1 || above < double(how.top_p) * whole)) above += std::exp(sorted[kept++]);
  const double edge = std::max(sorted[kept - 1], how.min_p > 0 ? std::log(double(how.min_p)) : -1e300);
  int32_t best = -1;
  double highest = -1e300;
  for (int64_t i = 0; i < width; i++) {
    auto mix = [](uint32_t bits) { return mix32(bits - vu{})[0]; };
    const double v = (double(mix(mix(uint32_t(i) ^ how.key[0]) ^ how.key[1])) + 0.5) * 0x1p-32;
    const double noisy = x[size_t(i)] - std::log(-std::log1p(-std::min(v, 1 - 0x1p-24)));
    if (x[size_t(i)] < edge || noisy <= highest) continue;
    best = int32_t(i);
    highest = noisy;
  }
  return best;
}

void test_draw(Engine& engine) {
  Check check("draw", 0);
  constexpr int64_t rows = 40, width = 1003;
  for (Draw how : {Draw{0, 0, 1, 0, {}}, Draw{1, 0, 1, 0, {}}, Draw{1e-6f, 0, 1, 0, {}}, Draw{3, 5, 1, 0, {}},
                   Draw{1, 0, 0.5f, 0, {}}, Draw{1, 0, 0.999f, 0, {}}, Draw{1, 0, 1, 0.1f, {}}, Draw{2, 40, 0.9f, 0.01f, {}}})
    for (float size : {0.3f, 9.0f}) {
      Floats logits = uniforms(rows * width, size);
      std::vector<Draw> draws(rows, how);
      std::vector<double> wanted;
      Ints found(rows);
      for (int64_t r = 0; r < rows; r++) {
        for (uint32_t& key : draws[r].key) key = random_bits();
        wanted.push_back(drawn(&logits[r * width], width, draws[r]));
      }
      octavo_sample(&engine, logits.data(), rows, width, width, draws.data(), found.data());
      check.compare(found, wanted);
    }
}

}  // namespace
}  // namespace octavo::selftest

int main() {
  if (!octavo_usable()) {
    std::printf("the system does not let a process use this build\n");
    return 1;
  }
  using namespace octavo::selftest;
  Engine engine(2);
  test_numbers();
  test_plain_linear(engine);
  test_handing_over(engine);
  test_quantized_linear(engine);
  test_norms(engine);
  test_silu_mul(engine);
  test_embedding(engine);
  for (int32_t bytes : {4, 2, 1}) test_rope(engine, bytes);
  for (int32_t bytes : {4, 2, 1}) test_attention(engine, bytes);
  test_draw(engine);
  std::printf(Check::failed ? "%d kernels are wrong\n" : "all kernels are right\n", Check::failed);
  return Check::failed ? 1 : 0;
}
