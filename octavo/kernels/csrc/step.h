// Made of a step's arrays (octavo/batch.py) by python -m octavo.kernels.step_header, as a test checks.
#pragma once

#include <cstdint>

namespace octavo {

struct Step {
  int32_t tokens;
  int32_t rows;
  int64_t table_stride;
  const int32_t* token_ids;  // [tokens]
  const int32_t* positions;  // [tokens]
  const int32_t* slots;  // [tokens]
  const int32_t* query_start;  // [rows + 1]
  const int32_t* seq_lens;  // [rows]
  const int32_t* block_tables;  // [rows][table_stride]
  const float* const* cos;  // for each row, [positions][half]
  const float* const* sin;
  const float* q_scale;  // [positions], or null
};

}  // namespace octavo
