"""Makes `csrc/step.h`, the C side of `library.Step`, of the table of a step's arrays.

python -m octavo.kernels.step_header
"""

from pathlib import Path

import numpy as np

from octavo.batch import SENT

PATH = Path(__file__).parent / "csrc" / "step.h"
_DIMS = {"T": "[tokens]", "R": "[rows]", "R+1": "[rows + 1]", "RM": "[rows][table_stride]"}
_BEGINNING = """// Made of a step's arrays (octavo/batch.py) by python -m octavo.kernels.step_header, as a test checks.
#pragma once

#include <cstdint>

namespace octavo {

struct Step {
  int32_t tokens;
  int32_t rows;
  int64_t table_stride;
"""
_END = """  const float* const* cos;  // for each row, [positions][half]
  const float* const* sin;
  const float* q_scale;  // [positions], or null
};

}  // namespace octavo
"""


def text() -> str:
    """What the header says."""
    kinds: dict[type, str] = {np.int32: "int32_t", np.float32: "float"}
    arrays = (f"  const {kinds[each.dtype]}* {each.name};  // {_DIMS[each.dims]}\n" for each in SENT)
    return _BEGINNING + "".join(arrays) + _END


if __name__ == "__main__":
    PATH.write_text(text(), "utf-8")
