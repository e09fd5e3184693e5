// A step as a list of instructions, and the threads that go through it together.
//
// The list is recorded once from a model's own code (octavo/ops/cpu/calls.py) and run with each step's arrays. It
// names buffers by number; a buffer holds fp32 rows, one a token. The structures are shared with library.py.
#pragma once

#include <chrono>
#include <memory>

#include "attention.h"

namespace octavo {

enum Code : int32_t { kEmbed, kNorm, kAddNorm, kLinear, kSiluMul, kRope, kAttend };

struct Operand {
  int32_t buffer;
  int32_t offset;  // floats from a row's start
};

struct Instruction {
  Code code;
  int32_t heads;       // kNorm: norms side by side in a row; kRope, kAttend: query heads
  Operand in[3];
  Operand out[2];
  int64_t width;       // of a row, or of a head
  const void* weight;  // a Weight, or fp32 numbers, or the rows of the embedding
  const float* bias;
  int64_t stored;      // kEmbed: the type of the rows
  float number;        // eps, or the scale of the scores
  float soft_cap;
  int64_t window;
  int64_t half;        // kRope: rotary angles of a head
  void* k_cache;
  void* v_cache;
  CacheShape cache;
  // Between a linear layer and what comes before it: the row stays in the precision that the weight takes. `from` and `to`
  // are 1 or 2, a room of activations that stands in the place of in[0] or out[0], or 0.
  int32_t from;      // kLinear
  int32_t to;        // kNorm with one head, kAddNorm, kSiluMul, and kLinear if `gated`
  const void* next;  // the Weight that takes what is in `to`
  int32_t gated;     // kLinear: silu(gate) * up of the outputs is the result
};

struct Buffer {
  float* data;
  int64_t stride;  // floats
};

struct Program {
  const Instruction* instructions;
  int64_t size;
  const Buffer* buffers;
  int64_t most_inputs;  // the widest input of a linear layer, padded
};

class Engine {
 public:
  explicit Engine(int threads) : pool(threads), own(size_t(threads)), rooms(size_t(threads)), made(size_t(threads)) {}

  void run(const Program& program, const Step& step) {
    for (Activations* a : {&shared, &handed[0], &handed[1]}) a->reserve(step.tokens, program.most_inputs);
    for (Lines<float>& row : made) row.resize(std::max(row.size(), size_t(program.most_inputs)));
    for (Activations& a : own) a.reserve(pool.size() == 1 ? step.tokens : 2, program.most_inputs);
    row_of_token.resize(size_t(step.tokens));
    for (int32_t r = 0; r < step.rows; r++)
      std::fill(row_of_token.begin() + step.query_start[r], row_of_token.begin() + step.query_start[r + 1], r);
    plan(program, step);
    together([&](Team& team) {
      for (int64_t i = 0; i < program.size; i++) {
        const bool timed = seconds && team.thread == 0;
        const auto began = timed ? Clock::now() : Clock::time_point{};
        execute(team, program.instructions[i], program.buffers, step);
        team.barrier();
        if (timed) seconds[program.instructions[i].code] += std::chrono::duration<double>(Clock::now() - began).count();
      }
    });
  }

  template <class Work>
  void together(Work&& work) {
    for (auto& line : counters.lines) line.next.store(0);
    pool.run([&](int thread) {
      Team team(pool, counters, thread);
      const TilesInUse tiles;
      work(team);
    });
  }

  Pool pool;
  double* seconds = nullptr;  // by Code, added to if it is set

 private:
  typedef std::chrono::steady_clock Clock;
  static AttentionShape shape_of(const Instruction& i) { return {i.heads, i.cache, i.number, i.soft_cap, i.window}; }

  // Layers of one window share their pieces; a model has one window or two.
  void plan(const Program& program, const Step& step) {
    planned.clear();
    for (int64_t i = 0; i < program.size; i++) {
      const Instruction& at = program.instructions[i];
      if (at.code != kAttend || std::count(planned.begin(), planned.end(), at.window)) continue;
      planned.push_back(at.window);
      if (pieces.size() < planned.size()) pieces.push_back(std::make_unique<Pieces>());
      pieces[planned.size() - 1]->plan(shape_of(at), step, pool.size());
    }
  }

