// The library's functions, in C: what octavo/kernels/library.py calls. One build for each instruction set.

#include "program.h"
#include "sampling.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

using namespace octavo;

#pragma GCC visibility push(default)
extern "C" {

// Zeroed memory that takes room when it is touched, in huge pages where the system gives them; null if there is none.
void* octavo_allocate(int64_t bytes) {
  constexpr int64_t kHuge = 2 << 20;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
  flags |= MAP_NORESERVE;
#endif
  char* mapped = (char*)mmap(nullptr, size_t(bytes + kHuge), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* aligned = (char*)((uintptr_t(mapped) + kHuge - 1) / kHuge * kHuge);
  if (aligned > mapped) munmap(mapped, size_t(aligned - mapped));
  munmap(aligned + (bytes + 4095) / 4096 * 4096, size_t(mapped + kHuge - aligned) / 4096 * 4096);
#if defined(MADV_HUGEPAGE)
  madvise(aligned, size_t(bytes), MADV_HUGEPAGE);
#endif
  return aligned;
}

void octavo_free(void* memory, int64_t bytes) { munmap(memory, size_t((bytes + 4095) / 4096 * 4096)); }

// Whether this process may run this build; asked once before anything else.
bool octavo_usable() { return tiles_granted(); }

Engine* octavo_engine(int32_t threads) { return new Engine(threads); }

void octavo_close(Engine* engine) { delete engine; }

// Lays out a weight whose format is one of the plain ones, int8 or int4 in groups of 32 (kGrouped); gives its bytes.
int64_t octavo_lay_out(Weight* weight) {
  weight->bits = 4;
  weight->group = 32;
  weight->offset = 8;
  weight->halves = 1;
  weight->minima = weight->wide = weight->exact = false;
  return lay_out(*weight);
}

// Lays out a weight so that it holds a quantized stored type exactly.
int64_t octavo_lay_out_exact(Weight* weight, int32_t stored) {
  exact_layout(Stored(stored), *weight);
  return lay_out(*weight);
}

// Whether a linear layer may be `gated`, and whether it may hand over what it makes to the linear layer of `next`.
bool octavo_can_gate(const Weight* weight) { return can_gate(*weight); }
bool octavo_can_gate_into(const Weight* next) { return can_gate_into(*next); }

// Packs `count` stored rows of `width` inputs as the weight's outputs from `first` on.
void octavo_pack(Engine* engine, Weight* weight, int64_t first, int64_t count, int32_t stored, const uint8_t* data,
                 int64_t width) {
  engine->together([&](Team& team) {
    Packer packer(*weight);
    const size_t bytes = row_bytes(Stored(stored), width);
    for (int64_t part = team.next(); part * 16 < count; part = team.next())
      for (int64_t n = part * 16; n < std::min(count, part * 16 + 16); n++)
        packer.put(first + n, Stored(stored), data + size_t(n) * bytes, width);
  });
}

// Stored rows as fp32: [count][width].
void octavo_read_rows(int32_t stored, const uint8_t* data, int64_t count, int64_t width, float* out) {
  for (int64_t n = 0; n < count; n++)
    read_row(Stored(stored), data + size_t(n) * row_bytes(Stored(stored), width), width, out + n * width);
}

void octavo_run(Engine* engine, const Program* program, const Step* step) { engine->run(*program, *step); }

// From now on adds the seconds of each kind of instruction to `seconds`, one entry a Code; null to stop.
void octavo_profile(Engine* engine, double* seconds) { engine->seconds = seconds; }

// Draws a token from each of `count` rows of logits, which are used up.
void octavo_sample(Engine* engine, float* logits, int64_t count, int64_t width, int64_t stride, const Draw* draws,
                   int32_t* out) {
  engine->together([&](Team& team) {
    Sampler sampler;
    for (int64_t r = team.next(); r < count; r = team.next()) out[r] = sampler.draw(logits + r * stride, width, draws[r]);
  });
}

}  // extern "C"
#pragma GCC visibility pop
