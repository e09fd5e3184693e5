// What this machine's cores can do at most: bf16 products by tiles from registers, and reading memory once.
// benchmarks/kernels.py compiles it, and holds the kernels against it. The library has asked for tiles before.
#include <cstdint>

#include <immintrin.h>

extern "C" {

// `steps` times four products of 16 rows, 16 outputs and 32 inputs, of numbers that are no zeros: the operands do not
// leave the tiles. (With zeros the same loop runs a fifth faster; it heats the core less.)
void multiply_in_registers(int64_t steps) {
  struct alignas(64) { uint8_t palette, start, none[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = {};
  alignas(64) static uint16_t numbers[2048];
  shape.palette = 1;
  for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
  for (int i = 0; i < 2048; i++) numbers[i] = uint16_t(0x3c00 + i * 7919 % 64 + (i * 31 % 2 << 15));
  asm volatile("" ::"r"(&shape), "r"(numbers) : "memory");
  _tile_loadconfig(&shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, numbers, 64);
  _tile_loadd(5, numbers + 512, 64);
  _tile_loadd(6, numbers + 1024, 64);
  _tile_loadd(7, numbers + 1536, 64);
  for (int64_t i = 0; i < steps; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

// Reads `bytes` from `from` on, a multiple of 256; the sum of it, so that it is read.
float read_once(const char* from, int64_t bytes) {
  __m512i sum[4] = {};
  for (int64_t at = 0; at < bytes; at += 256)
    for (int i = 0; i < 4; i++) sum[i] = _mm512_xor_si512(sum[i], _mm512_loadu_si512(from + at + 64 * i));
  return float(_mm512_reduce_or_epi32(_mm512_or_si512(_mm512_or_si512(sum[0], sum[1]), _mm512_or_si512(sum[2], sum[3]))));
}

}  // extern "C"