  void execute(Team& team, const Instruction& i, const Buffer* buffers, const Step& step) {
    auto at = [&](Operand o) { return Matrix{buffers[o.buffer].data + o.offset, buffers[o.buffer].stride}; };
    const auto [begin, end] = team.share(step.tokens);
    switch (i.code) {
      case kEmbed:
        for (int64_t t = begin; t < end; t++)
          read_row(Stored(i.stored), (const uint8_t*)i.weight + step.token_ids[t] * row_bytes(Stored(i.stored), i.width),
                   i.width, at(i.out[0]).row(t));
        return;
      case kNorm:
        if (i.to) return hand_over(team, i, step.tokens, [&](int64_t t, float* made) {
          rms_norm_row(at(i.in[0]).row(t), (const float*)i.weight, i.width, i.number, made);
        });
        for (int64_t t = begin; t < end; t++)
          for (int64_t h = 0; h < i.heads; h++)
            rms_norm_row(at(i.in[0]).row(t) + h * i.width, (const float*)i.weight, i.width, i.number,
                         at(i.out[0]).row(t) + h * i.width);
        return;
      case kAddNorm: {
        auto row = [&](int64_t t, float* made) {
          add_rms_norm_row(at(i.in[0]).row(t), at(i.in[1]).row(t), (const float*)i.weight, i.width, i.number, made,
                           at(i.out[1]).row(t));
        };
        if (i.to) return hand_over(team, i, step.tokens, row);
        for (int64_t t = begin; t < end; t++) row(t, at(i.out[0]).row(t));
        return;
      }
      case kLinear: {
        const Weight& w = *(const Weight*)i.weight;
        const Activations& a = i.from ? handed[i.from - 1]
                                      : prepare(team, w, at(i.in[0]), step.tokens, i.width, shared, own[size_t(team.thread)]);
        if (!i.gated) return multiply_rows(team, w, a, step.tokens, i.bias, at(i.out[0]));
        return multiply_gated(team, w, a, step.tokens, i.bias, at(i.out[0]), i.to ? &handed[i.to - 1] : nullptr);
      }
      case kSiluMul:
        if (i.to) return hand_over(team, i, step.tokens, [&](int64_t t, float* made) {
          silu_mul_row(at(i.in[0]).row(t), i.width, made);
        });
        for (int64_t t = begin; t < end; t++) silu_mul_row(at(i.in[0]).row(t), i.width, at(i.out[0]).row(t));
        return;
      case kRope:
        for (int64_t t = begin; t < end; t++) rope(i, at(i.in[0]), at(i.in[1]), at(i.in[2]), at(i.out[0]), step, t);
        return;
      case kAttend: {
        const AttentionShape shape = shape_of(i);
        const size_t n = size_t(std::find(planned.begin(), planned.end(), i.window) - planned.begin());
        AttentionRoom& room = rooms[size_t(team.thread)];
        auto attend = [&](auto dot) {
          attention<decltype(dot)>(team, shape, step, *pieces[n], at(i.in[0]), at(i.out[0]), i.k_cache, i.v_cache, room);
        };
        i.cache.bytes == 4 ? attend(DotF32{}) : i.cache.bytes == 2 ? attend(DotBF16{}) : attend(DotCached8{});
      }
    }
  }

  // Rows of i.width numbers, make(token, numbers) for each, to the activations that `i` hands over to the next product.
  template <class Make>
  void hand_over(Team& team, const Instruction& i, int64_t tokens, Make&& make) {
    const Weight& next = *(const Weight*)i.next;
    float* row = made[size_t(team.thread)].data();
    const auto [begin, end] = share_rows(team, next, tokens);
    for (int64_t t = begin; t < end; t++) {
      make(t, row);
      prepare_row(next, row, i.width, t, handed[i.to - 1]);
    }
  }

  void rope(const Instruction& i, Matrix q, Matrix k, Matrix v, Matrix out, const Step& step, int64_t t) {
    const int32_t row = row_of_token[size_t(t)];
    const int64_t place = step.positions[t];
    const float* cos = step.cos[row] + place * i.half;
    const float* sin = step.sin[row] + place * i.half;
    const float scale = step.q_scale ? step.q_scale[place] : 1.0f;
    for (int64_t n = 0; n < i.heads; n++)
      rotate_head(q.row(t) + n * i.width, cos, sin, i.half, i.width, scale, out.row(t) + n * i.width);
    float turned[kMostWidth];
    for (int64_t n = 0; n < i.cache.kv_heads; n++) {
      rotate_head(k.row(t) + n * i.width, cos, sin, i.half, i.width, 1.0f, turned);
      auto write = [&](auto element) {
        write_token<decltype(element)>(i.cache, i.k_cache, i.v_cache, step.slots[t], n, turned, v.row(t) + n * i.width);
      };
      i.cache.bytes == 4 ? write(float{}) : i.cache.bytes == 2 ? write(uint16_t{}) : write(int8_t{});
    }
  }

  Counters counters;
  Activations shared, handed[2];
  std::vector<Activations> own;
  std::vector<AttentionRoom> rooms;
  std::vector<Lines<float>> made;  // a row, by thread
  std::vector<int32_t> row_of_token;
  std::vector<int64_t> planned;  // windows
  std::vector<std::unique_ptr<Pieces>> pieces;
};

}  // namespace octavo
